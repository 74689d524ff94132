"""In which language a piece is written: by its text where that is unsure, and by the other pieces where they tell."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mole_asr.asr.pretrained import PretrainedModel
from mole_asr.corpus.batch import Batch
from mole_asr.corpus.text_tokenizer import TextTokenizer
from mole_asr.decode.word import Word
from mole_asr.decode.words import WordList
from mole_asr.errors import MoleError
from mole_asr.transcribe import transcriber
from mole_asr.transcribe.few_languages import expect_few_languages
from mole_asr.transcribe.pieces import Heard, Piece
from mole_asr.transcribe.transcriber import Transcriber

from .conftest import LANGUAGES, build_on_whisper, make_experts_differ


@pytest.fixture
def model(whisper_folder: Path, tokenizer: TextTokenizer) -> PretrainedModel:
    return build_on_whisper(whisper_folder, tokenizer)


def test_where_the_language_is_unsure_the_likeliest_text_tells_it(
    model: PretrainedModel, tokenizer: TextTokenizer, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.eval()
    model.config = replace(model.config, second_hearing=0.0)
    make_experts_differ(model, by=1.0)
    listener, head = Transcriber(model, tokenizer), model.attention_head
    assert head is not None
    weight = 50.0  # texts of random weights are much alike
    monkeypatch.setattr(transcriber, "_TEXT_WEIGHT", weight)
    waves = [audio_S[:n].numpy() for audio_S, n in zip(batch.audio_BS, batch.audio_lengths_B.tolist(), strict=True)]
    monkeypatch.setattr(transcriber, "_SURE", 0.0)
    first = list(listener.transcribe(waves))
    sure = sorted(max(each.language_probabilities.values()) for each in first)
    monkeypatch.setattr(transcriber, "_SURE", sum(sure[-2:]) / 2)  # all but one are unsure
    compared = 0
    for wave, before, after in zip(waves, first, listener.transcribe(waves), strict=True):
        if max(before.language_probabilities.values()) == sure[-1]:
            assert (after.text, after.language, after.reliability) == (before.text, before.language, before.reliability)
            continue
        scores = {}
        for n, code in enumerate(LANGUAGES):
            with torch.no_grad():
                told = model(torch.from_numpy(wave)[None], torch.tensor([len(wave)]), torch.tensor([n]))
                (written,) = head.write(told.memory_BTD, told.frames.lengths_B, torch.tensor([n]))
            scores[code] = math.log(before.language_probabilities[code]) + weight * written.log_prob
        best = max(scores, key=scores.__getitem__)
        (told_best,) = listener.transcribe(wave, language=best)
        assert (after.language, after.text) == (best, told_best.text)
        total = sum(map(math.exp, scores.values()))
        wanted = {code: math.exp(score) / total for code, score in scores.items()}
        assert after.language_probabilities == pytest.approx(wanted, rel=1e-3)
        assert after.reliability == pytest.approx(wanted[best], rel=1e-3)
        compared += after.language != before.language
    assert compared  # or the text had nothing to say


def test_languages_are_compared_by_words_where_all_have_a_list(
    model: PretrainedModel, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    listener, posterior_N = Transcriber(model, tokenizer), np.full(len(LANGUAGES), 1 / len(LANGUAGES))
    log_probs, scores = (-1.0, -2.0, -3.0), (-4.0, -5.0, -3.5)
    monkeypatch.setattr(
        listener,
        "_listen",
        lambda batch, languages: [
            Heard([], 0.5, posterior_N, log_probs[n], scores[n]) for n in languages for _ in batch
        ],
    )
    piece = Piece(np.zeros(1), 0.0, 1.0)
    for listed, best in ((LANGUAGES, 2), (LANGUAGES[1:], 0), ([], 0)):
        listener.words = dict.fromkeys(listed, WordList("en", {"a": 1.0}))
        piece.heard = Heard([], 0.5, posterior_N)
        listener._compare_languages([piece])
        assert piece.heard.language_probabilities_N.argmax() == best
        assert piece.heard.score == scores[best]


def test_a_prior_is_learnt_from_all_pieces() -> None:
    rng = np.random.default_rng(0)
    truth_P = np.repeat([0, 1], [60, 30])  # of three languages that resemble each other
    logits_PN = rng.normal(0, 1, (90, 3)) + 1.5 * np.eye(3)[truth_P]
    posterior_PN = np.exp(logits_PN) / np.exp(logits_PN).sum(1, keepdims=True)
    after_PN = expect_few_languages(posterior_PN)
    np.testing.assert_allclose(after_PN.sum(1), 1)
    right = [(each_PN.argmax(1) == truth_P).mean() for each_PN in (posterior_PN, after_PN)]
    assert right[1] > right[0] + 0.05
    # A fixed point: the prior is what the posteriors say, and an imaginary piece of each language.
    prior_N = (after_PN.sum(0) + 1) / 93
    again_PN = posterior_PN**0.5 * prior_N
    np.testing.assert_allclose(after_PN, again_PN / again_PN.sum(1, keepdims=True), atol=1e-3)


@given(arrays(float, 4, elements=st.floats(0, 1)).filter(lambda each_N: each_N.sum() > 0.01))
def test_a_piece_alone_keeps_its_language(weights_N: np.ndarray) -> None:
    posterior_N = weights_N / weights_N.sum()
    (after_N,) = expect_few_languages(posterior_N[None])
    assert after_N[posterior_N.argmax()] == after_N.max() and not after_N[posterior_N == 0].any()


def test_few_languages_hold_together(
    model: PretrainedModel, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    listener = Transcriber(model.eval(), tokenizer)
    told = list[list[int] | None]()

    def listen(batch: list[Piece], languages: list[int] | None) -> list[Heard]:
        told.append(languages)
        heard = [[0.97, 0.02, 0.01]] * 8 + [[0.0, 0.45, 0.55]] + [[0.40, 0.05, 0.55]]
        rows = [round(float(piece.audio_S[0])) for piece in batch]
        languages = languages or [int(np.argmax(heard[row])) for row in rows]
        spoken = [[Word(LANGUAGES[n], 0.0, 1.0, 1.0)] for n in languages]
        return [Heard(words, 0.5, np.array(heard[row])) for row, words in zip(rows, spoken, strict=True)]

    monkeypatch.setattr(listener, "_listen", listen)
    monkeypatch.setattr(transcriber, "_SURE", 0.5)  # both of the last are sure by themselves
    # One second each, the number of the piece in its first sample.
    waves = [np.r_[np.float32(row), np.full(15999, 0.1, np.float32)] for row in range(10)]
    before = list(listener.transcribe(waves))
    assert [each.language for each in before] == [LANGUAGES[0]] * 8 + [LANGUAGES[2]] * 2
    assert told == [None], "nothing is unsure"
    listener.few_languages = True
    after = list(listener.transcribe(waves))
    assert [each.language for each in after] == [LANGUAGES[0]] * 8 + [LANGUAGES[2], LANGUAGES[0]]
    assert all(each.text == each.language for each in after), "it is written in the language that it is said to be in"
    assert told[1] is None and sorted(map(str, told[2:])) == ["[0]", "[1]", "[2]"], "only the last is compared"
    first = after[0].language_probabilities[LANGUAGES[0]]
    assert 0.9 < first < 0.97 and after[0].reliability == first, "sure, but softened"
    # In one window, whatever its length: else the first, of a quarter of the batch's seconds, would end here.
    assert [each.language for each in listener.transcribe(waves, batch_seconds=4.0)] == [e.language for e in after]


def test_few_languages_are_refused_where_they_say_nothing(model: PretrainedModel, tokenizer: TextTokenizer) -> None:
    listener, wave = Transcriber(model.eval(), tokenizer), np.zeros(16000, np.float32)
    listener.few_languages = True
    with pytest.raises(MoleError, match=r"^few-languages: the language is given, en; leave one of the two out$"):
        listener.transcribe(wave, language="en")
    listener.choose_head("ctc")
    with pytest.raises(MoleError, match=r"^few-languages: serves the attention head; leave --head ctc out$"):
        listener.transcribe(wave)
