"""Packing loses no token and no byte; the order of batches is a function of seed and epoch."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from mole_asr.corpus.texts import read_texts
from mole_asr.errors import MoleError
from mole_asr.text.data import TextDataModule
from mole_asr.text.figures import costs
from mole_asr.text.vocabulary import load_vocabulary
from mole_asr.text.windows import IGNORED, UNSPELLED, pack_windows

TEXTS = {"de": ["über", "ab", "abcabc"], "en": ["hello", "x"], "xx": ["?"]}


def predicted(language: str) -> list[int]:
    """What is to be predicted of a language's bytes, each text followed by the separator."""
    return [token for text in TEXTS[language] for token in [*text.encode(), 256]]


@pytest.mark.parametrize("window", [1, 4, 5, 100])
def test_every_token_is_predicted_once(window: int) -> None:
    windows = pack_windows(TEXTS, ["en", "de"], load_vocabulary("bytes"), window, fill=False)
    found: dict[int, list[int]] = {}
    for row in range(len(windows)):
        batch = windows.batch(np.array([row]))
        context = found.setdefault(int(batch.languages_B), [256])
        assert batch.tokens_BS[0, 0] == context[-1], "a window begins with the token before its first target"
        context += batch.targets()[0].tolist()
    assert {number: tokens[1:] for number, tokens in found.items()} == {
        0: predicted("en"),
        1: predicted("de"),
        -1: predicted("xx"),
    }


def test_training_windows_are_filled_from_the_beginning() -> None:
    windows = pack_windows(TEXTS, ["de", "en", "xx"], load_vocabulary("bytes"), 8, fill=True)
    assert windows.lengths_W.tolist() == [8] * 4  # 16, 8 and 2 targets
    last = windows.batch(np.array([3]))
    assert not last.padded
    assert last.tokens_BS[0].tolist() == [256, *predicted("xx") * 4]
    assert windows.batch(np.array([1])).targets()[0].tolist() == (predicted("de") * 2)[8:16]


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_the_bytes_of_all_targets_are_those_of_the_texts(kind: str, tokenizer_folder: Path) -> None:
    vocabulary = load_vocabulary("bytes" if kind == "bytes" else tokenizer_folder)
    windows = pack_windows(TEXTS, list(TEXTS), vocabulary, 3, fill=False)
    batch = windows.batch(np.arange(len(windows)))
    sums = [0.0] * len(TEXTS)
    for shares, language in zip(batch.byte_shares_BS[:, 1:], batch.languages_B, strict=True):
        sums[int(language)] += float(shares.sum())
    assert sums == pytest.approx([sum(len(text.encode()) + 1 for text in texts) for texts in TEXTS.values()])


def test_letters_without_a_piece_are_no_targets(letters_folder: Path) -> None:
    vocabulary = load_vocabulary(letters_folder)
    texts = {"en": ["the dog", "a 日本 dog!"], "ja": ["日本"]}
    windows = pack_windows(texts, list(texts), vocabulary, 30, fill=False)
    batch = windows.batch(np.arange(len(windows)))
    targets_BT, shares_BT = batch.targets(), batch.byte_shares_BS[:, 1:]
    assert not (targets_BT == vocabulary.unknown).any()
    assert shares_BT[targets_BT == UNSPELLED].tolist() == [6, 1, 6]  # "日本", "!", "日本"
    assert (shares_BT[targets_BT == IGNORED] == 0).all()
    sizes = [sum(len(text.encode()) + 1 for text in each) for each in texts.values()]
    assert shares_BT.sum(1).tolist() == pytest.approx(sizes)
    # A model that gives every letter of its own a probability of one pays for the others alone.
    nothing_BT = torch.zeros(targets_BT.shape)
    cost_B2 = costs(nothing_BT, shares_BT, targets_BT)
    expected = [[7 * math.log(256), sizes[0]], [6 * math.log(256), sizes[1]]]
    torch.testing.assert_close(cost_B2, torch.tensor(expected, dtype=torch.float64))


