"""The verbs on a saved model: writing with the cache is writing without, and the table is that of the meter."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mole_asr.cli import main
from mole_asr.errors import MoleError
from mole_asr.text.checkpoint import LanguageModel, load_text_model, save_text_model
from mole_asr.text.evaluate import evaluate
from mole_asr.text.generate import generate, write_on
from mole_asr.text.model import TextModel
from mole_asr.text.perplexity import perplexity
from mole_asr.text.vocabulary import load_vocabulary

from .conftest import POLICIES

Make = Callable[..., TextModel]


@pytest.fixture
def folder(make_model: Make, tmp_path: Path) -> Path:
    model = make_model(POLICIES["adaptive"], vocab_size=258)
    with torch.no_grad():
        model.norm.weight.normal_()  # else the likeliest token is always the last one again
    save_text_model(LanguageModel(model.float(), load_vocabulary("bytes"), 8, ["en"]), tmp_path / "model")
    return tmp_path / "model"


def slow_choice(language_model: LanguageModel, ids: list[int], window: int) -> list[int]:
    """Greedy, everything computed anew at each step; what is looked back at is cut as `write_on` says."""
    start = max(0, len(ids) - window)
    for _ in range(14):
        if len(ids) - start > window:
            start = len(ids) - window // 2
        logits = language_model.model(torch.tensor([ids[start:]])).logits_BTV[0, -1]
        ids = [*ids, int(logits[:257].argmax())]
    return ids


@pytest.mark.parametrize("prompt", ["", "ab", "a longer prompt than a window"])
def test_writing_with_a_cache_is_writing_without(folder: Path, prompt: str) -> None:
    language_model = load_text_model(folder)
    ids = [256, *prompt.encode()]
    found = write_on(language_model, ids, tokens=14, temperature=0, top_k=1, seed=0)
    assert found == slow_choice(language_model, ids, 8)
    assert len(set(found[len(ids) :])) > 1
    decoded = generate(str(folder), prompt, tokens=14, temperature=0)
    assert decoded == load_vocabulary("bytes").decode(found[1:])
    assert decoded.startswith(prompt)


def test_a_line_of_the_prompt_is_a_sentence(folder: Path) -> None:
    expected = write_on(load_text_model(folder), [256, *b"a", 256, *b"b"], tokens=9, temperature=0, top_k=1, seed=0)
    assert generate(str(folder), "a\nb", tokens=9, temperature=0) == load_vocabulary("bytes").decode(expected[1:])


def test_seed_and_choice(folder: Path) -> None:
    language_model = load_text_model(folder)

    def drawn(**changes: object) -> list[int]:
        arguments = {"tokens": 20, "temperature": 1.0, "top_k": 50, "seed": 0, **changes}
        return write_on(language_model, [256], **arguments)  # type: ignore[arg-type]

    assert drawn() == drawn() != drawn(seed=1)
    assert drawn(top_k=1) == drawn(temperature=0) == drawn(temperature=1e-5) == drawn(temperature=1e-39)
    with pytest.raises(MoleError, match="top-k 0"):
        generate(str(folder), "a", top_k=0)


def test_the_table_is_that_of_the_meter(folder: Path, texts_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["perplexity", str(folder), str(texts_file)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    entries = [json.loads(line) for line in texts_file.read_text(encoding="utf-8").splitlines()]
    texts = {code: [e["text"] for e in entries if e["language"] == code] for code in ("de", "en", "ru")}
    bits = evaluate(load_text_model(folder), texts).bits
    for line, (code, sentences) in zip(lines[1:4], texts.items(), strict=True):
        size = sum(len(text.encode()) + 1 for text in sentences)
        assert line == [code, str(len(sentences)), str(size), f"{bits[code]:.4f}"]
    assert lines[4] == ["mean,", "major", f"{bits['en']:.4f}"]
    assert lines[5] == ["mean,", "minor", f"{(bits['de'] + bits['ru']) / 2:.4f}"]
    assert lines[6] == ["mean,", "all", f"{sum(bits.values()) / 3:.4f}"]


def test_letters_without_a_piece_are_told_and_never_written(
    make_model: Make, letters_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vocabulary = load_vocabulary(letters_folder)
    model, folder = make_model(vocab_size=vocabulary.size).float(), str(tmp_path / "model")
    with torch.no_grad():
        model.embedding.weight[vocabulary.unknown] *= 100
    save_text_model(LanguageModel(model, vocabulary, 8, []), folder)
    assert generate(folder, "a dog", tokens=40, temperature=2.0, top_k=1000).startswith("a dog")
    assert "⁇" not in generate(folder, "a dog", tokens=40, temperature=2.0, top_k=1000)
    with pytest.raises(MoleError, match=r"prompt: the tokenizer of .*model lacks H 123"):
        generate(folder, "Hello 123")
    assert generate(folder, "a dog\na dog", tokens=1).startswith("a dog\na dog"), "a line break is no letter"
    texts = {"en": ["a dog", "a 日本 dog"], "de": ["und"]}
    lines = [json.dumps({"text": text, "language": code}) for code, each in texts.items() for text in each]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    assert main(["perplexity", folder, str(tmp_path / "texts.jsonl")]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[2].split()[:3] == ["en", "2", str(len("a dog\na 日本 dog\n".encode()))]
    assert shown[-1] == f"bytes of letters that the tokenizer of {folder} lacks, at 8 bits each: en 6"


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--temperature", ".nan"], "--temperature nan: must be at least 0"),
        (["--seed", str(2**64)], f"--seed {2**64}: must be from 0"),
        (["--seed=-1"], "--seed -1: must be from 0"),
        (["\udcff"], "prompt: is not UTF-8"),
    ],
)
def test_what_cannot_be_written_on_is_told(
    folder: Path, words: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = [] if words[0].startswith("\udcff") else ["a"]
    assert main(["generate", str(folder), *prompt, *words]) == 1
    shown = capsys.readouterr().err.strip()
    assert part in shown and "\n" not in shown


def test_half_a_surrogate_pair_is_no_text(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "a", "language": "en"}\n{"text": "\\ud800", "language": "en"}\n')
    assert main(["perplexity", str(folder), str(path)]) == 1
    assert f"{path}: line 2 is no JSON object" in capsys.readouterr().err


def test_an_encoder_neither_writes_nor_has_bits(make_model: Make, tmp_path: Path, texts_file: Path) -> None:
    model = make_model(causal=False, vocab_size=258).float()
    save_text_model(LanguageModel(model, load_vocabulary("bytes"), 8, []), tmp_path)
    for call in (lambda: generate(str(tmp_path), "a"), lambda: perplexity(str(tmp_path), str(texts_file))):
        with pytest.raises(MoleError, match="is an encoder"):
            call()


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("config.json", None, "No such file"),
        ("config.json", "{", "not JSON"),
        ("config.json", "{}", "no language model"),
        ("model.safetensors", "", "cannot be read"),
        ("languages.json", '["de", "en"]', "does not fit"),
    ],
)
def test_a_broken_folder_is_named(make_model: Make, tmp_path: Path, name: str, content: str | None, part: str) -> None:
    model = make_model(POLICIES["top-2"] if name != "languages.json" else POLICIES["post-moe"], vocab_size=258)
    save_text_model(LanguageModel(model, load_vocabulary("bytes"), 8, []), tmp_path)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(content)
    with pytest.raises(MoleError, match=part):
        load_text_model(tmp_path)
