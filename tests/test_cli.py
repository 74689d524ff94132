"""The command line: what is imported, how bad input is refused, exit codes. Recordings here are synthetic."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from mole_asr import cli
from mole_asr.asr.checkpoint import save_model
from mole_asr.asr.model import EncoderConfig, MoleModel
from mole_asr.corpus.manifest import Manifest, Utterance, write_manifest
from mole_asr.corpus.text_tokenizer import TextTokenizer, train_tokenizer

HEAVY = {"torch", "lightning", "numpy", "jsonargparse", "matplotlib", "sentencepiece", "jiwer", "lhotse", "av"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`a.wav`, `b.wav`, `cuts.jsonl` with both, `tokenizer/`, and `model/` with untrained weights."""
    folder = tmp_path_factory.mktemp("cli")
    rng = np.random.default_rng(0)
    utterances = []
    for name, language in (("a", "de"), ("b", "en")):
        soundfile.write(folder / f"{name}.wav", 0.1 * rng.standard_normal(16000), 16000)
        path, text = folder / f"{name}.wav", "abba cab"
        utterances.append(Utterance(name, path, 0.0, 1.0, 16000, text, language, num_samples=16000))
    write_manifest(utterances, folder / "cuts.jsonl")
    train_tokenizer(folder / "cuts.jsonl", folder / "tokenizer", 20, byte_fallback=False, model_type="char")
    tokenizer = TextTokenizer(folder / "tokenizer")
    torch.manual_seed(0)
    config = EncoderConfig(
        d_model=16,
        d_ff=16,
        num_blocks=2,
        num_mole_blocks=1,
        language_tokenizer_block=1,
        num_heads=2,
        kernel_size=5,
        num_mels=20,
        intermediate_ctc_blocks=(),
    )
    save_model(MoleModel(config, ["de", "en"], tokenizer.vocab_size), tokenizer, folder / "model")
    (folder / "broken.wav").write_bytes(b"RIFF, but nothing behind it")
    return folder


@pytest.fixture(autouse=True)
def in_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no test depends on where it is started."""
    monkeypatch.chdir(folder)


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)


# --- what is imported


def test_help_imports_nothing_heavy() -> None:
    shown = python("import sys, mole_asr.cli as c; c.main(['--help']); print(*sys.modules, file=sys.stderr)")
    assert shown.stdout.startswith("usage: mole-asr VERB")
    assert all(f"  {name} " in shown.stdout for name in cli.VERBS)
    modules = {name.split(".")[0] for name in shown.stderr.split()}
    assert "mole_asr" in modules
    assert not modules & HEAVY


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("mole_asr", HEAVY),
        ("mole_asr.score.score", {"torch", "lightning", "matplotlib"}),
        ("mole_asr.score.report", {"torch", "lightning"}),
        ("mole_asr.transcribe.command", {"torch", "lightning", "lhotse"}),
        ("mole_asr.transcribe.transcriber, mole_asr.asr.checkpoint", {"lightning", "lhotse", "matplotlib"}),
        ("mole_asr.corpus.text_tokenizer", {"torch", "lightning"}),
        ("mole_asr.data_prep.prompts", {"torch", "lightning", "lhotse"}),
        ("mole_asr.data_prep.folder", {"lightning", "lhotse"}),
        ("mole_asr.asr.fit", {"lhotse", "jiwer"}),
        ("mole_asr.moe", {"lightning", "sentencepiece", "torchaudio", "jsonargparse"}),
    ],
)
def test_no_verb_imports_what_it_does_not_need(module: str, absent: set[str]) -> None:
    modules = python(f"import sys, {module}; print(*sys.modules)").stdout.split()
    assert not {name.split(".")[0] for name in modules} & absent


def test_the_package_offers_its_functions() -> None:
    import mole_asr
    from mole_asr.transcribe.transcriber import load

    assert mole_asr.load is load
    assert all(hasattr(mole_asr, name) for name in mole_asr.__all__)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = mole_asr.nonsense


# --- verbs


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Exit status, standard output, standard error."""
    capsys.readouterr()
    try:
        status = cli.main(list(words))
    except SystemExit as exit:
        status = int(exit.code or 0)
    shown = capsys.readouterr()
    return status, shown.out, shown.err


@pytest.mark.parametrize("group", ["prepare", "tokenizer"])
def test_a_group_of_verbs_has_help(capsys: pytest.CaptureFixture[str], group: str) -> None:
    status, out, _ = run(capsys, group, "--help")
    assert status == 0 and out.startswith("usage:")
    assert [name for name in cli.VERBS if f"  {name} " in out] == [n for n in cli.VERBS if n.startswith(group)]


