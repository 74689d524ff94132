import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from mole_asr.asr.routing import routing_picture
from mole_asr.corpus.manifest import Manifest, Utterance, write_manifest
from mole_asr.doctor import save_tiny_model
from mole_asr.errors import MoleError
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
    picture = routing_picture(model, Manifest(reference)[1])
    evidence_TN = np.array(picture["evidence"])
    assert picture["languages"] == ["en", "fr"] and (picture["id"], picture["text"]) == ("fitting", "salut")
    assert len(evidence_TN) * picture["frame_shift_s"] == pytest.approx(3.0, abs=0.1)
    np.testing.assert_allclose(evidence_TN.sum(1), 1, atol=1e-5)
    assert 0 < picture["reliability"] <= 1
    json.dumps(picture)


def test_only_the_utterance_is_heard(model: Path, reference: Path, tmp_path: Path) -> None:
    whole = Manifest(reference)[1]
    audio_S, _ = soundfile.read(whole.audio_path)
    soundfile.write(tmp_path / "cut.wav", audio_S[8000 : 8000 + 48000], 16000)
    cut = Utterance("cut", tmp_path / "cut.wav", 0.0, 3.0, 16000, "", "")
    found, expected = (np.array(routing_picture(model, utterance)["evidence"]) for utterance in (whole, cut))
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_the_report_draws_the_longest_that_fits(model: Path, reference: Path, tmp_path: Path) -> None:
    report(reference, reference, tmp_path / "out", model=model)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Routing of one utterance" in page and "fitting, reliability" in page


def test_no_model_folder(reference: Path, tmp_path: Path) -> None:
    with pytest.raises(MoleError, match="none"):
        report(reference, reference, tmp_path / "out", model=tmp_path / "none")


def test_a_report_without_a_picture_needs_no_torch(reference: Path, tmp_path: Path) -> None:
    code = f"""
import sys
from mole_asr.score.report import report
report({str(reference)!r}, {str(reference)!r}, {str(tmp_path / "out")!r})
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
