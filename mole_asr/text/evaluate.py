"""A trained language model on texts: bits a byte of each language, and what its routers do when nobody tells them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mole_asr.errors import MoleError
from mole_asr.text.checkpoint import LanguageModel
from mole_asr.text.figures import BitsMeter, LayerFigures, RoutingMeter, nats
from mole_asr.text.windows import pack_windows

_BATCH = 16


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What was found.

    Attributes:
        bits: bits a byte of each language.
        layers: figures of each layer that has experts, by its place.
        loads: of each such layer, language -> share of the language's slots that each expert had, float64 [E].
    """

    bits: dict[str, float]
    layers: dict[int, LayerFigures]
    loads: dict[int, dict[str, Tensor]]


@torch.inference_mode()
def evaluate(
    language_model: LanguageModel,
    texts: Mapping[str, Sequence[str]],
    windows_per_language: int | None = None,
    seed: int = 0,
) -> Evaluation:
    """Reads texts, the sentences of a language one after the other in windows of the model's own length.

    Args:
        language_model: a decoder; it is not told the languages.
        texts: of each language, at least one.
        windows_per_language: at most so many, chosen at random; None: all.
        seed: of the choice.

    Raises:
        MoleError: the model is an encoder.
    """
    model = language_model.model
    if not model.config.causal:
        raise MoleError("the model is an encoder; only a decoder (model.network.causal true) gives texts a probability")
    device, codes = model.embedding.weight.device, list(texts)
    bits, routing = BitsMeter(len(codes)), RoutingMeter(model.num_experts, len(codes))
    windows = pack_windows(texts, codes, language_model.vocabulary, language_model.window, fill=False)
    windows = windows.thinned(windows_per_language, seed)
    longest_first = np.argsort(-windows.lengths_W, kind="stable")
    for rows in np.split(longest_first, range(_BATCH, len(windows), _BATCH)):
        batch = windows.batch(rows).to(device)
        targets_BT = batch.targets()
        output = model(batch.tokens_BS[:, :-1], batch.lengths_B if batch.padded else None)
        cost_BT = nats(output.logits_BTV, targets_BT)
        bits.add(cost_BT, batch.byte_shares_BS[:, 1:], targets_BT, batch.languages_B)
        routing.add(output, batch.languages_B)
    loads = {layer: dict(zip(codes, sums[:, :-2], strict=True)) for layer, sums in routing.sums.items()}
    return Evaluation(
        dict(zip(codes, bits.bits_per_byte().tolist(), strict=True)),
        routing.figures(),
        {layer: {code: load_E / load_E.sum() for code, load_E in each.items()} for layer, each in loads.items()},
    )
