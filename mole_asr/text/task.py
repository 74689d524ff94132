"""The Lightning task of a language model: named losses, optimizer and schedule, validation in bits a byte."""

import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from mole_asr.arguments import check_range
from mole_asr.asr.muon import OptimizerConfig, build_optimizer
from mole_asr.asr.resumable_task import ResumableTask
from mole_asr.errors import MoleError
from mole_asr.moe.convert.sliced import describe
from mole_asr.moe.experts import Activation
from mole_asr.text.checkpoint import LanguageModel, load_text_model
from mole_asr.text.cost import token_cost
from mole_asr.text.curriculum import two_expert_shares
from mole_asr.text.figures import BitsMeter, RoutingMeter, major_and_minor, nats
from mole_asr.text.model import NetworkConfig, TextModel, TextOutput
from mole_asr.text.policies import ExpertsConfig, routing_losses
from mole_asr.text.upcycle import upcycle
from mole_asr.text.vocabulary import load_vocabulary
from mole_asr.text.windows import TextBatch


@dataclass(frozen=True)
class TextLossWeights:
    """Weight of each named loss.

    Attributes:
        token: of the next token of a decoder, of the masked tokens of an encoder; a mean over targets.
        balance: evenness of the load, summed over layers (adaptive gating and Switch: 0.01; noisy top-k: 0.1).
        router_z: size of the routers' logits, summed over layers (ST-MoE: 0.001).
    """

    token: float = 1.0
    balance: float = 0.01
    router_z: float = 0.0

    def __post_init__(self) -> None:
        """Refuses a weight that is negative or no number."""
        check_range("model.loss_weights", 0, math.inf, **vars(self))


