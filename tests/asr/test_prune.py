"""Fewer languages: for those that are left, the bits of the whole model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mole_asr.asr.checkpoint import load_model, save_model
from mole_asr.asr.extend import extend
from mole_asr.asr.model import MoleModel
from mole_asr.asr.prune import prune
from mole_asr.cli import main
from mole_asr.corpus.batch import Batch
from mole_asr.corpus.text_tokenizer import TextTokenizer
from mole_asr.decode.ngram import TokenNgram, load_ngrams, save_ngrams
from mole_asr.errors import MoleError

CODES = ["de", "en", "fr", "it"]
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "entropy": {"reliability": "entropy", "num_mole_blocks": 2},
    "frames": {"routing_unit": "frame"},
    "families": {"expert_of": {"de": "gem", "en": "gem", "fr": "roa", "it": "roa"}},
}


@pytest.fixture
def save(make_model: Callable[..., MoleModel], tokenizer: TextTokenizer, tmp_path: Path) -> Callable[..., Path]:
    """Saves a small model that hears each of four languages somewhere, and gives its folder."""

    def write(lean: float = 0.0, **changes: Any) -> Path:
        model = make_model(CODES, **changes)
        with torch.no_grad():
            languages = model.mixture.language_tokenizer.languages
            languages.weight.mul_(30)
            languages.bias[[1, 3]] += lean
        save_model(model, tokenizer, tmp_path / "whole")
        return tmp_path / "whole"

    return write


@pytest.fixture
def noise() -> tuple[torch.Tensor, torch.Tensor]:
    """Forty utterances of very different noise [B, S], and their lengths."""
    generator = torch.Generator().manual_seed(0)
    audio_BS = torch.randn(40, 9600, generator=generator).cumsum(1).mul_(0.001).sin()
    audio_BS = audio_BS * torch.rand(40, 1, generator=generator) + 0.1 * torch.randn(40, 9600, generator=generator)
    return audio_BS, torch.full((40,), 9600)


@pytest.mark.parametrize("kind", KINDS)
def test_kept_languages_keep_their_bits(
    kind: str, save: Callable[..., Path], tmp_path: Path, noise: tuple[torch.Tensor, torch.Tensor]
) -> None:
    folder = save(lean=4.0 if kind == "frames" else 0.0, **KINDS[kind])
    prune(str(folder), str(tmp_path / "small"), languages=["it", "en"])
    whole, _ = load_model(folder)
    small, _ = load_model(tmp_path / "small")
    assert small.languages == ["en", "it"]
    with torch.inference_mode():
        for language, kept in ((1, 0), (3, 1)):
            told_B = torch.full((40,), language)
            before, after = whole(*noise, told_B), small(*noise, torch.full((40,), kept))
            assert torch.equal(before.log_probs_BTV, after.log_probs_BTV)
            assert torch.equal(before.reliability_B, after.reliability_B)
        # One by one: in a batch, an utterance that is heard as another language changes how many rows an expert has.
        heard = 0
        for audio_S in noise[0]:
            before, after = (model(audio_S[None], noise[1][:1]) for model in (whole, small))
            experts = before.decision.heard.aux["predicted"].unique().tolist()
            left = [0, 1] if kind == "families" else [1, 3]
            if not set(experts) <= set(left):
                continue
            heard += 1
            assert torch.equal(before.log_probs_BTV, after.log_probs_BTV)
            assert torch.equal(before.reliability_B, after.reliability_B)
            kept_logits = before.language_logits_BN[:, [1, 3]]
            assert torch.equal(kept_logits, after.language_logits_BN)
            torch.testing.assert_close(small.mixture.language_posterior(kept_logits).sum(1), torch.ones(1))
    assert heard > 3


def test_the_model_is_smaller_by_its_experts(save: Callable[..., Path], tmp_path: Path) -> None:
    folder = save()
    prune(str(folder), str(tmp_path / "small"), languages=["fr"])
    whole, small = (sum(p.numel() for p in load_model(f)[0].parameters()) for f in (folder, tmp_path / "small"))
    assert whole - small == 3 * (2 * 16 * 24 + 16 + 24)
    sizes = [(f / "model.safetensors").stat().st_size for f in (folder, tmp_path / "small")]
    assert sizes[0] - sizes[1] == pytest.approx(4 * (whole - small), abs=100)


def test_twice_pruned_and_extended_before(
    save: Callable[..., Path], tmp_path: Path, noise: tuple[torch.Tensor, torch.Tensor]
) -> None:
    folder = save()
    extend(str(folder), str(tmp_path / "wider"), languages=["cs"])
    prune(str(tmp_path / "wider"), str(tmp_path / "small"), languages=["cs", "de", "it"])
    prune(str(tmp_path / "small"), str(tmp_path / "smaller"), languages=["it"])
    whole, smaller = load_model(folder)[0], load_model(tmp_path / "smaller")[0]
    assert load_model(tmp_path / "small")[0].languages == ["de", "it", "cs"] and smaller.languages == ["it"]
    with torch.inference_mode():
        before, after = whole(*noise, torch.full((40,), 3)), smaller(*noise, torch.zeros(40, dtype=torch.int64))
    assert torch.equal(before.log_probs_BTV, after.log_probs_BTV)
    with pytest.raises(MoleError, match="was pruned"):
        extend(str(tmp_path / "smaller"), str(tmp_path / "again"), languages=["nl"])


def test_ngrams_of_kept_languages_go_along(save: Callable[..., Path], tmp_path: Path) -> None:
    folder = save()
    V = TextTokenizer(folder).vocab_size
    save_ngrams({code: TokenNgram.count([[1, 2, 3]], V) for code in ("de", "en")}, folder)
    prune(str(folder), str(tmp_path / "small"), languages=["en", "it"])
    assert set(load_ngrams(tmp_path / "small", V)) == {"en"}


def test_mistakes_are_explained(
    save: Callable[..., Path], tmp_path: Path, batch: Batch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, small = str(save()), str(tmp_path / "small")
    for languages, match in ((["cs"], "has no cs"), ([], "one must be left")):
        with pytest.raises(MoleError, match=match):
            prune(folder, small, languages=languages)
    with pytest.raises(MoleError, match="give another folder"):
        prune(folder, folder, languages=["de"])
    assert main(["prune", folder, small, "--languages", "de,fr"]) == 0
    assert "de, fr" in capsys.readouterr().out
    with pytest.raises(MoleError, match="experts of languages"):
        prune(str(save(mixture="switch", num_experts=2)), small, languages=["de"])
