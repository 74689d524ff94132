"""Language models of ours as hosts.

Letters: B windows, T tokens, N valid tokens, V vocabulary.
"""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mole_asr.convert.host import Counts, DensePart, Host, Prediction
from mole_asr.corpus.texts import read_texts
from mole_asr.errors import MoleError
from mole_asr.moe.convert.sliced import SlicedLayer
from mole_asr.moe.experts import Activation
from mole_asr.text.checkpoint import load_text_model, save_text_model
from mole_asr.text.figures import costs, nats
from mole_asr.text.model import DenseFeedForward, TextModel, TextOutput
from mole_asr.text.vocabulary import Vocabulary
from mole_asr.text.windows import TextBatch, pack_windows

_BATCH = 16
_MASK_SHARE = 0.15


class TextHost(Host):
    """A language model of ours, decoder or encoder.

    Args:
        folder: that `mole-asr fit` or `mole-asr convert` wrote.

    Raises:
        MoleError: the folder cannot be read.
    """

    model: TextModel

    def __init__(self, folder: str | Path) -> None:
        self.language_model = load_text_model(folder)
        self.model = self.language_model.model

    def parts(self) -> dict[str, DensePart]:
        """The dense feed-forward parts of all layers."""
        found = {}
        for name, module in self.model.named_modules():
            if isinstance(module, DenseFeedForward):
                found[name] = DensePart(module.weights(), module.activation, module, module)
        return found

    def put(self, name: str, layer: SlicedLayer) -> None:
        """Replaces a dense part; a layer of the transformer takes a layer of experts as it is."""
        self.model.set_submodule(name, layer)

    def put_dense(self, name: str, layer: SlicedLayer) -> None:
        """Replaces a sliced part by the dense one.

        Raises:
            MoleError: other parts have another activation.
        """
        config, weights = self.model.config, layer.merged()
        if config.activation != layer.config.activation:
            raise MoleError(f"{name}: has {layer.config.activation}, the model {config.activation}; it cannot be dense")
        dense = DenseFeedForward(config.d_model, config.d_ff, config.activation).to(weights.w1_FD)
        dense.load_state_dict({"up.weight": weights.w1_FD, "down.weight": weights.w2_DF})
        self.model.set_submodule(name, dense)

    def set_activation(self, activations: dict[Activation, Activation]) -> None:
        """Changes all parts, and the config with them.

        Raises:
            MoleError: there are other parts than dense ones.
        """
        if self.model.policies or self.layers():
            raise MoleError("relu-steps: the model has layers of experts already; give a dense one")
        new = activations[self.model.config.activation]
        self.model.config = replace(self.model.config, activation=new)
        for module in self.model.modules():
            if isinstance(module, DenseFeedForward):
                module.activation = new

    def read(self, path: str, rows: int, seed: int) -> list[TextBatch]:
        """Windows of texts drawn at random, as many tokens of each language; for an encoder, tokens are hidden.

        Raises:
            MoleError: the file cannot be read, or has no text in a language of the model.
        """
        languages = self.model.languages
        texts = {code: found for code, found in read_texts(path).items() if code in languages}
        if not texts:
            raise MoleError(f"{path}: no text in a language of the model ({', '.join(languages)})")
        rng = np.random.default_rng(seed)
        loaded = self.language_model
        drawn = {code: _draw(found, rows // len(texts) + 1, loaded.vocabulary, rng) for code, found in texts.items()}
        windows = pack_windows(drawn, languages, loaded.vocabulary, loaded.window, fill=False)
        batches, left = [], rows
        for chosen in np.split(rng.permutation(len(windows)), range(_BATCH, len(windows), _BATCH)):
            if left > 0:
                batches.append(windows.batch(np.sort(chosen)))
                left -= int(batches[-1].lengths_B.sum())
        return batches

    def predict(self, batch: TextBatch) -> Prediction:
        """Reads windows; of an encoder the same tokens of a batch are hidden each time."""
        batch = batch.to(self.model.embedding.weight.device)
        targets_BT, output = self._asked(batch)[1], self.forward(batch)
        valid_BT = torch.arange(targets_BT.shape[1], device=targets_BT.device) < batch.lengths_B[:, None]
        cost_BT, wanted_BT = nats(output.logits_BTV, targets_BT), targets_BT >= 0

        def count() -> Counts:
            right = (output.logits_BTV.argmax(-1) == targets_BT)[wanted_BT].sum()
            cost, size = costs(cost_BT.detach(), batch.byte_shares_BS[:, 1:], targets_BT).sum(0).tolist()
            return Counts(float(right), float(wanted_BT.sum()), {"nats": cost, "bytes": size})

        return Prediction(
            outputs_NV=output.logits_BTV[valid_BT],
            loss=cost_BT.sum() / wanted_BT.sum().clamp(min=1),
            valid={"": valid_BT} if batch.padded else {},
            count=count,
        )

    def forward(self, batch: TextBatch) -> TextOutput:
        """Runs the model alone."""
        batch = batch.to(self.model.embedding.weight.device)
        return self.model(self._asked(batch)[0], batch.lengths_B if batch.padded else None)

    def _asked(self, batch: TextBatch) -> tuple[Tensor, Tensor]:
        """What the model reads, and what it is to say of it, both [B, T]."""
        if self.model.config.causal:
            return batch.tokens_BS[:, :-1], batch.targets()
        generator = torch.Generator().manual_seed(int(batch.rows_B[0]))
        return batch.hide(_MASK_SHARE, self.language_model.vocabulary.mask, generator)

    def figures(self, sums: dict[str, float]) -> dict[str, float]:
        """Bits a byte over all tokens that were predicted."""
        return {"bits_per_byte": sums["nats"] / sums["bytes"] / math.log(2)}

    def save(self, folder: str | Path) -> None:
        """Writes a folder that `load_text_model` reads."""
        save_text_model(self.language_model, folder)


def _draw(texts: list[str], size: int, vocabulary: Vocabulary, rng: np.random.Generator) -> list[str]:
    """Some of the texts, at least one: about so many tokens, separators included."""
    chosen, left = [], size
    for row in rng.permutation(len(texts)):
        chosen.append(texts[row])
        left -= len(vocabulary.encode(texts[row])) + 1
        if left <= 0:
            break
    return chosen
