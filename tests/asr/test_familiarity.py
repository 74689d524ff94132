"""What sounds familiar to a language tokenizer, and what follows for the second hearing."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mole_asr.asr.checkpoint import load_model, save_model
from mole_asr.asr.extend import extend
from mole_asr.asr.familiarity import STRANGE_SHARE, Familiarity, remember
from mole_asr.asr.generations import mixture_of
from mole_asr.asr.model import MoleModel
from mole_asr.asr.pretrained import STRANGER_OPINION, STRANGER_TRUST
from mole_asr.asr.prune import prune
from mole_asr.asr.replay import load_examples, save_examples
from mole_asr.corpus.batch import Batch
from mole_asr.corpus.text_tokenizer import TextTokenizer
from mole_asr.errors import MoleError

from .conftest import LANGUAGES, build_on_whisper


def voices(seed: int, count: int, width: int = 16) -> torch.Tensor:
    """Mean hidden vectors of utterances of one voice."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(width, generator=generator) + 0.3 * torch.randn(count, width, generator=generator)


def test_a_known_voice_is_familiar_and_another_one_is_not() -> None:
    known = torch.cat([voices(0, 50), voices(1, 50)])
    familiar = Familiarity(known[::2])
    assert familiar(known[1::2]).float().mean() > 0.85
    assert familiar(voices(2, 100)).float().mean() < 0.05


def test_few_examples_are_less_like_their_neighbours_than_what_is_familiar() -> None:
    known = torch.cat([voices(0, 30), voices(1, 30)])
    centred = [each - known.mean(0) for each in known]
    nearest = [
        max(float(torch.cosine_similarity(one, other, dim=0)) for other in centred if other is not one)
        for one in centred
    ]
    strangers = sum(each < float(Familiarity(known).least) for each in nearest)
    assert strangers == math.ceil(STRANGE_SHARE * (len(known) - 1))


def test_one_example_makes_all_familiar() -> None:
    assert Familiarity(voices(0, 1))(voices(1, 5)).all()


def test_later_languages_have_no_say_about_old_ones(
    make_model: Callable[..., MoleModel], tokenizer: TextTokenizer, tmp_path: Path, batch: Batch
) -> None:
    save_model(make_model(), tokenizer, tmp_path / "old")
    width = mixture_of(make_model()).language_tokenizer.languages.in_features
    examples = {code: voices(n, 20, width) for n, code in enumerate(LANGUAGES)}
    save_examples(examples, tmp_path / "old")
    extend(str(tmp_path / "old"), str(tmp_path / "new"), languages=["nl"])
    save_examples({**load_examples(tmp_path / "new"), "nl": voices(9, 20, width)}, tmp_path / "new")
    old, new = (load_model(tmp_path / name)[0].mixture for name in ("old", "new"))
    assert len(old.familiarity) == 1 and len(new.familiarity) == 2
    hidden = torch.cat([voices(0, 10, width), voices(9, 10, width)])
    assert torch.equal(new.familiarity[0](hidden), old.familiarity[0](hidden))
    assert new.familiarity[1](hidden)[10:].all() and not new.familiarity[0](hidden)[10:].any()
    # Dutch is asleep: whatever is heard is of the first generation, and only that is asked.
    model, _ = load_model(tmp_path / "new")
    output = model(batch.audio_BS, batch.audio_lengths_B)
    evidence, newest_B = output.decision.evidence, output.decision.newest_B
    assert newest_B is not None and not newest_B.any()
    hidden_BH = evidence.mean_hidden(output.frames.valid_BT)
    familiar_B = model.mixture.sounds_familiar(evidence, output.frames, newest_B)
    assert torch.equal(familiar_B, new.familiarity[0](hidden_BH))


def test_the_examples_of_a_model_are_its_own(
    make_model: Callable[..., MoleModel], tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    save_model(make_model(), tokenizer, tmp_path)
    assert not load_model(tmp_path)[0].mixture.familiarity, "without examples all is familiar"
    width = mixture_of(make_model()).language_tokenizer.languages.in_features
    save_examples({LANGUAGES[0]: torch.zeros(2, width + 1)}, tmp_path)
    with pytest.raises(MoleError, match="is not of this model"):
        load_model(tmp_path)
    save_examples({LANGUAGES[0]: voices(0, 5, width)}, tmp_path)
    prune(str(tmp_path), str(tmp_path / "small"), languages=[LANGUAGES[1]])
    small, _ = load_model(tmp_path / "small")
    assert torch.equal(small.mixture.familiarity[0].known_MH, load_model(tmp_path)[0].mixture.familiarity[0].known_MH)


@pytest.mark.parametrize("strange", [False, True])
def test_of_a_stranger_the_decoder_has_more_to_say(
    whisper_folder: Path, tokenizer: TextTokenizer, batch: Batch, strange: bool
) -> None:
    model = build_on_whisper(whisper_folder, tokenizer, second_hearing=3.0).eval()
    inputs, head = (batch.audio_BS, batch.audio_lengths_B), model.attention_head
    with torch.no_grad():
        first = model(*inputs, torch.full((len(batch.audio_lengths_B),), -1))  # no language is given, nobody is asked
        hidden_BH = first.decision.evidence.mean_hidden(first.frames.valid_BT)
        known = torch.cat([hidden_BH, hidden_BH + 1e-4])
        remember(model, {LANGUAGES[0]: 1 - 2 * known + known.mean(0) if strange else known})
        second = model(*inputs)
        assert head is not None and first.memory_BTD is not None
        opinion_BN = head.language_opinion(first.memory_BTD, first.frames.lengths_B, LANGUAGES)
    trust, opinion = (STRANGER_TRUST, 3.0 * STRANGER_OPINION) if strange else (1.0, 3.0)
    torch.testing.assert_close(second.language_logits_BN, trust * first.language_logits_BN + opinion * opinion_BN)
