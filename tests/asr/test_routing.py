import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from mole_asr.asr.routing import hear_languages
from mole_asr.corpus.manifest import Manifest, Utterance, write_manifest
from mole_asr.doctor import save_tiny_model
from mole_asr.score.report import report

DURATIONS_S = {"short": 1.0, "fitting": 3.0, "long": 9.0}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    noise_S = np.random.default_rng(0).normal(0, 0.1, 10 * 16000)
    soundfile.write(tmp_path / "noise.wav", noise_S, 16000)
    wav = tmp_path / "noise.wav"
    write_manifest(
        (Utterance(id, wav, 0.5, s, 16000, "salut", "fr", num_samples=160000) for id, s in DURATIONS_S.items()),
        tmp_path / "ref.jsonl",
    )
    return tmp_path / "ref.jsonl"


def test_every_frame_has_a_posterior(model: Path, reference: Path) -> None:
    routing = hear_languages(model, Manifest(reference)[1])
    assert routing.languages == ["en", "fr"] and (routing.id, routing.text) == ("fitting", "salut")
    assert len(routing.evidence_TN) * routing.frame_shift_s == pytest.approx(3.0, abs=0.1)
    np.testing.assert_allclose(routing.evidence_TN.sum(1), 1, atol=1e-5)
    assert routing.reliability is not None and 0 < routing.reliability <= 1


def test_only_the_utterance_is_heard(model: Path, reference: Path, tmp_path: Path) -> None:
    whole = Manifest(reference)[1]
    audio_S, _ = soundfile.read(whole.audio_path)
    soundfile.write(tmp_path / "cut.wav", audio_S[8000 : 8000 + 48000], 16000)
    cut = Utterance("cut", tmp_path / "cut.wav", 0.0, 3.0, 16000, "", "")
    found, expected = (hear_languages(model, utterance).evidence_TN for utterance in (whole, cut))
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_the_report_draws_the_longest_that_fits(model: Path, reference: Path, tmp_path: Path) -> None:
    report(reference, reference, tmp_path / "out", model=model)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Routing of one utterance" in page and "fitting, reliability" in page


def test_without_a_picture_there_is_a_page(
    model: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report(reference, reference, tmp_path / "out", model=tmp_path / "none")
    (tmp_path / "noise.wav").unlink()
    report(reference, reference, tmp_path / "out", model=model)
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 2 and "none/config.json" in warnings[0] and "noise.wav" in warnings[1]
    assert "Routing of one" not in (tmp_path / "out" / "report.html").read_text()
    assert (tmp_path / "out" / "report.json").exists()


def test_a_report_without_a_picture_needs_no_torch(reference: Path, tmp_path: Path) -> None:
    code = f"""
import sys
from mole_asr.score.report import report
report({str(reference)!r}, {str(reference)!r}, {str(tmp_path / "out")!r})
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
