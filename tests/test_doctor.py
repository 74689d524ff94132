import builtins
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from mole_asr import cli, doctor
from mole_asr.transcribe.transcriber import load


@pytest.fixture(scope="module")
def diagnosis() -> doctor.Diagnosis:
    return doctor.doctor()


def test_here_all_works(diagnosis: doctor.Diagnosis) -> None:
    assert diagnosis.failures == []
    found = {check.name: check.found for check in diagnosis.checks}
    assert found["python"].startswith(sys.version.split()[0])
    assert {"torch", "torchaudio", "lightning", "soundfile", "av", "protobuf", "round trip", "threads"} <= found.keys()
    assert "pytest" not in found  # extras are not needed
    assert "FLAC" in found["audio: soundfile"] and "g722" in found["audio: PyAV"]
    assert "All that is needed works." in str(diagnosis)


def hide(monkeypatch: pytest.MonkeyPatch, hidden: str, error: type[Exception]) -> None:
    """Makes `import hidden` raise."""
    real = builtins.__import__

    def importer(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == hidden:
            raise error(f"lib{hidden}.so.7: cannot open\nshared object file")
        return real(name, *args, **kwargs)

    for name in [name for name in sys.modules if name.split(".")[0] == hidden]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", importer)
    monkeypatch.setattr(doctor, "import_module", lambda name: importer(name))


@pytest.mark.parametrize("error", [ImportError, OSError])
def test_a_broken_package_is_told_and_the_rest_still_checked(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    hide(monkeypatch, "av", error)
    found = doctor.doctor()
    assert any(line.startswith("av: cannot be imported") and "pip install 'av" in line for line in found.failures)
    assert all("\n" not in line for line in found.failures)
    assert {check.name: check.problem for check in found.checks}["audio: soundfile"] is None
    assert "Something is missing." in str(found)


def test_a_missing_package_and_a_wrong_version(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["no-such-package>=3", "numpy<0.1", "pytest>=8; extra == 'dev'"]
    monkeypatch.setattr(doctor, "requires", lambda name: wanted)
    assert doctor.Diagnosis(list(doctor._packages())).failures == [
        "no-such-package: not installed; pip install 'no-such-package>=3'",
        f"numpy: {doctor.version('numpy')} does not fit; pip install 'numpy<0.1'",
    ]


def test_without_apt_all_else_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    found = doctor.Diagnosis(list(doctor._apt()))
    assert not found.failures and "--source" in found.warnings[0]


def test_exit_code_and_text(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    bad = doctor.Diagnosis([doctor.Check("x", "", "not there; get it")])
    monkeypatch.setattr(doctor, "doctor", lambda: bad)
    assert cli.main(["doctor"]) == 1
    assert re.search(r"^x +missing$", capsys.readouterr().out, re.MULTILINE)


def test_the_tiny_model_is_the_same_every_time(tmp_path: Path) -> None:
    one, other = (doctor.save_tiny_model(tmp_path / name) / "model.safetensors" for name in ("one", "other"))
    assert one.read_bytes() == other.read_bytes()
    assert load(one.parent, "cpu").model.languages == ["en", "fr"]
