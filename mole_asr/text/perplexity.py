"""The `perplexity` verb: how well a language model knows some texts, in bits a byte."""

from mole_asr.corpus.texts import read_texts
from mole_asr.errors import MoleError
from mole_asr.text.checkpoint import load_text_model
from mole_asr.text.evaluate import evaluate
from mole_asr.text.figures import major_and_minor


def perplexity(model: str, file: str) -> str:
    """Measures a language model on texts, without telling it their languages.

    Args:
        model: folder of a trained language model.
        file: JSONL, lines with "text" and "language".

    Returns:
        A table: sentences, bytes and bits a byte of each language, and the means of the major, of the minor and of all
        languages. A sentence's line break counts as one byte. Letters that the model's tokenizer lacks cost 8 bits a
        byte; how many bytes they are stands below.

    Raises:
        MoleError: the model or the texts cannot be read, or the model is an encoder.
    """
    language_model, texts = load_text_model(model), read_texts(file)
    if not texts:
        raise MoleError(f"{file}: holds no text")
    bits = evaluate(language_model, texts).bits
    rows = [("language", "sentences", "bytes", "bits a byte")]
    for code, value in bits.items():
        size = sum(len(text.encode("utf-8")) + 1 for text in texts[code])
        rows.append((code, f"{len(texts[code])}", f"{size}", f"{value:.4f}"))
    means = major_and_minor(bits, language_model.major_languages)
    rows += [(f"mean, {name}", "", "", f"{means[name]:.4f}") for name in ("major", "minor", "all") if name in means]
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    unspelled = language_model.vocabulary.unspelled_bytes
    if lacking := {code: size for code, each in texts.items() if (size := sum(map(unspelled, each)))}:
        sizes = ", ".join(f"{code} {size}" for code, size in lacking.items())
        lines.append(f"bytes of letters that the tokenizer of {model} lacks, at 8 bits each: {sizes}")
    return "\n".join(lines)
