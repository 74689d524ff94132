"""recipes/prompts5/lm: the texts leak nothing, weights are chosen well, and the whole command on noise."""

import importlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jiwer
import numpy as np
import pytest
import soundfile
import torch

from mole_asr.corpus.manifest import Utterance, write_manifest
from mole_asr.corpus.normalize import normalize
from mole_asr.corpus.text_tokenizer import TextTokenizer
from mole_asr.decode.beam import Weights
from mole_asr.decode.decoder import WEIGHTS, CtcDecoder
from mole_asr.decode.ngram import TokenNgram, save_ngrams
from mole_asr.doctor import save_tiny_model

ROOT = Path(__file__).parents[1]
MODULES = ("systems", "texts", "tables", "run")
PROMPTS = {
    "train": {"en": ["a fox", "lazy dog", "the quick fox"], "fr": ["vieux juge", "le juge blond"]},
    "dev": {"en": ["the lazy fox jumps over"], "fr": ["le whisky"]},
    "test": {"en": ["quick"], "fr": ["un vieux juge qui fume", "blond"]},
}
OTHERS = {
    "en": ["A dog!", "Quick.", "The quick brown dog", "Was the lazy fox jumps over it", "a dog", "a señor"],
    "fr": ["Le whisky", "portez le vieux whisky", "un juge", "un vieux juge qui"],
}
TINY = "--model.network.d_model 8 --model.network.d_ff 8 --model.network.num_layers 2 --model.network.num_heads 1"
TINY += " --data.window 16 --data.batch_windows 4 --trainer.max_steps 2 --trainer.val_check_interval 2"
TINY += " --trainer.precision 32-true --trainer.enable_progress_bar false"


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """The modules of the recipe."""
    monkeypatch.syspath_prepend(str(ROOT / "recipes" / "prompts5" / "lm"))
    yield {name: importlib.import_module(name) for name in MODULES}
    for name in MODULES:
        sys.modules.pop(name)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Prompts (noise), other texts, and an untrained recogniser with n-grams, below one folder."""
    model = save_tiny_model(tmp_path / "model")
    prompts, rng = tmp_path / "prompts", np.random.default_rng(0)
    prompts.mkdir()
    for split, texts in PROMPTS.items():
        utterances = []
        for code, number, text in ((code, n, text) for code, each in texts.items() for n, text in enumerate(each)):
            path = prompts / f"{split}-{code}-{number}.wav"
            soundfile.write(path, rng.normal(0, 0.1, 16000), 16000)
            utterances.append(Utterance(path.stem, path, 0.0, 1.0, 16000, text, code, num_samples=16000))
        write_manifest(utterances, prompts / f"cuts_{split}.jsonl")
    (prompts / "tokenizer").mkdir()
    shutil.copy(model / "tokenizer.model", prompts / "tokenizer")
    tokenizer = TextTokenizer(model)
    counted = {
        code: TokenNgram.count(map(tokenizer.encode, texts), tokenizer.vocab_size)
        for code, texts in PROMPTS["train"].items()
    }
    save_ngrams(counted, model)
    (tmp_path / "texts").mkdir()
    lines = [{"text": text, "language": code} for code, texts in OTHERS.items() for text in texts]
    (tmp_path / "texts" / "texts_train.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return tmp_path


def test_no_held_out_sentence_is_trained_on(recipe: dict[str, ModuleType], data: Path) -> None:
    rows = recipe["texts"].write_texts(data / "prompts", data / "texts", data / "lm")
    english, french = rows
    assert english == {
        "language": "en",
        "prompts": 3,
        "texts": 2,  # "a dog" once, "the quick brown dog"
        "held_out": 1,
        "holds_held_out": 1,
        "other_letters": 1,
    }
    assert [french[key] for key in ("prompts", "texts", "held_out", "holds_held_out")] == [2, 3, 1, 0]
    lines = [json.loads(line) for line in (data / "lm" / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    written = [line["text"] for line in lines]
    assert {text: written.count(text) for text in ("a fox", "a dog", "portez le vieux whisky")} == {
        "a fox": recipe["texts"].REPEAT,
        "a dog": 1,
        "portez le vieux whisky": 1,
    }
    held_out = [text for split in ("dev", "test") for texts in PROMPTS[split].values() for text in texts]
    assert not set(held_out) & set(written)
    assert len(set(written)) == 3 + 2 + 2 + 3
    dev = [json.loads(line)["text"] for line in (data / "lm" / "dev.jsonl").read_text().splitlines()]
    assert dev == [*PROMPTS["dev"]["en"], *PROMPTS["dev"]["fr"]]


def test_the_choice_goes_down_to_the_lowest(recipe: dict[str, ModuleType]) -> None:
    asked = []

    def rates(weights: Weights) -> tuple[float, float]:
        asked.append(weights)
        assert weights.ngram == 0
        return round(abs(weights.lm - 0.8), 6), round(
            abs(weights.bonus - 1.7), 6
        )  # the second where the first is the same

    best, lowest = recipe["systems"].choose(Weights(0, 0.4, 0.9), rates)
    assert (best, lowest) == (Weights(0, 0.8, 1.7), (0.0, 0.0))
    assert len(asked) == len(set(asked)) < 20


@pytest.mark.parametrize("mode", [None, "rescore", "fusion"])
def test_lists_are_what_the_decoder_says(recipe: dict[str, ModuleType], data: Path, tmp_path: Path, mode: Any) -> None:
    from mole_asr.text.checkpoint import LanguageModel, save_text_model
    from mole_asr.text.model import NetworkConfig, TextModel
    from mole_asr.text.policies import ExpertsConfig
    from mole_asr.text.vocabulary import PieceVocabulary

    tokenizer = TextTokenizer(data / "model")
    vocabulary, rng = PieceVocabulary(tokenizer), np.random.default_rng(0)
    torch.manual_seed(0)
    network = NetworkConfig(d_model=8, d_ff=8, num_layers=1, num_heads=1)
    lm = TextModel(network, [ExpertsConfig()], ["en"], vocabulary.size)
    torch.nn.init.normal_(lm.norm.weight)
    save_text_model(LanguageModel(lm, vocabulary, 32, []), tmp_path / "lm")
    logits = [rng.normal(size=(frames, tokenizer.vocab_size)) for frames in (9, 5, 12)]
    log_probs = [each - np.logaddexp.reduce(each, axis=1, keepdims=True) for each in logits]
    ngrams = {"en": TokenNgram.count([[2, 3, 4]], tokenizer.vocab_size)}
    decoder = CtcDecoder(tokenizer, ngrams, beam=8)
    if mode is not None:
        decoder.use(tmp_path / "lm", mode, torch.device("cpu"))
    lists, said = recipe["systems"].Lists(decoder, log_probs, ["en", "fr", "en"]), []
    for weights in (Weights(0.4, 0.01, 0.9), Weights(0.4, 9.0, 5.0), Weights(0.2, 1.0, 0.9)):
        found = [list(ids) for ids in lists.best(weights)]
        decoder.weights = weights
        nbests = decoder.nbest(log_probs, ["en", "fr", "en"])
        assert found == [list(nbest[0].ids) for nbest in nbests]
        said.append(found)
    assert said[0] != said[1]


def test_the_whole_command(
    recipe: dict[str, ModuleType], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("# x\n\n<!-- tables: written by run.py -->\n<!-- end of tables -->\n\nend\n")
    words = ["--data", str(data / "prompts"), "--texts", str(data / "texts"), "--model", str(data / "model")]
    words += ["--output", str(tmp_path / "run"), "--results", str(tmp_path), "--readme", str(readme)]
    assert recipe["run"].main([*words, *TINY.split()]) == 0
    capsys.readouterr()
    written, rows = readme.read_text(), json.loads((tmp_path / "results.json").read_text())
    systems = recipe["systems"].SYSTEMS
    for name, system in systems.items():
        test = {row["language"]: row for row in rows if (row["system"], row["split"]) == (name, "test")}
        assert set(test) == {"en", "fr", "all"}
        heard = (tmp_path / "run" / name / "cuts_test.jsonl").read_text(encoding="utf-8").splitlines()
        texts = {line["id"]: line["text"] for line in map(json.loads, heard)}
        for code, references in PROMPTS["test"].items():
            said = [texts[f"test-{code}-{number}"] for number in range(len(references))]
            assert test[code]["wer"] == pytest.approx(
                100 * jiwer.wer(references, [normalize(t, code) for t in said]), abs=1e-3
            )
        assert (test["all"]["wer_difference"] is None) == (name == "ngram")
        cells = [f"{test[code]['wer']:.1f} / {test[code]['cer']:.1f}" for code in ("en", "fr")]
        assert f"| {system.title} | {' | '.join(cells)} |" in written
    bits = [row for row in rows if row["system"] == "bits"]
    assert [row["language"] for row in bits] == ["en", "fr"]
    assert all(row["ngram_bits"] > 0 and 0 < row["lm_bits"] < 20 for row in bits)
    assert written.startswith("# x\n") and written.endswith("\nend\n")
    assert recipe["run"].main(words) == 0  # nothing is trained or heard again: --table
    assert json.loads((tmp_path / "results.json").read_text()) == rows
    assert "macro WER" not in capsys.readouterr().out
    assert readme.read_text() == written


def test_what_is_committed_fits_together(recipe: dict[str, ModuleType], tmp_path: Path) -> None:
    """The README has the tables of results.json, and `transcribe` takes the weights that were chosen there."""
    folder = ROOT / "recipes" / "prompts5"
    readme = Path(shutil.copy(folder / "README.md", tmp_path))
    assert recipe["run"].main(["--table", "--readme", str(readme)]) == 0
    assert readme.read_text(encoding="utf-8") == (folder / "README.md").read_text(encoding="utf-8")
    rows = json.loads((folder / "lm" / "results.json").read_text(encoding="utf-8"))
    chosen = {row["system"]: row for row in rows if row["split"] == "dev" and row["language"] == "all"}
    for mode, system in ((None, "ngram"), ("rescore", "rescore"), ("fusion", "fusion")):
        row = chosen[system]
        assert WEIGHTS[mode] == Weights(row["ngram"], row["lm"], row["bonus"])
