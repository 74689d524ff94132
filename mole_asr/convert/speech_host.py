"""Recognisers of ours as hosts: the dense feed-forward parts of their encoders, not the experts of languages.

Letters: B utterances, T frames, N valid frames, V vocabulary.
"""

from pathlib import Path

import numpy as np
from rapidfuzz.distance import Levenshtein
from torch import Tensor, nn

from mole_asr.asr.checkpoint import Recogniser, load_model, save_model
from mole_asr.asr.conformer import FeedForward
from mole_asr.asr.losses import ctc_loss
from mole_asr.asr.model import ModelOutput, MoleModel
from mole_asr.asr.replay import load_examples
from mole_asr.asr.whisper import WhisperFeedForward
from mole_asr.audio.features import valid_mask
from mole_asr.convert.host import Counts, DensePart, Host, Prediction
from mole_asr.corpus.batch import Batch
from mole_asr.corpus.dataset import LabelTable, SpeechDataset
from mole_asr.corpus.manifest import Manifest
from mole_asr.decode.greedy import greedy_ctc
from mole_asr.decode.ngram import load_ngrams, save_ngrams
from mole_asr.errors import MoleError
from mole_asr.moe.convert.sliced import SlicedFeedForward, SlicedLayer
from mole_asr.moe.experts import Activation, ExpertWeights, activate

_BATCH = 8
_HEADS = ("attention_head.", "ctc.")  # their parts stay dense
_ACTIVATIONS: dict[type[nn.Module], Activation] = {nn.SiLU: "silu", nn.ReLU: "relu"}


