"""The verbs as the command line runs them, and what a cut keeps."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mole_asr import cli
from mole_asr.convert.factor import factor
from mole_asr.convert.host import open_host
from mole_asr.convert.moefy import moefy
from mole_asr.convert.slicing import Cut, identity_error, output_error, slice_parts
from mole_asr.corpus.manifest import Manifest, write_manifest
from mole_asr.decode.ngram import NGRAM_FILE
from mole_asr.errors import MoleError
from mole_asr.text.policies import ExpertsConfig

# --- the command line


def run(*words: object) -> int:
    return cli.main([str(word) for word in words])


def test_a_language_model_goes_in_and_out(
    text_folder: Callable[..., Path], texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, options = text_folder(), ["--slices", "8", "--data", texts, "--test", texts, "--rows", "600"]
    assert run("convert", "moefy", folder, tmp_path / "moefied", *options) == 0
    shown = capsys.readouterr().out
    assert "blocks.1.feed_forward  2 of 8 slices of 4 neurons, swiglu, output error 0." in shown
    assert re.search(r"dense \d.* ms, dense in tiles .* ms, sliced .* ms: \d.* times as fast", shown)
    assert re.search(r"bits_per_byte \d\S* -> \d\S*; right 0\.\d+ -> 0\.\d+ \(", shown)
    assert run("generate", tmp_path / "moefied", "the", "--tokens", 5) == 0
    assert run("perplexity", tmp_path / "moefied", texts) == 0
    assert run("convert", "dense", tmp_path / "moefied", tmp_path / "dense") == 0
    for name in ("config.json", "languages.json", "model.safetensors"):
        assert (tmp_path / "dense" / name).read_bytes() == (folder / name).read_bytes()


def test_a_recogniser_goes_in_and_out(speech: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cuts, out = speech / "cuts.jsonl", tmp_path / "out"
    words = ["--slices", 4, "--data", cuts, "--test", cuts, "--rows", 200]
    assert (
        run("convert", "moefy", speech / "model", out / "a", *words, "--relu-steps", 2, "--split", "coactivation") == 0
    )
    assert "1 of 4 slices of 8 neurons, relu" in capsys.readouterr().out
    assert run("transcribe", out / "a" / "..", "--model", out / "a") == 1  # no recording there
    assert run("transcribe", speech / "0.wav", "--model", out / "a", "--output", out) == 0
    assert (out / "0.txt").exists()
    assert run("convert", "factor", speech / "model", out / "b", *words, "--steps", 2) == 0
    assert run("transcribe", speech / "0.wav", "--model", out / "b", "--output", out) == 0
    (out / "c").mkdir()
    (out / "c" / NGRAM_FILE).write_bytes(b"of another model")
    assert run("convert", "dense", out / "b", out / "c") == 0
    assert not (out / "c" / NGRAM_FILE).exists() and not (speech / "model" / NGRAM_FILE).exists()


def test_a_hugging_face_model_goes_in_and_out(
    huggingface_folder: Callable[[str], Path], texts: Path, tmp_path: Path
) -> None:
    folder = huggingface_folder("bert")
    words = ["--slices", "4", "--data", texts, "--test", texts, "--rows", "300"]
    assert run("convert", "moefy", folder, tmp_path / "a", *words, "--relu-steps", "2", "--lr", "1e-4") == 0
    assert run("convert", "factor", folder, tmp_path / "b", *words, "--steps", "2") == 0
    assert run("convert", "dense", tmp_path / "a", tmp_path / "c") == 0
    from transformers import AutoModelForMaskedLM

    dense = AutoModelForMaskedLM.from_pretrained(tmp_path / "c")
    ids = torch.arange(10)[None]
    host = open_host(tmp_path / "a")
    for layer in host.layers().values():
        layer.choose_router("oracle", 4)
    with torch.no_grad():
        torch.testing.assert_close(host.model(ids).logits, dense(ids).logits, atol=1e-4, rtol=0)
    assert dense.config.hidden_act == "relu"


def test_what_cannot_be_read_is_skipped_and_named(
    speech: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    utterances = list(Manifest(speech / "cuts.jsonl"))
    gone = [replace(each, audio_path=tmp_path / "gone.wav") for each in utterances]
    for name, chosen in (("holed", [gone[0], *utterances[1:]]), ("empty", gone)):
        write_manifest(chosen, tmp_path / f"{name}.jsonl")
    words = ["convert", "factor", speech / "model", tmp_path / "out", "--slices", 4, "--steps", 2, "--data"]
    assert run(*words, tmp_path / "holed.jsonl", "--test", tmp_path / "holed.jsonl") == 1
    head, line = capsys.readouterr().err.splitlines()[-2:]
    assert head == "1 skipped:" and line.startswith("  0: ") and "gone.wav" in line
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert run(*words, tmp_path / "empty.jsonl") == 1
    assert "empty.jsonl: no readable utterance; " in capsys.readouterr().err
    with pytest.raises(MoleError, match=r"holed\.jsonl: 0: .*gone\.wav"):  # a measurement
        open_host(speech / "model").read_all(str(tmp_path / "holed.jsonl"), 200, 0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["moefy", "MODEL", "MODEL", "--router", "centroid"], "is the old model"),
        (["moefy", "MODEL", "TEXTS", "--router", "centroid"], "texts.jsonl: is a file; give a folder"),
        (["factor", "MODEL", "OUT", "--data", "TEXTS", "--seed", "-1"], "--seed -1: must be from 0"),
        (["moefy", "MODEL", "OUT", "--data", "TEXTS", "--seed", str(2**70)], f"--seed {2**70}: must be from 0"),
        (["moefy", "MODEL", "OUT"], "--data: is missing"),
        (["moefy", "MODEL", "OUT", "--router", "oracle", "--relu-steps", "5"], "--data: is missing"),
        (["moefy", "MODEL", "OUT", "--router", "oracle", "--slices", "7"], "32 neurons cannot be cut into 7"),
        (["moefy", "MODEL", "OUT", "--router", "oracle", "--slices", "0"], "--slices 0: must be positive"),
        (["moefy", "MODEL", "OUT", "--router", "oracle", "--share", "1.5"], "--share 1.5: must be above 0"),
        (["moefy", "MODEL", "OUT", "--data", "nowhere.jsonl"], "nowhere.jsonl: cannot be read"),
        (
            ["moefy", "nowhere", "OUT", "--router", "oracle"],
            "nowhere/config.json: cannot be read (No such file",
        ),
        (["moefy", "MODEL", "OUT", "--data", "TEXTS", "--relu-steps", "-1"], "--relu-steps -1: must be at least 0"),
        (["moefy", "MODEL", "OUT", "--data", "TEXTS", "--tune-steps", "-2"], "--tune-steps -2: must be at least 0"),
        (["factor", "MODEL", "OUT", "--data", "TEXTS", "--steps", "-3"], "--steps -3: must be at least 0"),
        (["moefy", "MODEL", "OUT", "--data", "TEXTS", "--rows", "0"], "--rows 0: must be at least 1"),
        (["moefy", "MODEL", "OUT", "--data", "TEXTS", "--lr", "-1"], "--lr -1: must be above 0"),
        (["factor", "MODEL", "OUT", "--data", "TEXTS", "--rows", "0"], "--rows 0: must be at least 1"),
        (["factor", "MODEL", "OUT", "--data", "TEXTS", "--router-lr", "0"], "--router-lr 0: must be above 0"),
        (["factor", "MODEL", "OUT", "--data", "TEXTS", "--lr", "1e30", "--steps", "9"], "give a lower learning rate"),
        (["moefy", "MODEL", "OUT", "--router", "oracle", "--device", "abacus"], "--device abacus: cannot be used here"),
        (["dense", "MODEL", "OUT"], "has no slices; it is dense already"),
    ],
)
def test_mistakes_are_named_in_one_line(
    words: list[str],
    message: str,
    text_folder: Callable[..., Path],
    texts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"MODEL": str(text_folder()), "OUT": str(tmp_path / "out"), "TEXTS": str(texts)}
    assert run("convert", *(places.get(word, word) for word in words)) == 1
    shown = capsys.readouterr().err.strip()
    assert message in shown and "\n" not in shown
    assert not (tmp_path / "out").exists()


def test_what_is_sliced_is_not_sliced_again(text_folder: Callable[..., Path], texts: Path, tmp_path: Path) -> None:
    moefy(str(text_folder()), str(tmp_path / "a"), router="centroid", slices=4)
    with pytest.raises(MoleError, match=r"has no dense feed-forward part to cut; .* undoes the cut"):
        moefy(str(tmp_path / "a"), str(tmp_path / "b"), router="centroid")
    with pytest.raises(MoleError, match=r"has no dense feed-forward part to cut; .* undoes the cut"):
        factor(str(tmp_path / "a"), str(tmp_path / "b"), data=str(texts))
    with pytest.raises(MoleError, match="has no dense feed-forward part to cut; its layers have experts"):
        moefy(str(text_folder("experts", experts=ExpertsConfig("top_k"))), str(tmp_path / "b"), router="centroid")


@pytest.mark.gpu
def test_the_verbs_run_on_a_gpu(text_folder: Callable[..., Path], texts: Path, speech: Path, tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    for kind, folder, data in (("text", text_folder(), texts), ("speech", speech / "model", speech / "cuts.jsonl")):
        options = ["--data", data, "--test", data, "--rows", 300, "--slices", 4, "--device", "cuda"]
        steps = ["--relu-steps", 2, "--tune-steps", 2, "--split", "coactivation"]
        assert run("convert", "moefy", folder, tmp_path / f"{kind}-moefied", *options, *steps) == 0
        assert run("convert", "factor", folder, tmp_path / f"{kind}-factored", *options, "--steps", 2) == 0
        assert all(open_host(path, "cuda").layers() for path in tmp_path.glob(f"{kind}-*"))


# --- identity, and how much is lost


def test_the_identity_check_notices_a_wrong_neuron(text_folder: Callable[..., Path]) -> None:
    host = open_host(text_folder())
    part = host.parts()["blocks.0.feed_forward"]
    layer = slice_parts({"a": part}, Cut("random", 4, 1, "oracle"))["a"]
    assert identity_error(part, layer) < 1e-12
    with torch.no_grad():
        layer.experts.w1_EFD[0, 0, 0] += 1e-3
    assert identity_error(part, layer) > 1e-6


def test_more_slices_and_the_oracle_lose_less(text_folder: Callable[..., Path], texts: Path) -> None:
    host = open_host(text_folder(activation="relu"))
    rows = host.record(host.read(str(texts), 400, 0))
    name, part = next(iter(host.parts().items()))
    layer = slice_parts({name: part}, Cut("clusters", 8, 1, "oracle"), rows)[name]
    errors = []
    for active in (1, 2, 4, 8):
        layer.choose_router("oracle", active)
        errors.append(output_error(part, layer, rows[name]))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-5
    layer.choose_router("oracle", 2)
    best = output_error(part, layer, rows[name])
    layer.choose_router("linear", 2)
    assert best < errors[0] and best < output_error(part, layer, rows[name])