@pytest.mark.parametrize("verb", list(cli.VERBS))
def test_every_verb_has_help(capsys: pytest.CaptureFixture[str], verb: str) -> None:
    status, out, _ = run(capsys, *verb.split(), "--help")
    assert status == 0
    assert "usage:" in out


def test_version_and_no_verb(capsys: pytest.CaptureFixture[str]) -> None:
    from mole_asr import __version__

    assert run(capsys, "--version") == (0, f"{__version__}\n", "")
    status, out, _ = run(capsys)
    assert status == 2 and "usage" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trancribe", "x.wav"], "unknown verb 'trancribe'; did you mean 'transcribe'?"),
        (["fti"], "did you mean 'fit'?"),
        (["xyzzy"], "unknown verb 'xyzzy'; `mole-asr --help` lists the verbs"),
        (["prepare"], "give one of: prepare prompts, prepare folder"),
        (["prepare", "pronto"], "give one of: prepare prompts, prepare folder"),
        (["--bogus"], "unknown verb '--bogus'"),
    ],
)
def test_an_unknown_verb_gets_a_suggestion(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    status, out, err = run(capsys, *words)
    assert (status, out) == (2, "")
    assert message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["score", "cuts.jsonl"], "hypothesis"),
        (["score", "cuts.jsonl", "cuts.jsonl", "--bye", "language"], "--bye"),
        (["score", "cuts.jsonl", "cuts.jsonl", "--by", "colour"], "colour"),
        (["transcribe", "a.wav"], "model"),
        (["transcribe", "a.wav", "--model", "m", "--precision", "16"], "one of 32-true, bf16-mixed"),
        (["score", "cuts.jsonl", "cuts.jsonl", "more cuts.jsonl"], "more cuts.jsonl: is too much"),
        (["transcribe", "a.wav", "--modle", "m"], "did you mean --model?"),
        (["tokenizer", "train", "cuts.jsonl", "out", "--vocab-size", "many"], "many"),
    ],
)
def test_a_wrong_command_line_gives_status_2(
    capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    status, out, err = run(capsys, *words)
    assert (status, out) == (2, "")
    assert message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "parts"),
    [
        ("prepare prompts out --languages [xx]", ["'xx'", "en, es, fr, it, ru"]),
        ("prepare prompts out --source nowhere", ["nowhere"]),
        ("prepare folder nowhere out", ["nowhere"]),
        ("tokenizer train nowhere.jsonl out", ["nowhere.jsonl"]),
        ("tokenizer train a.wav out", ["a.wav"]),
        ("tokenizer train cuts.jsonl out --vocab-size 3", ["vocab_size=3", "give at least"]),
        ("tokenizer extend nowhere cuts.jsonl out", ["nowhere"]),
        ("fit --output out --data.train_manifest nowhere.jsonl --data.valid_manifest cuts.jsonl", ["data.tokenizer"]),
        ("fit --config nowhere.yaml", ["nowhere.yaml"]),
        ("fit --output out --colour red", ["unknown key colour"]),
        ("transcribe a.wav --model nowhere", ["nowhere/config.json", "mole-asr fit"]),
        ("transcribe a.wav --model model --language english", ["'english'", "de, en"]),
        ("transcribe a.wav --model model --format docx", ["docx", "txt, json"]),
        ("transcribe nowhere.jsonl --model model", ["nowhere.jsonl"]),
        ("transcribe a.wav --model model --output a.wav --format srt", ["output a.wav: is a file"]),
        ("transcribe cuts.jsonl --model model --output clash", ["clash/cuts.jsonl: is a folder"]),
        ("transcribe a.wav --model model --batch-seconds -1", ["--batch-seconds -1: must be positive"]),
        ("transcribe empty --model model", ["empty", "no audio file"]),
        ("score nowhere.jsonl cuts.jsonl", ["nowhere.jsonl"]),
        ("score cuts.jsonl nowhere.jsonl", ["nowhere.jsonl"]),
        ("score cuts.jsonl cuts.jsonl --language English", ["English"]),
        ("score cuts.jsonl cuts.jsonl --against nowhere.jsonl", ["nowhere.jsonl"]),
        ("report cuts.jsonl nowhere.jsonl out", ["nowhere.jsonl"]),
        ("report cuts.jsonl cuts.jsonl out --logs nowhere", ["nowhere"]),
        ("report cuts.jsonl cuts.jsonl out --logs a.wav", ["a.wav is no table"]),
        ("score cuts.jsonl cuts.jsonl --seed -1", ["--seed -1: must be from 0"]),
        ("bench moe --device tpu", ["--device tpu: cannot be used here"]),
        ("prepare words out --languages", ["--languages: name at least one"]),
    ],
)
def test_bad_input_gives_one_line_and_status_1(
    capsys: pytest.CaptureFixture[str], folder: Path, command: str, parts: list[str]
) -> None:
    (folder / "empty").mkdir(exist_ok=True)
    (folder / "clash/cuts.jsonl").mkdir(parents=True, exist_ok=True)
    status, out, err = run(capsys, *command.split())
    assert (status, out) == (1, "")
    assert err.count("\n") == 1 and err.startswith("mole-asr ")
    verb = next(name for name in cli.VERBS if command.startswith(f"{name} "))
    assert err.startswith(f"mole-asr {verb}: ")
    assert all(part in err for part in parts), err


