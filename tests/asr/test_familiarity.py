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
from mole_asr.asr.replay import save_examples
from mole_asr.corpus.batch import Batch
from mole_asr.corpus.text_tokenizer import TextTokenizer
from mole_asr.errors import MoleError

from .conftest import LANGUAGES, build_on_whisper, make_experts_differ


def voices(seed: int, count: int, width: int = 16) -> torch.Tensor:
    """Mean hidden vectors of utterances of one voice."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(width, generator=generator) + 0.3 * torch.randn(count, width, generator=generator)


def test_a_known_voice_is_familiar_and_another_one_is_not() -> None:
    known = torch.cat([voices(0, 50), voices(1, 50)])
    familiar = Familiarity(known[::2])
    assert familiar(known[1::2]).float().mean() > 0.85
    assert familiar(voices(2, 100)).float().mean() < 0.05


def test_one_example_in_a_hundred_is_less_like_its_neighbours_than_what_is_familiar() -> None:
    known = torch.cat([voices(0, 150), voices(1, 150)])
    centred = list(torch.nn.functional.normalize(known - known.mean(0)))
    nearest = [max(float(one @ other) for other in centred if other is not one) for one in centred]
    strangers = sum(each < float(Familiarity(known).least) for each in nearest)
    assert STRANGE_SHARE == 0.01 and strangers == 3


def test_autocast_does_not_round_what_is_compared() -> None:
    known, heard = voices(0, 200), voices(0, 2000)
    familiar = Familiarity(known)
    plain = familiar(heard)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(familiar(heard), plain)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = torch.nn.functional.normalize(heard - familiar.mean_H) @ familiar.known_MH.T
    assert not torch.equal(rounded.amax(1) >= familiar.least, plain), "or this shows nothing"


def test_one_example_makes_all_familiar() -> None:
    assert Familiarity(voices(0, 1))(voices(1, 5)).all()


def test_later_languages_have_no_say_about_old_ones(
    make_model: Callable[..., MoleModel], tokenizer: TextTokenizer, tmp_path: Path, batch: Batch
) -> None:
    save_model(make_model(), tokenizer, tmp_path / "old")
    extend(str(tmp_path / "old"), str(tmp_path / "new"), languages=["nl"])
    model, _ = load_model(tmp_path / "new")
    output = model(batch.audio_BS, batch.audio_lengths_B)
    evidence, frames = output.decision.evidence, output.frames
    hidden_BH = evidence.mean_hidden(frames.valid_BT)
    old = {code: voices(n, 20, hidden_BH.shape[1]) for n, code in enumerate(LANGUAGES)}
    remember(model, {**old, "nl": hidden_BH})
    first_B, second_B = (familiar(hidden_BH) for familiar in model.mixture.familiarity)
    assert second_B.all() and not first_B.any(), "or this shows nothing"
    for newest, familiar in (([0, 1, 0, 1], [False, True, False, True]), ([0] * 4, [False] * 4)):
        heard_B = model.mixture.sounds_familiar(evidence, frames, torch.tensor(newest))
        assert heard_B.tolist() == familiar
    remember(model, old)  # without examples of Dutch, all sounds familiar where Dutch is heard
    heard_B = model.mixture.sounds_familiar(evidence, frames, torch.tensor([0, 1, 0, 1]))
    assert heard_B.tolist() == [False, True, False, True]


def test_a_language_without_examples_makes_all_familiar(make_model: Callable[..., MoleModel]) -> None:
    model = make_model()
    width = mixture_of(model).language_tokenizer.languages.in_features
    remember(model, {code: voices(n, 5, width) for n, code in enumerate(LANGUAGES[1:])})
    assert not model.mixture.familiarity


@pytest.mark.parametrize("spoil", ["wide", "empty", "no number"])
def test_the_examples_of_a_model_are_its_own(
    whisper_folder: Path, tokenizer: TextTokenizer, tmp_path: Path, spoil: str
) -> None:
    model = build_on_whisper(whisper_folder, tokenizer)
    save_model(model, tokenizer, tmp_path)
    assert not load_model(tmp_path)[0].mixture.familiarity, "without examples all is familiar"
    width = mixture_of(model).language_tokenizer.languages.in_features
    wrong = {
        "wide": torch.zeros(2, width + 1),
        "empty": torch.zeros(0, width),
        "no number": torch.full((2, width), math.nan),
    }
    save_examples({LANGUAGES[0]: wrong[spoil]}, tmp_path)
    with pytest.raises(MoleError, match=rf"{tmp_path}.*language_examples.* is not of this model"):
        load_model(tmp_path)


def test_a_pruned_model_knows_the_same_voices(whisper_folder: Path, tokenizer: TextTokenizer, tmp_path: Path) -> None:
    model = build_on_whisper(whisper_folder, tokenizer)
    width = mixture_of(model).language_tokenizer.languages.in_features
    save_model(model, tokenizer, tmp_path, {code: voices(n, 5, width) for n, code in enumerate(LANGUAGES)})
    prune(str(tmp_path), str(tmp_path / "small"), languages=[LANGUAGES[1]])
    (whole,), (small,) = (load_model(folder)[0].mixture.familiarity for folder in (tmp_path, tmp_path / "small"))
    assert torch.equal(small.known_MH, whole.known_MH) and torch.equal(small.least, whole.least)


@pytest.mark.parametrize("strange", [False, True])
@pytest.mark.parametrize("routing_unit", ["utterance", "frame"])
def test_of_a_stranger_the_decoder_has_more_to_say(
    whisper_folder: Path, tokenizer: TextTokenizer, batch: Batch, strange: bool, routing_unit: str
) -> None:
    model = build_on_whisper(whisper_folder, tokenizer, second_hearing=3.0, routing_unit=routing_unit).eval()
    make_experts_differ(model)
    inputs, head = (batch.audio_BS, batch.audio_lengths_B), model.attention_head
    with torch.no_grad():
        first = model(*inputs, torch.full((len(batch.audio_lengths_B),), -1))  # no language is given, nobody is asked
        hidden_BH = first.decision.evidence.mean_hidden(first.frames.valid_BT)
        known = torch.cat([hidden_BH, hidden_BH + 1e-4])
        known = known.mean(0) + 1 - known if strange else known
        remember(model, dict.fromkeys(LANGUAGES, known))
        second = model(*inputs)
        assert head is not None and first.memory_BTD is not None and second.memory_BTD is not None
        opinion_BN = head.language_opinion(first.memory_BTD, first.frames.lengths_B, LANGUAGES)
        trust, opinion = (STRANGER_TRUST, 3.0 * STRANGER_OPINION) if strange else (1.0, 3.0)
        wanted_BN = trust * first.language_logits_BN + opinion * opinion_BN
        torch.testing.assert_close(second.language_logits_BN, wanted_BN)
        if routing_unit == "frame":
            wanted_BTN = trust * first.decision.evidence.evidence_BTN + opinion * opinion_BN[:, None]
            packed_NL = first.frames.rows.pack(wanted_BTN)
            torch.testing.assert_close(second.decision.heard.aux["logits"], packed_NL)
        assert not torch.allclose(second.memory_BTD, first.memory_BTD, atol=1e-4)
