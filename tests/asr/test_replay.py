"""What a model keeps of old languages, and that it holds a new one back."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mole_asr.asr.checkpoint import load_model, save_model
from mole_asr.asr.extend import extend
from mole_asr.asr.generations import mixture_of, train_last_generation, wake
from mole_asr.asr.model import MoleModel
from mole_asr.asr.replay import EXAMPLES_FILE, MOST_EXAMPLES, hear_examples, load_examples, replay_of, save_examples
from mole_asr.corpus.batch import Batch
from mole_asr.corpus.text_tokenizer import TextTokenizer
from mole_asr.errors import MoleError

from .conftest import LANGUAGES


def test_an_example_gives_the_logits_of_its_utterance(make_model: Callable[..., MoleModel], batch: Batch) -> None:
    model = make_model().eval()
    examples = hear_examples(model, [batch])
    assert {code: len(each) for code, each in examples.items()} == {"de": 1, "en": 2, "fr": 1}
    logits = model(batch.audio_BS, batch.audio_lengths_B).language_logits_BN
    again = mixture_of(model).language_tokenizer.languages(torch.cat([examples[code] for code in LANGUAGES]))
    torch.testing.assert_close(again, logits, atol=1e-5, rtol=1e-5)


def test_some_of_many_are_kept(make_model: Callable[..., MoleModel], batch: Batch) -> None:
    unknown = Batch(**{**vars(batch), "languages_B": torch.full((4,), -1)})
    examples = hear_examples(make_model(), [*[batch] * (MOST_EXAMPLES + 1), unknown])
    assert {code: len(each) for code, each in examples.items()} == dict.fromkeys(LANGUAGES, MOST_EXAMPLES)
    first, second = hear_examples(make_model(), [batch])["en"]
    assert torch.equal(examples["en"][0], first) and torch.equal(examples["en"][-1], second), "the longest, the last"


@pytest.mark.parametrize("replays", [True, False])
def test_a_new_language_does_not_take_what_is_replayed(
    replays: bool, make_model: Callable[..., MoleModel], tokenizer: TextTokenizer, tmp_path: Path, batch: Batch
) -> None:
    codes = ["fr", "de", "en"]  # ids are by the model's order
    old = make_model(languages=codes)
    hidden_4H = torch.cat([*hear_examples(old, [batch]).values()])
    with torch.no_grad():  # a sure language tokenizer: each utterance is of the language that it resembles
        layer = old.mixture.language_tokenizer.languages
        layer.weight.copy_(50 * (hidden_4H[[0, 1, 3]] - hidden_4H.mean(0)))
        layer.bias.copy_(-(layer.weight * hidden_4H.mean(0)).sum(1))
    save_model(old, tokenizer, tmp_path / "old")
    examples = {code: each[:1] for code, each in hear_examples(old, [batch]).items()}
    save_examples(dict(sorted(examples.items())), tmp_path / "old")
    extend(str(tmp_path / "old"), str(tmp_path / "new"), languages=["nl"])
    model, _ = load_model(tmp_path / "new")
    wake(model)
    train_last_generation(model)
    kept = load_examples(tmp_path / "new", model)
    assert all(torch.equal(kept[code], examples[code]) for code in codes), "they go along"
    replay, layer = replay_of(kept, model), mixture_of(model).language_tokenizer.languages
    assert replay is not None
    dutch_1H = hidden_4H[2:3]
    optimizer = torch.optim.Adam(layer.parameters(), 0.05)
    for _ in range(400):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(layer(dutch_1H), torch.tensor([3]))
        (loss + replay(model) if replays else loss).backward()
        optimizer.step()
    heard = layer(torch.cat([dutch_1H, *[kept[code] for code in codes]])).argmax(1).tolist()
    assert heard == [3, 0, 1, 2] if replays else heard.count(3) > 2


def test_what_lacks_is_said(
    make_model: Callable[..., MoleModel],
    tokenizer: TextTokenizer,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    save_model(make_model(), tokenizer, tmp_path / "old")
    save_examples({"en": torch.zeros(1, 1)}, tmp_path / "new")  # what is left of another model
    extend(str(tmp_path / "old"), str(tmp_path / "new"), languages=["nl"])
    assert not (tmp_path / "new" / EXAMPLES_FILE).exists(), "there are none"
    model, _ = load_model(tmp_path / "new")
    assert replay_of({}, model) is None and "no examples of de, en, fr" in caplog.text
    caplog.clear()
    width = mixture_of(model).language_tokenizer.languages.in_features
    replay = replay_of({"nl": torch.zeros(1, width), "en": torch.zeros(2, width)}, model)
    assert replay is not None and replay.languages_M.tolist() == [1, 1], "Dutch is new"
    assert "no examples of de, fr" in caplog.text


def test_a_wrong_file_is_named(make_model: Callable[..., MoleModel], tmp_path: Path) -> None:
    model = make_model()
    assert load_examples(tmp_path, model) == {}, "an older model has none"
    (tmp_path / EXAMPLES_FILE).write_bytes(b"broken")
    with pytest.raises(MoleError, match=f"{EXAMPLES_FILE}: cannot be read"):
        load_examples(tmp_path, model)
    width = mixture_of(model).language_tokenizer.languages.in_features
    for wrong in (torch.zeros(2, width + 1), torch.zeros(0, width), torch.full((1, width), torch.nan)):
        save_examples({"en": wrong}, tmp_path)
        with pytest.raises(MoleError, match=rf"{tmp_path}.*{EXAMPLES_FILE}: is not of this model"):
            load_examples(tmp_path, model)
