"""What a model must offer to be converted; one subclass each for text, speech and Hugging Face models.

Letters: B batch, T tokens or frames, N valid ones of a batch, V vocabulary, D model width, H width of a dense part.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mole_asr.arguments import check_device
from mole_asr.asr.model_files import read_json
from mole_asr.errors import MoleError
from mole_asr.moe.convert.sliced import SlicedLayer, sliced_layers
from mole_asr.moe.experts import Activation, ExpertWeights, activate


@dataclass(frozen=True, eq=False)
class DensePart:
    """A dense feed-forward part of a model.

    Attributes:
        weights: its tensors, not copied.
        activation: between the products.
        listen: the module whose input is the input of the part, behind any norm.
        run: computes it as the model does, [..., D] to [..., D].
    """

    weights: ExpertWeights
    activation: Activation
    listen: nn.Module
    run: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Counts:
    """How right a prediction is.

    Attributes:
        right: how many of the `counted` tokens or characters are right (less those that are too many).
        counted: what was to be predicted.
        sums: for `Host.figures`.
    """

    right: float
    counted: float
    sums: dict[str, float]


def _nothing() -> Counts:
    return Counts(0.0, 0.0, {})


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a model says of a batch.

    Attributes:
        outputs_NV: logits (or, of a model without a head, the last stream) of the valid tokens or frames.
        loss: of the model's own task, a mean; None for a model without a head.
        valid: start of the names of parts -> bool [B, T], which of their rows are no padding; a part without is whole.
        count: says how right it is; nothing is counted for a model without a head.
    """

    outputs_NV: Tensor
    loss: Tensor | None
    valid: dict[str, Tensor] = field(default_factory=dict)
    count: Callable[[], Counts] = _nothing

    def valid_of(self, name: str) -> Tensor | None:
        """The mask of a part, flattened; None where all its rows are valid."""
        return next((mask.flatten() for start, mask in self.valid.items() if name.startswith(start)), None)


@dataclass(frozen=True)
class Quality:
    """How good a model is on some data.

    Attributes:
        score: share of what it gets right, 0 to 1: next (or hidden) tokens, or characters (1 - character error rate).
        figures: the usual ones by name, such as bits_per_byte or cer.
    """

    score: float
    figures: dict[str, float]


class Host(ABC):
    """A model whose feed-forward parts are to be sliced, or are.

    Attributes:
        model: in evaluation mode.
        failures: "id: reason" of each utterance that `read` could not read and skipped.
    """

    model: nn.Module
    failures: tuple[str, ...] = ()

    def read_all(self, path: str, rows: int, seed: int) -> list[Any]:
        """`read` for a measurement, which nothing may be missing from.

        Raises:
            MoleError: something cannot be read.
        """
        batches = self.read(path, rows, seed)
        if self.failures:
            raise MoleError(f"{path}: {self.failures[0]}; mend it, as all of it is measured")
        return batches

    @abstractmethod
    def parts(self) -> dict[str, DensePart]:
        """The dense parts that can be sliced, by name, lowest first."""

    def check_uncut(self, folder: str | Path) -> None:
        """Refuses a model that has no dense part.

        Args:
            folder: of the model, for the message.

        Raises:
            MoleError: it has none.
        """
        if not self.parts():
            hint = "`mole-asr convert dense` undoes the cut that it has" if self.layers() else "its layers have experts"
            raise MoleError(f"{folder}: has no dense feed-forward part to cut; {hint}")

    @abstractmethod
    def put(self, name: str, layer: SlicedLayer) -> None:
        """Replaces a dense part."""

    @abstractmethod
    def put_dense(self, name: str, layer: SlicedLayer) -> None:
        """Replaces a sliced part by the dense one that its slices are together.

        Raises:
            MoleError: a dense model of this kind cannot have such parts.
        """

    @abstractmethod
    def set_activation(self, activations: dict[Activation, Activation]) -> None:
        """Gives the dense parts other activations; their weights stay.

        Raises:
            MoleError: the model could not be saved so.
        """

    @abstractmethod
    def read(self, path: str, rows: int, seed: int) -> list[Any]:
        """Batches of data with about so many tokens or frames.

        Raises:
            MoleError: the file cannot be read, or fits the model badly.
        """

    @abstractmethod
    def predict(self, batch: Any) -> Prediction:
        """Runs the model, and compares what it says with what is right."""

    @abstractmethod
    def forward(self, batch: Any) -> Any:
        """Runs the model alone."""

    @abstractmethod
    def save(self, folder: str | Path) -> None:
        """Writes the model, sliced or dense, as its loader reads it."""

    def figures(self, sums: dict[str, float]) -> dict[str, float]:
        """The usual figures of the sums over all batches."""
        return {}

    def layers(self) -> dict[str, SlicedLayer]:
        """The sliced parts, by name."""
        return sliced_layers(self.model)

    def clone(self) -> "Host":
        """A copy that can be converted apart."""
        return copy.deepcopy(self)

    @torch.no_grad()
    def quality(self, batches: Sequence[Any]) -> Quality:
        """How good the model is.

        Raises:
            MoleError: it has no head that could be right or wrong, or the data hold nothing to predict.
        """
        sums: dict[str, float] = {}
        right = counted = 0.0
        for batch in batches:
            found = self.predict(batch).count()
            right, counted = right + found.right, counted + found.counted
            sums = {name: sums.get(name, 0.0) + value for name, value in found.sums.items()}
        if not counted:
            raise MoleError("nothing was to be predicted: the data are empty, or the model has no head for tokens")
        return Quality(right / counted, self.figures(sums))

    @torch.no_grad()
    def record(self, batches: Sequence[Any], limit: int | None = None) -> dict[str, Tensor]:
        """The valid rows [N, D] that each dense part gets, on the CPU.

        Args:
            batches: that the model reads.
            limit: how many rows a part, drawn from those of all batches; None for all.
        """
        parts = self.parts()
        heard = {name: DrawnRows(limit) for name in parts}
        with _listening(parts) as inputs:
            for batch in batches:
                inputs.clear()
                found = self.predict(batch)
                for name, x in inputs.items():
                    rows_ND, mask = x.detach().flatten(0, -2), found.valid_of(name)
                    heard[name].add((rows_ND if mask is None else rows_ND[mask]).cpu())
        return {name: rows.taken() for name, rows in heard.items()}


