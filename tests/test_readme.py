"""What README.md promises is run: each ```bash block behind a line `<!-- test -->`, and the `make` targets it names."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from mole_asr.doctor import save_tiny_model

ROOT = Path(__file__).parents[1]
MARKED = re.compile(r"^<!-- test -->\n+```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """MODEL: an untrained model of en and fr; AUDIO: a second of noise; the commands of this Python are on PATH."""
    folder = tmp_path_factory.mktemp("readme")
    soundfile.write(folder / "noise.wav", np.random.default_rng(0).normal(0, 0.1, 16000), 16000)
    model = save_tiny_model(folder / "model")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "MODEL": str(model), "AUDIO": str(folder / "noise.wav")}


def test_commands(environment: dict[str, str], tmp_path: Path) -> None:
    """In order, in one folder, so that a block may use what an earlier one has written."""
    blocks = MARKED.findall(readme())
    assert blocks, "README.md has no block that is marked with <!-- test -->"
    for block in blocks:
        result = subprocess.run(
            ["bash", "-eu", "-o", "pipefail", "-c", block],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, f"{block}\n{result.stdout}\n{result.stderr}"


def test_every_mark_is_understood() -> None:
    """A mark with something else behind it would be passed over in silence."""
    text = readme()
    assert text.count("<!-- test -->") == len(MARKED.findall(text))


def test_make_targets_exist() -> None:
    named = set(re.findall(r"\bmake ([a-z]+)\b", "\n".join(re.findall(r"`[^`]+`|```.*?```", readme(), re.DOTALL))))
    assert {"demo", "test"} <= named
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert named <= set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))


def test_verbs_exist() -> None:
    from mole_asr.cli import VERBS

    code = "\n".join(re.findall(r"^```bash\n(.*?)^```$", readme(), re.MULTILINE | re.DOTALL))
    verbs = re.findall(r"^mole-asr ([a-z]+)(?: ([a-z]+))?", code, re.MULTILINE)
    unknown = [verb for verb in verbs if verb[0] not in VERBS and " ".join(verb) not in VERBS]
    assert not unknown
