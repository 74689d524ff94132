"""Texts for the language model of the recipe: the training prompts, and real text in their five languages.

No sentence of the dev and test prompts is among them: a text that is one, or holds one of four words or more, is left
out, whatever its accents.
"""

import json
import random
from collections import Counter
from pathlib import Path

from mole_asr.corpus.manifest import Manifest
from mole_asr.corpus.normalize import normalize
from mole_asr.corpus.text_tokenizer import TextTokenizer
from mole_asr.corpus.texts import read_texts
from mole_asr.data_prep.prompts import UNACCENTED
from mole_asr.files import write_text

LEAST_WORDS = 4  # a shorter sentence may stand within another by chance: "press one"
# The prompts are 80 thousand letters, the other texts are 3 million of another kind.
REPEAT = 16
KINDS = ("held_out", "holds_held_out", "other_letters")  # of texts that are left out
Texts = dict[str, list[str]]
Counts = Counter[tuple[str, str]]  # of (language and source, what became of a text)


def write_texts(prompts: Path, texts: Path, output: Path) -> list[dict[str, str | int]]:
    """Writes `train.jsonl` and `dev.jsonl` for `mole-asr fit`.

    Args:
        prompts: the prepared corpus, with its tokenizer.
        texts: of `mole-asr prepare texts`.
        output: folder to write.

    Returns:
        A row a language: `prompts` and `texts` that were taken, and of both, those that were left out: `held_out`,
        `holds_held_out`, `other_letters`.
    """
    train, dev, test = (_prompts(prompts / f"cuts_{split}.jsonl") for split in ("train", "dev", "test"))
    held_out = {_folded(text, code) for part in (dev, test) for code, each in part.items() for text in each}
    alphabet = set("".join(_pieces(TextTokenizer(prompts / "tokenizer")))) | {" "}
    found, counts = read_texts(texts / "texts_train.jsonl"), Counts()
    lines: list[dict[str, str]] = []
    for code, sentences in train.items():
        own = _without(sentences, code, held_out, alphabet, "prompts", counts)
        others = [normalize(text, code, fold_accents=code in UNACCENTED) for text in found.get(code, [])]
        others = list(dict.fromkeys(text for text in others if text))
        kept = own * REPEAT + _without(others, code, held_out, alphabet, "texts", counts)
        lines += [{"text": text, "language": code} for text in kept]
    random.Random(0).shuffle(lines)  # prompts among the others, in every window
    _write(output / "train.jsonl", lines)
    _write(output / "dev.jsonl", [{"text": text, "language": code} for code, each in dev.items() for text in each])
    kept = {code: {source: counts[f"{code} {source}", "kept"] for source in ("prompts", "texts")} for code in train}
    return [
        {"language": code, **kept[code], **{kind: _left_out(counts, code, kind) for kind in KINDS}} for code in train
    ]


def _prompts(manifest: Path) -> Texts:
    texts = Texts()
    for utterance in Manifest(manifest):
        texts.setdefault(utterance.language or "", []).append(utterance.text)
    return dict(sorted(texts.items()))


def _folded(text: str, language: str) -> str:
    return normalize(text, language, fold_accents=True)


def _pieces(tokenizer: TextTokenizer) -> list[str]:
    """Those that spell: neither the blank nor the unknown, nor a byte."""
    return [piece for piece in map(tokenizer.piece, range(2, tokenizer.vocab_size)) if not piece.startswith("<0x")]


def _without(
    texts: list[str], language: str, held_out: set[str], alphabet: set[str], source: str, counts: Counts
) -> list[str]:
    """Leaves out what is held out, and what the recogniser's letters do not spell; counts all."""
    long = [f" {text} " for text in held_out if text.count(" ") + 1 >= LEAST_WORDS]
    kept = []
    for text in texts:
        folded = _folded(text, language)
        if folded in held_out:
            kind = "held_out"
        elif any(sentence in f" {folded} " for sentence in long):
            kind = "holds_held_out"
        elif not alphabet.issuperset(text):
            kind = "other_letters"
        else:
            kind = "kept"
            kept.append(text)
        counts[f"{language} {source}", kind] += 1
    return kept


def _left_out(counts: Counts, language: str, kind: str) -> int:
    return sum(counts[f"{language} {source}", kind] for source in ("prompts", "texts"))


def _write(path: Path, lines: list[dict[str, str]]) -> None:
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