def test_no_line_of_a_traceback_and_status_1_from_a_process(folder: Path) -> None:
    command = [sys.executable, "-m", "mole_asr.cli", "score", "nowhere", "cuts.jsonl"]
    shown = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert (shown.returncode, shown.stdout) == (1, "")
    assert shown.stderr.startswith("mole-asr score: ") and shown.stderr.count("\n") == 1


def test_a_broken_recording_among_good_ones(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["--model", "model", "--format", "json", "--output", str(tmp_path)]
    status, out, err = run(capsys, "transcribe", "a.wav", "broken.wav", "gone.wav", "b.wav", *words)
    assert status == 1
    assert [line.split(" ")[0] for line in out.splitlines()] == ["a.wav", "b.wav"]
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", "b.json"}
    assert "2 recordings" in err and "2 skipped" in err and "broken.wav" in err and "gone.wav" in err
    assert "Traceback" not in err
    assert run(capsys, "transcribe", "a.wav", "b.wav", *words)[0] == 0


def test_dashes_or_underscores(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    results = []
    for words in (["--vocab-size=20", "--model-type", "char"], ["--vocab_size", "20", "--model_type=char"]):
        output = tmp_path / words[0].strip("-=20")
        status, _, err = run(
            capsys, "tokenizer", "train", "cuts.jsonl", str(output), *words, "--byte-fallback", "false"
        )
        assert (status, err) == (0, "")
        results.append((output / "tokenizer.model").read_bytes())
    assert results[0] == results[1] == Path("tokenizer/tokenizer.model").read_bytes()


@pytest.mark.parametrize(
    ("words", "values"),
    [
        ("out --names en es", {"names": ["en", "es"]}),
        ("out --names en,es --flag", {"names": ["en", "es"], "flag": True}),
        ("out --names en --flag false", {"names": ["en"], "flag": False}),
        ("--flag out --names=no", {"names": ["no"], "flag": True}),
        ("""out --names ["no","es"] --flag=true""", {"names": ["no", "es"], "flag": True}),
        ("out --names [en, no]", {"names": ["en", "no"]}),
        ("out --one no", {"one": "no"}),
    ],
)
def test_lists_and_flags_as_one_types_them(words: str, values: dict[str, object]) -> None:
    def function(
        output: str, names: Sequence[str] = (), flag: bool = False, one: str | None = None
    ) -> dict[str, object]:
        return {"output": output, "names": names, "flag": flag, "one": one}

    found = cli._call(function, cli.Verb("", ""), words.split(), "mole-asr")
    assert found == {"output": "out", "names": (), "flag": False, "one": None, **values}


def test_values_with_dashes_stay_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    _, _, err = run(capsys, "score", "no-such-file", "cuts.jsonl", "--output", "a-b.json")
    assert "no-such-file" in err


def test_what_stands_behind_two_dashes_is_no_option() -> None:
    def function(prompt: str, a_flag: bool = False) -> str:
        return f"{prompt} {a_flag}"

    found = cli._call(function, cli.Verb("", ""), ["--a-flag", "--", "--well-known thing"], "mole-asr")
    assert found == "--well-known thing True"


# --- score and report


def test_score_prints_a_table_and_writes_the_figures(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["score", "cuts.jsonl", "cuts.jsonl", "--by", "language", "--output", str(tmp_path / "score.json")]
    status, out, err = run(capsys, *words)
    assert (status, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()[:3]] == ["language", "de", "en"]
    figures = json.loads((tmp_path / "score.json").read_text())
    assert figures["macro"]["cer"] == figures["macro"]["wer"] == 0


def test_score_of_plain_texts_against_another_system(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for name, text in (("ref", "a b c d"), ("good", "a b c d"), ("bad", "a x y d")):
        (tmp_path / f"{name}.txt").write_text(f"{text}\n")
    words = [str(tmp_path / "ref.txt"), str(tmp_path / "bad.txt"), "--against", str(tmp_path / "good.txt")]
    status, out, _ = run(capsys, "score", *words, "--language", "en")
    assert status == 0
    assert "50.0" in out


def test_transcribe_score_and_report(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, out, err = run(capsys, "transcribe", "cuts.jsonl", "--model", "model", "--output", str(tmp_path))
    assert status == 0 and len(out.splitlines()) == 2 and "2 recordings" in err
    found = str(tmp_path / "cuts.jsonl")
    words = ["report", "cuts.jsonl", found, str(tmp_path / "report"), "--seconds", "3", "--model", "model"]
    status, out, err = run(capsys, *words)
    assert (status, err) == (0, "")
    assert out.splitlines()[1].split()[0] == "de"
    figures = json.loads((tmp_path / "report" / "report.json").read_text())
    assert set(figures["languages"]) == {"de", "en"} and figures["seconds"] == 3
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"report.json", "report.html"}


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_interrupted_gives_130(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mole_asr.score.score.read_sentences", interrupt)
    status, _, err = run(capsys, "score", "cuts.jsonl", "cuts.jsonl")
    assert status == 130 and err == "mole-asr score: interrupted\n"


def test_a_file_that_cannot_be_written_gives_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    words = ["score", "cuts.jsonl", "cuts.jsonl", "--output", str(tmp_path / "file" / "score.json")]
    status, out, err = run(capsys, *words)
    assert (status, out) == (1, "")
    assert err == f"mole-asr score: {tmp_path / 'file'}: File exists\n"


@pytest.mark.parametrize("words", ["score cuts.jsonl cuts.jsonl", "--help"])
def test_a_reader_that_goes_away_ends_the_command_in_silence(folder: Path, words: str) -> None:
    command = f"{sys.executable} -m mole_asr.cli {words} | true; echo ${{PIPESTATUS[0]}}"
    shown = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=folder)
    assert (shown.stdout, shown.stderr) == ("141\n", "")


@pytest.mark.parametrize(
    ("behind", "status", "end"), [(">&-", 0, ""), (">/dev/full", 1, ": [Errno 28] No space left on device\n")]
)
def test_standard_output_may_be_closed_or_full(folder: Path, behind: str, status: int, end: str) -> None:
    for words in ("score cuts.jsonl cuts.jsonl", "--help"):
        command = f"{sys.executable} -m mole_asr.cli {words} {behind}"
        shown = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=folder)
        assert shown.returncode == status and shown.stderr.endswith(end) and shown.stderr.count("\n") == len(end[:1])


def test_letters_that_standard_output_does_not_take_are_named() -> None:
    code = "from mole_asr import cli, doctor; doctor.doctor = lambda: 'é'; raise SystemExit(cli.main(['doctor']))"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (shown.returncode, shown.stdout, shown.stderr.count("\n")) == (1, "", 1)
    assert shown.stderr.startswith("mole-asr doctor: '\\xe9' cannot be written as ascii; with PYTHONIOENCODING=utf-8")


# --- verbs that are tested at length elsewhere, from the outside


def test_prepare_folder_with_a_broken_recording(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a", "b", "broken"):
        (tmp_path / "in" / f"{name}.wav").write_bytes((folder / f"{name}.wav").read_bytes())
        (tmp_path / "in" / f"{name}.txt").write_text("Abba Cab!")
    words = ["prepare", "folder", str(tmp_path / "in"), str(tmp_path / "out"), "--language", "en"]
    status, out, err = run(capsys, *words)
    assert status == 1 and "broken.wav" in out + err and "Traceback" not in err
    manifests = [Manifest(tmp_path / "out" / f"cuts_{split}.jsonl") for split in ("train", "dev", "test")]
    texts = [utterance.text for manifest in manifests for utterance in manifest]
    assert texts == ["abba cab", "abba cab"]


def test_fit_without_data_ends_with_one_line(tmp_path: Path) -> None:
    data = ["--data.train_manifest=cuts.jsonl", "--data.valid_manifest=cuts.jsonl", "--data.tokenizer=tokenizer"]
    words = [*data, f"--output={tmp_path}", "--trainer.accelerator=cpu", "--data.max_seconds=0.5"]
    command = [sys.executable, "-m", "mole_asr.cli", "fit", *words, "--trainer.max_epochs=1"]
    shown = subprocess.run(command, capture_output=True, text=True)
    assert shown.returncode == 1
    assert shown.stderr.splitlines()[-1].startswith("mole-asr fit: cuts.jsonl: nothing to train on: 0 utterances used")
    assert "Traceback" not in shown.stderr and "Warning" not in shown.stderr