def test_padding_is_at_the_end_and_no_target() -> None:
    windows = pack_windows(TEXTS, list(TEXTS), load_vocabulary("bytes"), 10, fill=False)
    batch = windows.batch(np.array([0, 1, 3]))
    assert batch.padded and batch.lengths_B.tolist() == [10, 6, 2]
    assert (batch.targets() == -1).sum(1).tolist() == [0, 4, 8]
    assert batch.byte_shares_BS[2, 3:].sum() == 0
    assert not windows.batch(np.array([3])).padded


def module(texts_file: Path, **changes: object) -> TextDataModule:
    arguments = {"window": 16, "batch_windows": 4, **changes}
    data = TextDataModule(str(texts_file), str(texts_file), **arguments)  # type: ignore[arg-type]
    data.setup()
    return data


def rows(data: TextDataModule) -> list[list[int]]:
    return [batch.rows_B.tolist() for batch in data.train_dataloader()]


def test_an_epoch_holds_every_window_once_in_an_order_of_its_own(
    texts_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = module(texts_file)
    first = rows(data)
    assert sorted(row for batch in first for row in batch) == list(range(len(data.windows["train"])))
    assert len(first) == len(data.train_dataloader())
    assert first == rows(module(texts_file)) != rows(module(texts_file, seed=1))
    monkeypatch.setattr("mole_asr.text.data.place_of", lambda trainer: (1, 0))
    second = rows(data)
    assert second != first
    monkeypatch.setattr("mole_asr.text.data.place_of", lambda trainer: (1, 3))
    assert rows(data) == second[3:]
    languages = data.windows["train"].languages_W
    assert all((np.diff(languages[batch]) >= 0).all() for batch in first)


def test_a_temperature_brings_small_languages_more_often(texts_file: Path) -> None:
    def counts(temperature: float) -> np.ndarray:
        data = module(texts_file, temperature=temperature)
        return np.bincount(data.windows["train"].languages_W[np.concatenate(rows(data))])

    natural, flat = counts(1.0), counts(100.0)
    assert natural[1] > natural[0] > natural[2]
    assert np.ptp(flat) <= 2
    assert abs(natural.sum() - flat.sum()) <= 2


def test_languages_and_windows_can_be_limited(texts_file: Path) -> None:
    data = module(texts_file, languages=["ru", "de"], windows_per_language=3, valid_windows_per_language=2)
    assert data.languages == ["ru", "de"]
    assert np.bincount(data.windows["train"].languages_W).tolist() == [3, 3]
    assert np.bincount(data.windows["valid"].languages_W).tolist() == [2, 2]
    assert data.major_languages == ["ru", "de"]
    other = module(texts_file, languages=["ru", "de"], valid_windows_per_language=2, seed=1)
    assert np.array_equal(other.windows["valid"].starts_W, data.windows["valid"].starts_W), "comparable"
    assert module(texts_file, major_languages=["de"]).major_languages == ["de"]


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"languages": ["de", "fi"]}, "no text in fi"),
        ({"temperature": 0.5}, "temperature: 0.5"),
        ({"window": 0}, "window: 0"),
        ({"windows_per_language": 0}, r"data\.windows_per_language: 0"),
        ({"valid_windows_per_language": 0}, r"data\.valid_windows_per_language: 0"),
        ({"valid_batch_windows": 0}, r"data\.valid_batch_windows: 0"),
        ({"seed": -1}, r"data\.seed -1: must be"),
        ({"languages": ["de", "de"]}, r"data\.languages: de stands twice"),
    ],
)
def test_a_wrong_value_is_named(texts_file: Path, changes: dict[str, object], part: str) -> None:
    with pytest.raises(MoleError, match=part):
        module(texts_file, **changes)


@pytest.mark.parametrize("line", ["{", '{"text": "a"}', '{"text": 1, "language": "de"}', "[]"])
def test_a_line_that_is_no_text_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text(json.dumps({"text": "a", "language": "de"}) + "\n" + line)
    with pytest.raises(MoleError, match="line 2 "):
        read_texts(path)
    with pytest.raises(MoleError, match="nowhere"):
        read_texts(tmp_path / "nowhere")


def test_texts_keep_their_order_and_empty_ones_go(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text(
        "".join(f'{{"text": "{t}", "language": "{c}"}}\n' for t, c in [("b", "fr"), ("", "de"), ("a", "fr")])
    )
    assert read_texts(path) == {"fr": ["b", "a"]}