class DrawnRows:
    """So many rows of all that come, each as likely as the others, in the order in which they came.

    Args:
        limit: how many; None keeps all.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self._generator = torch.Generator().manual_seed(0)  # the same one for all parts of a model: the same rows
        self._rows: list[Tensor] = []
        self._lots_N = torch.empty(0)

    def add(self, rows_ND: Tensor) -> None:
        """Takes these rows, and drops those with the highest lots where there are too many."""
        self._rows.append(rows_ND)
        if self.limit is None:
            return
        self._lots_N = torch.cat([self._lots_N, torch.rand(len(rows_ND), generator=self._generator)])
        if len(self._lots_N) > self.limit:
            kept_N = self._lots_N.topk(self.limit, largest=False).indices.sort().values
            self._rows, self._lots_N = [torch.cat(self._rows)[kept_N.to(rows_ND.device)]], self._lots_N[kept_N]

    def taken(self) -> Tensor:
        """The rows."""
        return torch.cat(self._rows)


def draw_rows(x_ND: Tensor, limit: int) -> Tensor:
    """So many of these rows, drawn; all where there are no more."""
    drawn = DrawnRows(limit)
    drawn.add(x_ND)
    return drawn.taken()


@contextmanager
def _listening(parts: dict[str, DensePart]) -> Iterator[dict[str, Tensor]]:
    """Yields the first input of each part since they were cleared, by name.

    Blocks above a language tokenizer hear some utterances again where the text decoder changes their language.
    """
    inputs: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def note(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            inputs.setdefault(name, arguments[0])

        return note

    handles = [part.listen.register_forward_pre_hook(hook(name)) for name, part in parts.items()]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def hidden_activations(part: DensePart, x_ND: Tensor) -> Tensor:
    """The activations [N, H] of a part's neurons."""
    weights = part.weights
    z = nn.functional.linear(x_ND.to(weights.w1_FD), weights.w1_FD, weights.b1_F)
    return activate(z, part.activation)


def open_host(folder: str | Path, device: str | torch.device = "cpu") -> Host:
    """The host of a model folder, whatever it holds, with its model on a device.

    Raises:
        MoleError: it holds no model that can be converted, or there is no such device.
    """
    check_device(device)
    path = Path(folder) / "config.json"
    config = read_json(path, "give the folder of a trained model")
    if not {"format", "model_type"} & set(config):
        raise MoleError(f"{path}: neither a model of ours nor a Hugging Face checkpoint; give the folder of one")
    host = _kind_of(config)(folder)
    host.model.to(device)
    return host


def _kind_of(config: dict[str, Any]) -> Callable[[str | Path], Host]:
    if "format" in config and "network" in config:
        from mole_asr.convert.text_host import TextHost

        return TextHost
    if "format" in config:
        from mole_asr.convert.speech_host import SpeechHost

        return SpeechHost
    from mole_asr.convert.huggingface_host import HuggingFaceHost

    return HuggingFaceHost
