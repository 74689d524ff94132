import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mole_asr.corpus.manifest import Utterance
from mole_asr.decode.ngram import TokenNgram
from mole_asr.errors import MoleError
from mole_asr.transcribe.transcriber import Transcriber

from .conftest import sound, write_sound

AB, CD, FRENCH = [2, 3, 0, 0], [4, 4, 5, 0], [6, 7, 0, 8]


def test_one_transcript_an_input_in_order_whatever_the_batches(transcriber: Transcriber, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    said = [[int(token) for token in rng.choice([0, 2, 3, 4, 5], size=rng.integers(3, 60))] for _ in range(40)]
    paths = [write_sound(tmp_path / f"{i}.wav", tokens) for i, tokens in enumerate(said)]
    whole = list(transcriber.transcribe(paths))
    assert [transcript.id for transcript in whole] == [str(path) for path in paths]
    for tokens, transcript in zip(said, whole, strict=True):
        letters = [b for a, b in zip([0, *tokens], tokens, strict=False) if b != a and b]
        assert transcript.text.replace(" ", "") == "".join("  abcd"[token] for token in letters)
        assert transcript.duration_s == pytest.approx(0.04 * len(tokens))
        assert transcript.text == " ".join(word.text for word in transcript.words)
    transcriber.model.batches.clear()
    assert list(transcriber.transcribe(paths, batch_seconds=4.0)) == whole
    assert all(rows == 1 or rows * samples <= 4.0 * 16000 for rows, samples in transcriber.model.batches)
    assert max(rows for rows, _ in transcriber.model.batches) > 1


def test_arrays_and_single_inputs(transcriber: Transcriber, tmp_path: Path) -> None:
    assert [t.text for t in transcriber.transcribe(sound(AB))] == ["ab"]
    assert [t.text for t in transcriber.transcribe(str(write_sound(tmp_path / "a.wav", CD)))] == ["cd"]
    assert [(t.id, t.text) for t in transcriber.transcribe([sound(AB), sound(CD)])] == [("0", "ab"), ("1", "cd")]
    assert [t.text for t in transcriber.transcribe([])] == []


def test_a_manifest_utterance_is_a_part_of_a_file(transcriber: Transcriber, tmp_path: Path) -> None:
    path = write_sound(tmp_path / "a.wav", AB + CD + AB)
    utterance = Utterance("u1", path, 0.16, 0.16, 16000, "", "")
    (transcript,) = transcriber.transcribe([utterance])
    assert (transcript.id, transcript.text, transcript.duration_s) == ("u1", "cd", pytest.approx(0.16))


def test_output_comes_before_the_input_ends(transcriber: Transcriber) -> None:
    endless = (sound(AB) for _ in itertools.count())
    first = list(itertools.islice(transcriber.transcribe(endless, batch_seconds=5.0), 300))
    assert {transcript.text for transcript in first} == {"ab"}


def test_the_first_text_comes_early(transcriber: Transcriber) -> None:
    read = 0

    def inputs() -> Iterator[np.ndarray]:
        nonlocal read
        for _ in range(1000):  # each 0.16 s
            read += 1
            yield sound(AB)

    texts = transcriber.transcribe(inputs(), batch_seconds=10.0)
    next(texts)
    assert read == 16  # 2.5 s, a sixteenth of a window
    assert sum(1 for _ in texts) == 999
    assert max(rows for rows, _ in transcriber.model.batches) == 62


def test_word_times_and_confidence(transcriber: Transcriber) -> None:
    (transcript,) = transcriber.transcribe(sound([0, 0, 2, 3, 3, 0, 4]))
    one, two = transcript.words
    assert (one.text, two.text) == ("ab", "c")
    assert (one.start_s, one.end_s) == (pytest.approx(0.08), pytest.approx(0.2))
    assert (two.start_s, two.end_s) == (pytest.approx(0.24), pytest.approx(0.28))
    assert one.confidence == pytest.approx(0.91, abs=1e-4)


def test_a_long_recording_is_cut_and_joined(transcriber: Transcriber) -> None:
    silence = [0] * 100  # 4 s
    (transcript,) = transcriber.transcribe(sound([*silence, *AB * 100, *silence, *FRENCH * 50, *silence, *CD * 100]))
    assert transcript.duration_s == pytest.approx(0.04 * (300 + 400 + 200 + 400))
    assert transcript.text == " ".join(["ab"] * 100 + ["éf g"] * 50 + ["cd"] * 100)
    assert len(transcript.segments) == 3
    assert transcript.segments[0].start_s == pytest.approx(3.8, abs=0.05)
    assert transcript.words[0].start_s == pytest.approx(4.0, abs=0.041)
    assert transcript.words[-1].end_s == pytest.approx(transcript.duration_s - 0.04, abs=0.041)
    times = [time for word in transcript.words for time in (word.start_s, word.end_s)]
    assert times == sorted(times)
    # 16 + 16 of 40 s are English; the short French part has a fifth of the weight.
    assert transcript.language == "en"
    assert transcript.language_probabilities["fr"] == pytest.approx(0.2 * 0.982 + 0.8 * 0.018, abs=0.01)
    assert transcript.reliability == pytest.approx(0.25 + 0.5 * 0.2, abs=0.01)
    assert all(samples <= 20 * 16000 for _, samples in transcriber.model.batches)


@pytest.mark.parametrize("frames", [1, 20, 1000])
def test_silence_never_reaches_the_model(transcriber: Transcriber, frames: int) -> None:
    (transcript,) = transcriber.transcribe(sound([0] * frames))
    assert (transcript.text, transcript.language, transcript.segments) == ("", "", [])
    assert transcript.language_probabilities == {}
    assert transcript.duration_s == pytest.approx(0.04 * frames)
    assert transcriber.model.batches == []


def test_a_very_short_sound_is_padded(transcriber: Transcriber) -> None:
    (transcript,) = transcriber.transcribe(sound([2])[:100])
    assert transcript.duration_s == 100 / 16000
    assert transcriber.model.batches == [(1, 1600)]
    assert all(word.end_s <= transcript.duration_s for word in transcript.words)


def test_a_given_language_is_used_and_checked(transcriber: Transcriber) -> None:
    (transcript,) = transcriber.transcribe(sound(AB), language="fr")
    assert transcript.language == "fr"
    assert transcript.language_probabilities["en"] > 0.9
    assert transcriber.model.languages_given == [[1]]
    with pytest.raises(MoleError, match=r"'de'.*en, fr"):
        transcriber.transcribe(sound(AB), language="de")


def test_unreadable_inputs_are_skipped_and_named(transcriber: Transcriber, tmp_path: Path) -> None:
    (tmp_path / "bad.wav").write_text("no sound")
    good = write_sound(tmp_path / "good.wav", AB)
    inputs = [tmp_path / "bad.wav", good, tmp_path / "missing.wav", np.full(9, np.nan, np.float32), good]
    assert [transcript.text for transcript in transcriber.transcribe(inputs)] == ["ab", "ab"]
    assert [name for name, _ in transcriber.failures] == [str(inputs[0]), str(inputs[2]), "3"]
    assert all("\n" not in reason for _, reason in transcriber.failures)
    assert [transcript.text for transcript in transcriber.transcribe(good)] == ["ab"]
    assert transcriber.failures == []


def test_import_needs_neither_lightning_nor_lhotse() -> None:
    code = (
        "import sys, mole_asr.transcribe.transcriber, mole_asr.transcribe.command as c;"
        "print([m for m in ('lightning', 'lhotse', 'jiwer', 'matplotlib', 'tensorboard') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stderr


def test_ngrams_of_the_language_correct_what_is_heard(transcriber: Transcriber) -> None:
    # The sound says "ab"; the texts of the language know only "ad" and are believed over everything.
    transcriber.decoder.ngrams = {"en": TokenNgram.count([[2, 5]] * 10**4, vocab_size=10)}
    assert [t.text for t in transcriber.transcribe([sound(AB)])] == ["ad"]
    french = [t.text for t in transcriber.transcribe([sound(FRENCH)])]
    transcriber.decoder.ngrams = {}
    assert [t.text for t in transcriber.transcribe([sound(FRENCH)])] == french, "a language without n-grams"
    transcriber.decoder.ngrams = {"en": TokenNgram.count([[2, 5]] * 10**4, vocab_size=10)}
    transcriber.decoder.beam = 0
    assert [t.text for t in transcriber.transcribe([sound(AB)])] == ["ab"]
