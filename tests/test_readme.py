"""What README.md promises is run, and nothing in it waits for its figures.

A ```bash or ```python block behind a line `<!-- test -->` is run. Of a ```bash block behind `<!-- test: parse -->` the
`mole-asr fit` commands are run with `--print_config`: that checks every key and value and trains nothing.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from mole_asr.cli import VERBS
from mole_asr.corpus.text_tokenizer import train_tokenizer
from mole_asr.data_prep.folder import prepare
from mole_asr.doctor import save_tiny_model

ROOT = Path(__file__).parents[1]
MARKED = re.compile(r"^<!-- test(: parse)? -->\n```(bash|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def record(folder: Path, count: int, words: list[str]) -> None:
    """Synthetic recordings: a tone each, with some of the words beside it."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(count):
        tone_S = 0.1 * np.sin(2 * np.pi * rng.uniform(200, 800) * np.arange(3200) / 16000)
        soundfile.write(folder / f"{number}.wav", tone_S, 16000)
        (folder / f"{number}.txt").write_text(" ".join(rng.choice(words, 20)), encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the blocks find: recordings, manifests and tokenizer of the demo, its model (untrained), `talk.m4a`."""
    folder = tmp_path_factory.mktemp("readme")
    syllables = [a + b for a in "bcčdhjklmnprřsšt" for b in "aeiouý"]
    rng = np.random.default_rng(1)
    words = ["".join(rng.choice(syllables, 3)) for _ in range(400)]
    record(folder / "recordings", 80, words)
    for language in ("en", "fr"):
        record(folder / "prompts" / language, 20, ["abc", "bcd", "cde", "def", "efg"])
    prepare(folder / "prompts", folder / "data" / "prompts5")
    demo = folder / "data" / "prompts5"
    train_tokenizer(demo / "cuts_train.jsonl", demo / "tokenizer", byte_fallback=False, model_type="char")
    save_tiny_model(folder / "runs" / "prompts5" / "model")
    noise_S = np.random.default_rng(0).normal(0, 0.1, 16000)
    soundfile.write(folder / "talk.m4a", noise_S, 16000, format="WAV")  # what is inside decides, not the name
    return folder


def run(folder: Path, *command: str) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    shown = subprocess.run(command, cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    assert shown.returncode == 0, f"{command[-1]}\n{shown.stdout}\n{shown.stderr}"


def test_blocks(folder: Path) -> None:
    """In order, in one folder, so that a block may use what an earlier one has written."""
    blocks = MARKED.findall(readme())
    assert {(bool(parse), language) for parse, language, _ in blocks} == {
        (False, "bash"),
        (True, "bash"),
        (False, "python"),
    }
    for parse, language, code in blocks:
        if language == "python":
            run(folder, sys.executable, "-c", code)
            continue
        if parse:
            commands = [line for line in code.replace("\\\n", " ").splitlines() if line.startswith("mole-asr fit ")]
            assert commands
            code = "\n".join(f"{command} --print_config" for command in commands)
        run(folder, "bash", "-eu", "-o", "pipefail", "-c", code)


def test_every_mark_is_understood() -> None:
    """A mark with something else behind it would be passed over in silence."""
    assert readme().count("<!-- test") == len(MARKED.findall(readme()))


def test_no_figure_is_missing() -> None:
    assert "RESULT_" not in readme()


def test_make_targets_exist() -> None:
    named = set(re.findall(r"\bmake ([a-z]+)\b", "\n".join(re.findall(r"`[^`]+`|```.*?```", readme(), re.DOTALL))))
    assert {"demo", "test"} <= named
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert named <= set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))


def test_verbs_exist() -> None:
    code = "\n".join(re.findall(r"^```bash\n(.*?)^```$", readme(), re.MULTILINE | re.DOTALL))
    verbs = re.findall(r"^mole-asr ([a-z]+)(?: ([a-z]+))?", code, re.MULTILINE)
    unknown = [verb for verb in verbs if verb[0] not in VERBS and " ".join(verb) not in VERBS]
    assert not unknown


def test_the_table_names_the_function_of_every_verb() -> None:
    rows = dict(re.findall(r"^\| `([a-z0-9 ]+)` \| `(mole_asr[\w.]+)` \|$", readme(), re.MULTILINE))
    assert rows == {name: verb.function.replace(":", ".") for name, verb in VERBS.items()}
