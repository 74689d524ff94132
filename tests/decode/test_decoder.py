"""The decoder: who is searched and how, whatever the batch, and which language models it refuses."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mole_asr.corpus.text_tokenizer import TextTokenizer
from mole_asr.decode import decoder as module
from mole_asr.decode.beam import Weights, beam_search
from mole_asr.decode.decoder import WEIGHTS, CtcDecoder, LmMode
from mole_asr.decode.greedy import greedy_ctc
from mole_asr.decode.ngram import TokenNgram
from mole_asr.decode.rescore import text_log_probs
from mole_asr.errors import MoleError
from mole_asr.text.checkpoint import LanguageModel, save_text_model
from mole_asr.text.vocabulary import ByteVocabulary

from .conftest import Make, random_log_probs

PIECES = 9
CPU = torch.device("cpu")


@pytest.fixture
def ngrams() -> dict[str, TokenNgram]:
    return {"en": TokenNgram.count([[3, 4, 5], [6, 7], [3, 8]], PIECES, order=3)}


@pytest.fixture
def heard() -> tuple[list[np.ndarray], list[str]]:
    """Seven utterances, some of a language that has n-grams."""
    log_probs = [random_log_probs(frames, PIECES, frames) for frames in (5, 12, 1, 0, 9, 20, 7)]
    return log_probs, ["en", "fr", "en", "en", "en", "fr", "en"]


def saved(lm: LanguageModel, folder: Path) -> Path:
    save_text_model(lm, folder)
    return folder


@pytest.mark.parametrize("mode", [None, "rescore", "fusion"])
def test_the_batch_does_not_matter(
    tokenizer: TextTokenizer,
    ngrams: dict[str, TokenNgram],
    heard: tuple[list[np.ndarray], list[str]],
    make_lm: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mode: LmMode | None,
) -> None:
    monkeypatch.setattr(module, "_TOGETHER", 3)
    decoder = CtcDecoder(tokenizer, ngrams, beam=4)
    if mode is not None:
        decoder.use(saved(make_lm(), tmp_path), mode, CPU)
    found = decoder.decode(*heard)
    assert found == decoder.decode(*heard), "the same again"
    assert found == [decoder.decode([log_probs_TV], [code])[0] for log_probs_TV, code in zip(*heard, strict=True)]
    assert found[3] == []


def test_who_is_searched(
    tokenizer: TextTokenizer, ngrams: dict[str, TokenNgram], heard: tuple[list[np.ndarray], list[str]]
) -> None:
    decoder = CtcDecoder(tokenizer, ngrams, beam=5)
    decoder.weights = Weights(ngram=2.0)
    greedy = [greedy_ctc(torch.from_numpy(each)[None], torch.tensor([len(each)]))[0] for each in heard[0]]
    searched = [list(beam_search([each], [ngrams["en"]], None, decoder.weights, 5)[0][0].ids) for each in heard[0]]
    expected = [s if code == "en" else g for s, g, code in zip(searched, greedy, heard[1], strict=True)]
    assert searched != greedy
    assert decoder.decode(*heard) == expected
    decoder.beam = 0
    assert decoder.decode(*heard) == greedy


@pytest.mark.parametrize("kind", ["pieces", "bytes"])
def test_rescoring_takes_the_best_total_of_the_list(
    tokenizer: TextTokenizer,
    ngrams: dict[str, TokenNgram],
    heard: tuple[list[np.ndarray], list[str]],
    make_lm: Make,
    tmp_path: Path,
    kind: str,
) -> None:
    """The first pass is the search without the language model."""
    lm = make_lm(ByteVocabulary() if kind == "bytes" else None)
    lm.model.float()
    decoder = CtcDecoder(tokenizer, ngrams, beam=6)
    decoder.use(saved(lm, tmp_path), "rescore", CPU)
    assert decoder.weights == WEIGHTS["rescore"]
    decoder.weights = weights = Weights(ngram=0.6, lm=1.5, bonus=2.0)
    for log_probs_TV, code, found in zip(*heard, decoder.decode(*heard), strict=True):
        ngram = ngrams.get(code)
        first = beam_search([log_probs_TV], [ngram], None, Weights(0.6, 0.0, WEIGHTS[None].bonus), 6)[0]
        scores = text_log_probs(lm, [tokenizer.decode(each.ids) for each in first])
        totals = [
            each.acoustic + 0.6 * each.ngram + 1.5 * score + 2.0 * len(each.ids)
            for each, score in zip(first, scores, strict=True)
        ]
        assert found == list(first[int(np.argmax(totals))].ids)
        assert decoder.nbest([log_probs_TV], [code])[0][0].total(weights) == pytest.approx(max(totals), abs=1e-4)


def test_fusion_needs_the_same_pieces(tokenizer: TextTokenizer, make_lm: Make, tmp_path: Path) -> None:
    decoder = CtcDecoder(tokenizer)
    folder = saved(make_lm(ByteVocabulary()), tmp_path)
    with pytest.raises(MoleError, match=r"pieces are not the recogniser's; give --lm-mode rescore.*data\.vocabulary"):
        decoder.use(folder, "fusion", CPU)
    assert decoder.fusion is None
    decoder.use(folder, "rescore", CPU)
    assert decoder.rescorer is not None


def test_an_encoder_scores_no_texts(tokenizer: TextTokenizer, make_lm: Make, tmp_path: Path) -> None:
    folder = saved(make_lm(), tmp_path)
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"causal": true', '"causal": false'))
    with pytest.raises(MoleError, match="is an encoder"):
        CtcDecoder(tokenizer).use(folder, "rescore", CPU)