class TextTask(ResumableTask):
    """Trains a `TextModel`.

    Args:
        vocabulary: "bytes", or the path of a text tokenizer; taken from `data.vocabulary`.
        languages: codes; taken from the data.
        major_languages: codes that are shown apart; taken from the data.
        window: tokens of a window; taken from the data.
        network: sizes of the model.
        experts: which layers have experts, and who chooses them.
        more_experts: the same for further layers, each with a policy of its own.
        loss_weights: of the named losses.
        optimizer: learning rates and schedule.
        mask_share: share of the tokens that are hidden from an encoder.
        init_from: folder of a trained model to start from; where it is dense, its feed-forward parts are copied into
            the experts. `network` is its own, and may repeat it.
        new_activation: with init_from: another activation, such as relu, to adapt to.
        seed: of dropout and masks: step n draws the same numbers in every run, resumed or not.
    """

    ids_name, ids_key = "vocabulary", "vocabulary_crc"

    def __init__(
        self,
        vocabulary: str,
        languages: list[str],
        major_languages: list[str],
        window: int,
        network: NetworkConfig = NetworkConfig(),  # noqa: B008 (frozen)
        experts: ExpertsConfig = ExpertsConfig(),  # noqa: B008 (frozen)
        more_experts: list[ExpertsConfig] = [],  # noqa: B006 (only read)
        loss_weights: TextLossWeights = TextLossWeights(),
        optimizer: OptimizerConfig = OptimizerConfig(adamw_lr=4e-3),  # noqa: B008 (frozen)
        mask_share: float = 0.15,
        init_from: str | None = None,
        new_activation: Activation | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 < mask_share < 1:
            raise MoleError(f"model.mask_share: {mask_share:g} must be between 0 and 1")
        self.vocabulary = load_vocabulary(vocabulary)
        self.major_languages, self.window = major_languages, window
        self.loss_weights, self.optimizer_config = loss_weights, optimizer
        self.mask_share, self.seed = mask_share, seed
        torch.manual_seed(seed)
        if init_from is None:
            if new_activation is not None:
                raise MoleError("model.new_activation: needs model.init_from; without, give model.network.activation")
            self.model = TextModel(network, [experts, *more_experts], languages, self.vocabulary.size)
        else:
            self.model = self._start_from(Path(init_from), network, [experts, *more_experts], languages, new_activation)
        self._reset_meters()

    def _start_from(
        self,
        folder: Path,
        network: NetworkConfig,
        experts: list[ExpertsConfig],
        languages: list[str],
        activation: Activation | None,
    ) -> TextModel:
        old = load_text_model(folder)
        theirs = asdict(old.model.config)
        other = [name for name, value in asdict(network).items() if value != theirs[name]]
        if other and network == NetworkConfig():  # nothing was given, or what is given anyway: which, no one can tell
            values = ", ".join(f"{name} {theirs[name]}" for name in other)
            rank_zero_only(print)(f"model.network is that of {folder}: {values}", file=sys.stderr)
        elif other:
            name, todo = other[0], "leave model.network out"
            todo += ", give model.new_activation" if name == "activation" and activation is None else ""
            raise MoleError(
                f"model.network.{name}: {getattr(network, name)} is not the {theirs[name]} of {folder}; {todo}"
            )
        if old.vocabulary.fingerprint != self.vocabulary.fingerprint:
            raise MoleError(f"data.vocabulary: is not that of {folder}; give the same")
        return upcycle(old.model, experts, languages, activation).train()

    def ids_fingerprint(self) -> bytes:
        """That of the vocabulary."""
        return self.vocabulary.fingerprint

    def switches(self) -> dict[str, Any]:
        """The config of the network and of the experts, and the slices."""
        sections = {"model.network": self.model.config}
        sections |= {f"model.experts {place}": each for place, each in enumerate(self.model.experts)}
        configs = ((name, asdict(section)) for name, section in sections.items())
        switches = {f"{name}.{key}": value for name, config in configs for key, value in config.items()}
        return switches | describe(self.model)

    def language_model(self) -> LanguageModel:
        """The model and what belongs to it, to save."""
        return LanguageModel(self.model, self.vocabulary, self.window, self.major_languages)

    def _reset_meters(self) -> None:
        languages = len(self.model.languages)
        self.bits, self.routing = BitsMeter(languages), RoutingMeter(self.model.num_experts, languages)

    def on_fit_start(self) -> None:
        """Refuses a curriculum that has nothing to go by."""
        if self._curriculum is not None and not self._adaptive:
            raise MoleError("data.curriculum: needs model.experts.policy adaptive: it goes by tokens of two experts")

    @property
    def _adaptive(self) -> list[int]:
        """The layers whose routers choose one expert or two."""
        return [layer for layer, policy in self.model.policies.items() if policy.policy == "adaptive"]

    @property
    def _curriculum(self) -> Any:
        """The data module, where it keeps a curriculum."""
        data = getattr(self.trainer, "datamodule", None)
        return data if data is not None and data.curriculum else None

    def predict(self, batch: TextBatch, generator: torch.Generator | None = None) -> tuple[TextOutput, Tensor]:
        """Reads a batch.

        Args:
            batch: windows.
            generator: draws what is hidden from an encoder; None for torch's own.

        Returns:
            The output, and int64 targets [B, T]: the next token of each for a decoder, the hidden ones for an encoder;
            -1 where nothing is to be predicted.
        """
        inputs_BT, targets_BT = batch.tokens_BS[:, :-1], batch.targets()
        if not self.model.config.causal:
            inputs_BT, targets_BT = batch.hide(self.mask_share, self.vocabulary.mask, generator)
        lengths_B = batch.lengths_B if batch.padded else None
        return self.model(inputs_BT, lengths_B, batch.languages_B), targets_BT

    def training_step(self, batch: TextBatch, batch_index: int) -> Tensor:
        """The weighted sum of the losses of a batch."""
        self.seed_step(batch_index)
        output, targets_BT = self.predict(batch)
        targets = (targets_BT >= 0).sum().clamp(min=1)
        named = {"token": nats(output.logits_BTV, targets_BT).sum() / targets}
        named |= routing_losses(self.model.policies, output.plans)
        if self._adaptive:
            shares_BL = two_expert_shares([output.plans[layer] for layer in self._adaptive], len(batch))
            if self._curriculum is not None:
                self._curriculum.record(batch.rows_B, shares_BL)
            named_shares = zip(self._adaptive, shares_BL.mean(0), strict=True)
            self.log_dict({f"train/several_share_{layer}": share for layer, share in named_shares})
        return self.weighted_sum(named, len(batch))

    def validation_step(self, batch: TextBatch, batch_index: int) -> None:
        """Counts bits and routes; no label helps."""
        generator = torch.Generator().manual_seed(batch_index)
        output, targets_BT = self.predict(batch, generator)
        shares_BT = batch.byte_shares_BS[:, 1:]
        self.bits.add(nats(output.logits_BTV, targets_BT), shares_BT, targets_BT, batch.languages_B)
        self.routing.add(output, batch.languages_B)

    def on_validation_epoch_end(self) -> None:
        """Logs bits a byte of each language, their means, the figures of each router, and what a token costs."""
        sums_L2 = self._sum_ranks(self.bits.sums_L2)
        bits_L = self.bits.bits_per_byte(sums_L2).tolist()
        figures = self.routing.figures({layer: self._sum_ranks(sums) for layer, sums in self.routing.sums.items()})
        self._reset_meters()
        if self.trainer.sanity_checking:
            return
        has_texts_L = (sums_L2[:, 1] > 0).tolist()
        rows = zip(self.model.languages, bits_L, has_texts_L, strict=True)
        bits = {code: value for code, value, has_texts in rows if has_texts}
        if not bits:
            raise MoleError(
                "data.valid_texts: so short that nothing of them was hidden to be found; give more, or a larger "
                "model.mask_share"
            )
        self.log_dict({f"valid/bits_per_byte_{code}": value for code, value in bits.items()})
        means = major_and_minor(bits, self.major_languages)
        self.log("valid/bits_per_byte", means.pop("all"), prog_bar=True)
        self.log_dict({f"valid/{name}_bits_per_byte": value for name, value in means.items()}, prog_bar=True)
        for layer, each in figures.items():
            self.log_dict({f"valid/{name}_{layer}": value for name, value in vars(each).items()})
        cost = token_cost(self.model, self.window, {layer: each.experts_per_token for layer, each in figures.items()})
        self.log("valid/flops_per_token", cost.flops)
        self.log("valid/feed_forward_flops_per_token", cost.feed_forward_flops)

    def _sum_ranks(self, sums: Tensor) -> Tensor:
        # Some devices have no float64; float32 holds these sums to seven digits.
        reduced = self.trainer.strategy.reduce(sums.float().to(self.device), reduce_op="sum")
        return sums if self.trainer.world_size == 1 else reduced.double().cpu()  # type: ignore[union-attr]

    def configure_optimizers(self) -> Any:
        """Muon with AdamW, and a schedule a step."""
        config = self.optimizer_config
        steps = self.planned_steps()
        optimizer = build_optimizer(self.model, config.lr, config.adamw_lr, config.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: config.scale(step, steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
