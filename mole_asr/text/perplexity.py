"""The `perplexity` verb: how well a language model knows some texts, in bits a byte."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from mole_asr.corpus.texts import read_texts
from mole_asr.errors import MoleError
from mole_asr.text.checkpoint import LanguageModel, load_text_model
from mole_asr.text.figures import BitsMeter, major_and_minor, nats
from mole_asr.text.windows import pack_windows

_BATCH = 16


def perplexity(model: str, file: str) -> str:
    """Measures a language model on texts, without telling it their languages.

    Args:
        model: folder of a trained language model.
        file: JSONL, lines with "text" and "language".

    Returns:
        A table: sentences, bytes and bits a byte of each language, and the means of the major, of the minor and of all
        languages. A sentence's line break counts as one byte.

    Raises:
        MoleError: the model or the texts cannot be read, or the model is an encoder.
    """
    language_model, texts = load_text_model(model), read_texts(file)
    if not texts:
        raise MoleError(f"{file}: holds no text")
    bits = bits_per_byte(language_model, texts)
    rows = [("language", "sentences", "bytes", "bits a byte")]
    for code, value in bits.items():
        size = sum(len(text.encode("utf-8")) + 1 for text in texts[code])
        rows.append((code, f"{len(texts[code])}", f"{size}", f"{value:.4f}"))
    means = major_and_minor(bits, language_model.major_languages)
    rows += [(f"mean, {name}", "", "", f"{means[name]:.4f}") for name in ("major", "minor", "all") if name in means]
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(lines)


@torch.inference_mode()
def bits_per_byte(language_model: LanguageModel, texts: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Bits a byte of each language, its sentences one after the other in windows of the model's own length.

    Args:
        language_model: a decoder.
        texts: of each language, at least one.

    Raises:
        MoleError: the model is an encoder.
    """
    model = language_model.model
    if not model.config.causal:
        raise MoleError("the model is an encoder; only a decoder (model.network.causal true) gives texts a probability")
    device = model.embedding.weight.device
    meter = BitsMeter(len(texts))
    windows = pack_windows(texts, list(texts), language_model.vocabulary, language_model.window, fill=False)
    longest_first = np.argsort(-windows.lengths_W, kind="stable")
    for rows in np.split(longest_first, range(_BATCH, len(windows), _BATCH)):
        batch = windows.batch(rows).to(device)
        targets_BT = batch.targets()
        output = model(batch.tokens_BS[:, :-1], batch.lengths_B if batch.padded else None)
        cost_BT = nats(output.logits_BTV, targets_BT)
        meter.add(cost_BT, batch.byte_shares_BS[:, 1:], targets_BT, batch.languages_B)
    return dict(zip(texts, meter.bits_per_byte().tolist(), strict=True))