class SpeechHost(Host):
    """A recogniser of ours, on whatever encoder it stands. Quality is that of its CTC head, decoded greedily.

    Args:
        folder: that `mole-asr fit` or `mole-asr convert` wrote.

    Raises:
        MoleError: the folder cannot be read.
    """

    model: Recogniser

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.model, self.tokenizer = load_model(folder)

    def parts(self) -> dict[str, DensePart]:
        """The dense feed-forward parts of the encoder's blocks."""
        modules = self.model.named_modules()
        return {name: _part(module) for name, module in modules if _is_dense(name, module)}

    def put(self, name: str, layer: SlicedLayer) -> None:
        """Replaces a dense part; its norm stays."""
        self.model.set_submodule(name, SlicedFeedForward.around(self.model.get_submodule(name), layer))

    def put_dense(self, name: str, layer: SlicedLayer) -> None:
        """Replaces a sliced part by the dense one.

        Raises:
            MoleError: it was adapted to ReLU, which a dense recogniser of ours does not have there.
        """
        config, weights, sliced = layer.config, layer.merged(), self.model.get_submodule(name)
        native: Activation = "silu" if isinstance(self.model, MoleModel) else self.model.encoder.activation
        if config.activation != native:
            raise MoleError(
                f"{name}: was adapted to {config.activation}; a dense recogniser has {native} there, so it stays sliced"
            )
        assert isinstance(sliced, SlicedFeedForward) and sliced.norm is not None
        dense: nn.Module = FeedForward(config.d_model, config.d_ff)
        if not isinstance(self.model, MoleModel):
            dense = WhisperFeedForward(config.d_model, config.d_ff, native)
        _norm(dense).load_state_dict(sliced.norm.state_dict())
        for linear, weight, bias in zip(_linears(dense), weights[::2], weights[1::2], strict=True):
            linear.load_state_dict({"weight": weight, "bias": bias})
        self.model.set_submodule(name, dense.to(weights.w1_FD).eval())

    def set_activation(self, activations: dict[Activation, Activation]) -> None:
        """Changes the dense parts; they must be sliced before the model is saved."""
        for name, module in self.model.named_modules():
            if not _is_dense(name, module):
                continue
            if isinstance(module, WhisperFeedForward):
                module.activation = activations[module.activation]
            else:
                assert isinstance(module, FeedForward)
                module[2] = nn.ReLU() if activations[_part(module).activation] == "relu" else module[2]

    def read(self, path: str, rows: int, seed: int) -> list[Batch]:
        """Utterances drawn at random, in batches of similar length, the batches in random order.

        Raises:
            MoleError: the manifest cannot be read, or none of these recordings.
        """
        table = Manifest(path)
        rng = np.random.default_rng(seed)
        order = rng.permutation(len(table))
        frames = np.cumsum(table.durations_s[order] / self.model.frame_shift_s)
        chosen = order[: int(np.searchsorted(frames, rows)) + 1]
        if not len(chosen):
            raise MoleError(f"{path}: holds no utterance")
        codes = self.model.languages
        known = np.array([codes.index(code) if code in codes else -1 for code in table.languages] or [-1])
        labels = LabelTable.tokenize(table, np.sort(chosen), self.tokenizer)
        dataset = SpeechDataset(table, labels, known[table.language_ids])
        by_length = chosen[np.argsort(table.durations_s[chosen], kind="stable")]
        keys = np.split(by_length, range(_BATCH, len(by_length), _BATCH))
        batches = [dataset[0, number, rows] for number, rows in enumerate(keys)]
        failures = tuple(reason for batch in batches for reason in batch.skipped)
        batches = [batch for batch in batches if batch.rows_B.min() >= 0]  # a stand-in has no row
        if not batches:
            raise MoleError(f"{path}: no readable utterance; {failures[0]}")
        self.failures = tuple(dict.fromkeys(self.failures + failures))  # data and test may be the same
        return [batches[place] for place in rng.permutation(len(batches))]  # or the first would be the short ones

    def predict(self, batch: Batch) -> Prediction:
        """Recognises; the model hears the language by itself."""
        batch = batch.to(next(self.model.parameters()).device)
        output = self.forward(batch)
        loss = ctc_loss(output.log_probs_BTV, output.lengths_B, batch)

        def count() -> Counts:
            spelled = [self.tokenizer.decode(ids) for ids in greedy_ctc(output.log_probs_BTV, output.lengths_B)]
            errors = float(sum(map(Levenshtein.distance, batch.texts, spelled)))
            characters, labels = float(sum(map(len, batch.texts))), float(batch.label_lengths_B.sum())
            sums = {"errors": errors, "characters": characters, "nats": float(loss.detach()) * labels, "labels": labels}
            return Counts(characters - errors, characters, sums)

        said_BT = valid_mask(output.lengths_B, output.log_probs_BTV.shape[1])
        return Prediction(output.log_probs_BTV[said_BT], loss, {"": output.frames.valid_BT}, count)

    def forward(self, batch: Batch) -> ModelOutput:
        """Runs the model alone."""
        batch = batch.to(next(self.model.parameters()).device)
        return self.model(batch.audio_BS, batch.audio_lengths_B)

    def figures(self, sums: dict[str, float]) -> dict[str, float]:
        """Character error rate in percent, and the CTC loss a label."""
        return {
            "cer": 100 * sums["errors"] / max(sums["characters"], 1),
            "ctc_loss": sums["nats"] / max(sums["labels"], 1),
        }

    def save(self, folder: str | Path) -> None:
        """Writes a folder that `load_model` reads; what else a model keeps comes along, another's goes."""
        save_ngrams(load_ngrams(self.folder, self.tokenizer.vocab_size), folder)
        save_model(self.model, self.tokenizer, folder, load_examples(self.folder, self.model))


def _is_dense(name: str, module: nn.Module) -> bool:
    return isinstance(module, FeedForward | WhisperFeedForward) and not name.startswith(_HEADS)


def _norm(module: nn.Module) -> nn.Module:
    return next(child for child in module.children() if isinstance(child, nn.LayerNorm))


def _linears(module: nn.Module) -> tuple[nn.Linear, nn.Linear]:
    first, last = (child for child in module.children() if isinstance(child, nn.Linear))
    return first, last


def _part(module: nn.Module) -> DensePart:
    first, last = _linears(module)
    if isinstance(module, WhisperFeedForward):
        activation = module.activation
    else:
        assert isinstance(module, FeedForward)
        activation = _ACTIVATIONS[type(module[2])]

    def run(x: Tensor) -> Tensor:
        return last(activate(first(x), activation))

    return DensePart(ExpertWeights(first.weight, first.bias, last.weight, last.bias), activation, first, run)
