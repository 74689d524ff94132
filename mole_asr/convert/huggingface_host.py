"""Hugging Face checkpoints as hosts: transformers' own models with our slices in the place of their feed-forward parts.

| style | a feed-forward part | examples |
|---|---|---|
| Llama | gate_proj, up_proj, down_proj | Llama, Mistral, Qwen |
| BERT | intermediate.dense and output.dense of a layer | BERT, RoBERTa, ELECTRA |
| T5 | wi, wo; or wi_0, wi_1, wo | T5, Flan-T5 |

A sliced model is a folder with the files of the old one, sliced.json (what was sliced, and how) and sliced.safetensors.
It has no weights under a name that transformers reads, so that nobody takes it for a dense one.

Letters: B windows, T tokens, N valid tokens, V vocabulary.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_model
from torch import Tensor, nn
from torch.nn import functional

from mole_asr.asr.model_files import read_json
from mole_asr.convert.host import Counts, DensePart, Host, Prediction
from mole_asr.corpus.texts import read_texts
from mole_asr.errors import MoleError
from mole_asr.files import atomic_path, write_text
from mole_asr.moe.convert.sliced import SliceConfig, SlicedFeedForward, SlicedLayer, describe
from mole_asr.moe.experts import GATED, Activation, ExpertWeights

CONFIG, SLICES, WEIGHTS = "config.json", "sliced.json", "sliced.safetensors"
_WINDOW, _BATCH = 128, 16
_MASK_SHARE = 0.15
_WEIGHT_FILES = (".safetensors", ".bin", ".h5", ".msgpack", ".index.json", ".onnx", ".pt")
_OURS_AND_THEIRS = ("sliced.*", "model*.safetensors*", "pytorch_model*.bin*", "tf_model*.h5*", "flax_model*.msgpack*")
"""Files with weights, or that say which files they are in, under names that we or transformers read."""
_STYLES = (
    (("gate_proj", "up_proj"), "down_proj", "act_fn"),
    (("wi_0", "wi_1"), "wo", "act"),
    (("wi",), "wo", "act"),
)


@dataclass(frozen=True)
class Slot:
    """Where a feed-forward part stands.

    Attributes:
        first: names of the linear maps into the part; two where it is gated, the gate first.
        last: name of the linear map out of it.
        activation: of the part.
    """

    first: tuple[str, ...]
    last: str
    activation: Activation


class HuggingFaceHost(Host):
    """A Hugging Face model folder, dense or sliced by us.

    Args:
        folder: config.json, weights, and for data the tokenizer.

    Raises:
        MoleError: transformers is missing, or the folder holds no model that we can slice.
    """

    model: Any

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.values = json.loads((self.folder / CONFIG).read_text(encoding="utf-8"))
        self._removed: dict[str, nn.Module] = {}
        self.slots: dict[str, Slot] = {}
        sliced = (self.folder / SLICES).exists()
        self.model = (_skeleton if sliced else _read)(self.folder, self.values).eval()
        self.slots = find_slots(self.model)
        if sliced:
            self._load_slices()

    def _load_slices(self) -> None:
        path = self.folder / WEIGHTS
        described = read_json(self.folder / SLICES)
        try:
            for name, values in described["sliced"].items():
                self.put(name, SlicedLayer(SliceConfig(**values)))
            for dense in self._removed.values():
                dense.to("meta")  # only what they were like is of use
            tensors = load_file(path)
            for name, tensor in tensors.items():
                place, _, leaf = name.rpartition(".")
                mine = getattr(self.model.get_submodule(place), leaf)
                mine.data = mine.data.to(tensor.dtype)
            load_model(self.model, path)
        except (OSError, SafetensorError) as error:
            raise MoleError(f"{path}: cannot be read ({error}); copy the folder anew") from None
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise MoleError(f"{path}: does not fit {SLICES} and {CONFIG} ({reason}); copy the folder anew") from None

    def parts(self) -> dict[str, DensePart]:
        """The feed-forward parts that are not sliced."""
        return {name: self._part(name) for name in self.slots if name not in self._removed}

    def _part(self, name: str) -> DensePart:
        slot = self.slots[name]
        first, last = [self._linear(each) for each in slot.first], self._linear(slot.last)
        biases = [linear.bias for linear in first]
        w1 = torch.cat([linear.weight for linear in first]) if len(first) > 1 else first[0].weight
        b1 = None if biases[0] is None else torch.cat([bias for bias in biases if bias is not None])
        weights = ExpertWeights(w1.detach(), None if b1 is None else b1.detach(), last.weight.to(w1.dtype), last.bias)
        module = self.model.get_submodule(name)

        def run(x: Tensor) -> Tensor:
            return module(x) if slot.last.startswith(f"{name}.") else last(module(x))

        return DensePart(weights, slot.activation, first[0], run)

    def _linear(self, name: str) -> nn.Linear:
        module = self.model.get_submodule(name)
        assert isinstance(module, nn.Linear)
        return module

    def put(self, name: str, layer: SlicedLayer) -> None:
        """Replaces a dense part."""
        slot, place = self.slots[name], self._linear(self.slots[name].last).weight.device
        self._removed[name] = self.model.get_submodule(name)
        self.model.set_submodule(name, SlicedFeedForward(layer.to(place)))
        if not slot.last.startswith(f"{name}."):  # as in BERT, whose residual sum is in the module of the second map
            self._removed[slot.last] = self.model.get_submodule(slot.last)
            self.model.set_submodule(slot.last, nn.Identity())

    def put_dense(self, name: str, layer: SlicedLayer) -> None:
        """Replaces a sliced part by the dense one."""
        slot, weights = self.slots[name], layer.merged()
        self.model.set_submodule(name, self._removed.pop(name))
        if slot.last in self._removed:
            self.model.set_submodule(slot.last, self._removed.pop(slot.last))
        biases = [None] * len(slot.first) if weights.b1_F is None else list(weights.b1_F.chunk(len(slot.first)))
        pieces = [*zip(slot.first, weights.w1_FD.chunk(len(slot.first)), biases, strict=True)]
        for linear, weight, bias in [*pieces, (slot.last, weights.w2_DF, weights.b2_D)]:
            module = self._linear(linear)
            module.weight = nn.Parameter(weight.clone())
            if module.bias is not None and bias is not None:
                module.bias = nn.Parameter(bias.clone())

    def set_activation(self, activations: dict[Activation, Activation]) -> None:
        """Changes the config, and all activations that it names: BERT's, say, in the head too.

        Raises:
            MoleError: the model has slices already, or its config cannot say so.
        """
        if self.layers():
            raise MoleError("relu-steps: the model is sliced already; give a dense one")
        wanted = {name: activations[slot.activation] for name, slot in self.slots.items()}
        gated = "gated-" if any(activation in GATED for activation in wanted.values()) else ""
        changes = {"hidden_act": "relu", "hidden_activation": "relu", "dense_act_fn": "relu"}
        for key, value in (changes | {"feed_forward_proj": f"{gated}relu"}).items():
            if hasattr(self.model.config, key):
                setattr(self.model.config, key, value)
                self.values[key] = value
        with torch.device("meta"):
            changed = type(self.model)(self.model.config)
        for name, module in changed.named_modules():
            leaf = not list(module.children()) and not list(module.parameters())
            if leaf and type(self.model.get_submodule(name)) is not type(module):
                self.model.set_submodule(name, module)
        self.slots = find_slots(self.model)
        for name, slot in self.slots.items():
            if slot.activation != wanted[name]:
                raise MoleError(f"{name}: no key of its config gives it {wanted[name]}")

    def read(self, path: str, rows: int, seed: int) -> list[Tensor]:
        """Windows of token ids [B, T], drawn at random from texts of all languages, whole windows only.

        Raises:
            MoleError: the file cannot be read, the folder has no tokenizer, or there are fewer rows than a window has.
        """
        texts = [text for each in read_texts(path).values() for text in each]
        if not texts:
            raise MoleError(f"{path}: holds no text")
        tokenizer = self._tokenizer()
        limit = int(getattr(self.model.config, "max_position_embeddings", None) or _WINDOW)
        window, ids = min(_WINDOW, limit), list[int]()
        if rows < window:
            raise MoleError(f"--rows {rows}: fewer than a window of {window} tokens")
        for place in np.random.default_rng(seed).permutation(len(texts)):
            ids += tokenizer(texts[place] + "\n", add_special_tokens=False)["input_ids"]
            if len(ids) >= rows:
                break
        if len(ids) < window:
            raise MoleError(f"{path}: holds {len(ids)} tokens; a window has {window}")
        vocabulary = self.model.get_input_embeddings().num_embeddings
        if max(ids) >= vocabulary:
            raise MoleError(f"{self.folder}: the tokenizer has id {max(ids)}, the model only {vocabulary}")
        windows_WT = torch.tensor(ids[: len(ids) // window * window]).view(-1, window)
        return list(windows_WT.split(_BATCH))

    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(str(self.folder), local_files_only=True)
        except Exception as error:  # transformers raises whatever its many tokenizers raise
            raise MoleError(
                f"{self.folder}: has no tokenizer that transformers can read ({str(error).splitlines()[0][:80]}); "
                "leave --data and --test out, or add its files"
            ) from None

    def predict(self, batch: Tensor) -> Prediction:
        """Next tokens by a decoder, hidden ones by an encoder, the second half of a window by an encoder-decoder.

        Raises:
            MoleError: the model has a head that names no tokens.
        """
        outputs, targets_BT = self._answer(batch)
        if targets_BT is None:
            return Prediction(outputs.flatten(0, 1), None)
        if outputs.dim() != 3:  # as of ELECTRA, whose pretraining head says which tokens are not the old ones
            name = type(self.model).__name__
            raise MoleError(f"{name}: its head names no tokens; give the model without a head, or with one that does")
        return _compared(outputs, targets_BT)

    def forward(self, batch: Tensor) -> Tensor:
        """Runs the model alone."""
        return self._answer(batch)[0]

    def _answer(self, batch: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits, and the tokens that were to be named [B, T]; or the last stream of a model without a head."""
        ids_BT = batch.to(next(self.model.parameters()).device)
        name, half = type(self.model).__name__, ids_BT.shape[1] // 2
        if name.endswith("ForConditionalGeneration"):
            targets_BT = ids_BT[:, half:].contiguous()
            return self.model(input_ids=ids_BT[:, :half], labels=targets_BT).logits, targets_BT
        if name.endswith(("ForCausalLM", "LMHeadModel")):
            return self.model(input_ids=ids_BT, use_cache=False).logits[:, :-1], ids_BT[:, 1:]
        if name.endswith(("ForMaskedLM", "ForPreTraining")):
            hidden_BT = _hidden(ids_BT)
            output = self.model(input_ids=ids_BT.masked_fill(hidden_BT, self._mask()))
            logits = output.logits if hasattr(output, "logits") else output.prediction_logits
            return logits, ids_BT.masked_fill(~hidden_BT, -100)
        return self.model(input_ids=ids_BT)[0], None

    def _mask(self) -> int:
        mask = self._tokenizer().mask_token_id
        if mask is None:
            raise MoleError(f"{self.folder}: its tokenizer has no mask token; leave --data and --test out")
        return int(mask)

    def figures(self, sums: dict[str, float]) -> dict[str, float]:
        """Negative log-likelihood of a token, in nats."""
        return {"loss": sums["nats"] / sums["tokens"]}

    def save(self, folder: str | Path) -> None:
        """Writes a folder that transformers reads (dense), or `open_host` (sliced).

        Weights that the folder holds already go, or one of both would read them in the place of the new ones.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.iterdir():
            if path.is_file() and path.name not in (CONFIG, SLICES) and not path.name.endswith(_WEIGHT_FILES):
                with atomic_path(folder / path.name) as temporary:
                    shutil.copyfile(path, temporary)
        with TemporaryDirectory(dir=folder, prefix=".") as written:
            self._write_weights(Path(written))
            for pattern in _OURS_AND_THEIRS:
                for path in folder.glob(pattern):
                    path.unlink()
            for path in Path(written).iterdir():
                with atomic_path(folder / path.name) as temporary:
                    os.replace(path, temporary)
        # As it was, but for the activation: transformers would write it anew, in the words of its own version.
        write_text(folder / CONFIG, json.dumps(self.values, indent=2) + "\n")

    def _write_weights(self, folder: Path) -> None:
        sliced = describe(self.model)
        if sliced:
            save_model(self.model, str(folder / WEIGHTS))
            write_text(folder / SLICES, json.dumps(sliced, indent=2) + "\n")
        else:
            self.model.save_pretrained(folder)
            (folder / CONFIG).unlink()


def _hidden(ids_BT: Tensor) -> Tensor:
    """Which tokens are hidden from an encoder: the same each time for the same window."""
    generator = torch.Generator().manual_seed(int(ids_BT.sum()))
    hidden_BT = torch.rand(ids_BT.shape, generator=generator) < _MASK_SHARE
    hidden_BT[:, 0] = True  # at least one
    return hidden_BT.to(ids_BT.device)


def _compared(logits_BTV: Tensor, targets_BT: Tensor) -> Prediction:
    """A prediction of the tokens that are not -100."""
    loss = functional.cross_entropy(logits_BTV.float().flatten(0, 1), targets_BT.flatten())

    def count() -> Counts:
        wanted_BT = targets_BT != -100
        right, wanted = (logits_BTV.argmax(-1) == targets_BT)[wanted_BT].sum(), float(wanted_BT.sum())
        return Counts(float(right), wanted, {"nats": float(loss.detach()) * wanted, "tokens": wanted})

    return Prediction(logits_BTV.flatten(0, 1), loss, count=count)


def _model_class(values: Mapping[str, Any], folder: Path) -> Any:
    try:
        import transformers
    except ImportError:
        raise MoleError(f"{folder}: needs transformers; pip install 'mole-asr[huggingface]'") from None
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    names = values.get("architectures") or []
    found = getattr(transformers, names[0], None) if names else None
    if found is None or not hasattr(found, "from_pretrained"):
        raise MoleError(f"{folder / CONFIG}: architectures {names} names no model of transformers; give a whole model")
    return found


def _read(folder: Path, values: Mapping[str, Any]) -> nn.Module:
    found = _model_class(values, folder)
    return _made(folder, lambda: found.from_pretrained(str(folder), local_files_only=True))


def _skeleton(folder: Path, values: Mapping[str, Any]) -> nn.Module:
    """The model as its config says, with weights that mean nothing."""
    found = _model_class(values, folder)
    return _made(folder, lambda: found(found.config_class.from_pretrained(str(folder), local_files_only=True)))


def _made(folder: Path, make: Callable[[], nn.Module]) -> nn.Module:
    try:
        return make()
    except Exception as error:  # transformers raises whatever its many models raise
        reason = str(error).strip().partition("\n")[0]
        raise MoleError(f"{folder}: transformers cannot read it ({reason[:160]}); copy the folder anew") from None


def find_slots(model: nn.Module) -> dict[str, Slot]:
    """The feed-forward parts of a model, by the name of the module that a sliced one replaces.

    Raises:
        MoleError: there are none, or one has an activation that slices do not have.
    """
    slots: dict[str, Slot] = {}
    for name, module in model.named_modules():
        for first, last, act in _STYLES:
            if all(isinstance(getattr(module, each, None), nn.Linear) for each in (*first, last)):
                slots[name] = _slot(name, module, first, f"{name}.{last}", act)
                break
        inside, outside = getattr(module, "intermediate", None), getattr(module, "output", None)
        if isinstance(getattr(inside, "dense", None), nn.Linear) and isinstance(
            getattr(outside, "dense", None), nn.Linear
        ):
            part = f"{name}.intermediate"
            slots[part] = _slot(part, inside, ("dense",), f"{name}.output.dense", "intermediate_act_fn")
    if not slots:
        raise MoleError(f"{type(model).__name__}: has no feed-forward parts like those of Llama, BERT or T5")
    return slots


def _slot(name: str, module: Any, first: tuple[str, ...], last: str, act: str) -> Slot:
    function = getattr(module, act, None)
    activation = _activation_of(function, gated=len(first) > 1)
    if activation is None:
        raise MoleError(f"{name}: slices know no activation like {function}; ReLU, SiLU, GELU and gated ones they do")
    return Slot(tuple(f"{name}.{each}" for each in first), last, activation)


def _activation_of(function: Any, gated: bool) -> Activation | None:
    """Which of our activations a function is, by what it computes: it has many names; None for none."""
    if function is None:
        return None
    x = torch.linspace(-4, 4, 65, dtype=torch.float64)
    y = function(x)
    known: dict[Activation, Tensor] = {"relu": x.relu(), "silu": functional.silu(x), "gelu": functional.gelu(x)}
    if gated:
        by_tanh = functional.gelu(x, approximate="tanh")
        known = {"reglu": x.relu(), "swiglu": functional.silu(x), "geglu": by_tanh}
    return next((name for name, values in known.items() if torch.allclose(y, values, atol=1e-12, rtol=0)), None)
