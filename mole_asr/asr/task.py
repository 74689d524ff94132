"""The Lightning task: one weighted sum of named losses, optimizer and schedule, validation by error rate."""

import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy
from rapidfuzz.distance import Levenshtein
from torch import Tensor

from mole_asr.arguments import check_range
from mole_asr.asr.checkpoint import Recogniser, load_model
from mole_asr.asr.fine_tuning import CTC_EPOCHS, FineTuning, blend, choose_trained, fine_tuning_optimizer, fit_ctc_head
from mole_asr.asr.generations import guard, merge_generations, train_last_generation, wake
from mole_asr.asr.gradients import gradient_norms
from mole_asr.asr.grow import grow_model
from mole_asr.asr.losses import losses
from mole_asr.asr.model import EncoderConfig, MoleModel
from mole_asr.asr.muon import OptimizerConfig, build_optimizer
from mole_asr.asr.pretrained import PretrainedConfig, PretrainedModel, from_checkpoint
from mole_asr.asr.replay import Replay, load_examples, replay_of
from mole_asr.asr.resumable_task import ResumableTask
from mole_asr.audio.augment import SpecAugment
from mole_asr.corpus.batch import Batch
from mole_asr.corpus.text_tokenizer import TextTokenizer
from mole_asr.decode.greedy import greedy_ctc
from mole_asr.decode.ngram import TokenNgram, load_ngrams
from mole_asr.errors import MoleError
from mole_asr.moe.convert.sliced import describe


@dataclass(frozen=True)
class LossWeights:
    """Weight of each named loss.

    Attributes:
        ctc: at the top of the encoder.
        intermediate_ctc: mean over the intermediate heads.
        language: cross-entropy of the language tokenizer (MoLE's lambda; ours to start from is 0.1).
        replay: the same for what is kept of old languages, where new ones are trained alone (see `asr/replay.py`).
        reliability: of the reliability head, where it is trained.
        balance: evenness of the load, where routers choose experts by themselves (Switch's alpha is 0.01).
        attention: of the attention head of a pretrained model.
    """

    ctc: float = 0.7
    intermediate_ctc: float = 0.3
    language: float = 0.1
    replay: float = 0.1
    reliability: float = 0.1
    balance: float = 0.01
    attention: float = 1.0

    def __post_init__(self) -> None:
        """Refuses a weight that is negative or no number."""
        check_range("model.loss_weights", 0, math.inf, **vars(self))


class MoleTask(ResumableTask):
    """Trains a `MoleModel`, or a `PretrainedModel`.

    Args:
        tokenizer: path of the text tokenizer; taken from `data.tokenizer`.
        languages: codes; taken from the data.
        encoder: sizes and switches of the model.
        loss_weights: of the named losses.
        optimizer: learning rates and schedule.
        scheduled_share: with the routing "scheduled": by this share of all steps, the true language is taken no more.
        spec_augment: whether to mask features in training.
        pretrained: what to put on a pretrained encoder, instead of an encoder of our own.
        fine_tuning: learning rates and stages of a pretrained model.
        init_from: folder of a trained model to start from; it grows to new pieces and languages.
        freeze_old: with init_from: trains only what the last pieces and languages brought, and no old weight changes;
            new languages are told apart from what is kept of the old ones (`asr/replay.py`), and at the end each gets a
            threshold by the validation data (`generations.temper`).
        seed: of dropout, masks and schedules: step n draws the same numbers in every run, resumed or not.
    """

    ids_name, ids_key = "text tokenizer", "tokenizer_crc"

    def __init__(
        self,
        tokenizer: str,
        languages: list[str],
        encoder: EncoderConfig = EncoderConfig(),  # noqa: B008 (frozen)
        loss_weights: LossWeights = LossWeights(),
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008 (frozen)
        scheduled_share: float = 0.5,
        spec_augment: bool = True,
        pretrained: PretrainedConfig | None = None,
        fine_tuning: FineTuning = FineTuning(),  # noqa: B008 (frozen)
        init_from: str | None = None,
        freeze_old: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_range("model", 0, 1, scheduled_share=scheduled_share)
        if fine_tuning.pretrained_share and (pretrained is None or init_from is not None):
            raise MoleError("model.fine_tuning.pretrained_share: is for a start from model.pretrained; leave it out")
        if pretrained is not None and encoder != EncoderConfig():
            raise MoleError("model.encoder: is not for model.pretrained, which has the same switches; leave it out")
        self.text_tokenizer = TextTokenizer(tokenizer)
        self.loss_weights, self.optimizer_config, self.fine_tuning = loss_weights, optimizer, fine_tuning
        self.scheduled_share, self.seed = scheduled_share, seed
        self.old_ngrams: dict[str, TokenNgram] = {}
        self.old_examples: dict[str, Tensor] = {}
        torch.manual_seed(seed)
        self.model: Recogniser
        if init_from is not None:
            self.model = self._grow(Path(init_from), languages, pretrained or encoder, freeze_old)
        elif freeze_old:
            raise MoleError("model.freeze_old: there is nothing old; give model.init_from, or leave it out")
        elif pretrained is not None:
            self.model = from_checkpoint(pretrained, languages, self.text_tokenizer.vocab_size)
        else:
            self.model = MoleModel(encoder, languages, self.text_tokenizer.vocab_size)
        _refuse_unused(optimizer, fine_tuning, isinstance(self.model, PretrainedModel))
        self.freeze_old = freeze_old
        self._trained = train_last_generation(self.model) if freeze_old else []
        self.replay: Replay | None = replay_of(self.old_examples, self.model) if freeze_old else None
        self.model.feature_augment = SpecAugment() if spec_augment else None
        # Of each language: character errors, those of the CTC head alone, characters of the references; and its longest
        # utterance, decoded.
        self._counts_N3 = torch.zeros(len(languages), 3)
        self._new_parts_only = False
        self._samples: dict[int, str] = {}

    def _grow(
        self, folder: Path, languages: list[str], config: EncoderConfig | PretrainedConfig, freeze_old: bool
    ) -> Recogniser:
        """The model of a folder, grown to the pieces and languages of the data; keeps what else it knows of the old.

        Raises:
            MoleError: the folder cannot be read, or the config is another one than that of the model.
        """
        old, old_tokenizer = load_model(folder)
        if config != EncoderConfig() and config.spelled_out(old.languages) != old.config:
            leave_out = "give --model.pretrained null" if isinstance(config, PretrainedConfig) else "leave the keys out"
            raise MoleError(f"{config.section}: with model.init_from, it is that of the old model; {leave_out}")
        model = grow_model(old, old_tokenizer, self.text_tokenizer, languages)
        wake(model)
        if not freeze_old:
            merge_generations(model)
        self.old_ngrams = load_ngrams(folder, old_tokenizer.vocab_size)
        if freeze_old:
            self.old_examples = load_examples(folder, old)
        return model

    def ids_fingerprint(self) -> bytes:
        """That of the text tokenizer."""
        return self.text_tokenizer.model

    def switches(self) -> dict[str, Any]:
        """The config of the model, but where it was started from and what acts in recognition alone; and its slices."""
        section, config = self.model.config.section, asdict(self.model.config)
        config = {key: value for key, value in config.items() if key not in ("checkpoint", "second_hearing")}
        return {f"{section}.{key}": value for key, value in config.items()} | describe(self.model)

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """The weighted sum of the losses of a batch."""
        self.seed_step(batch_index)
        scheduled_steps = self.scheduled_share * self.trainer.estimated_stepping_batches
        true_probability = max(0.0, 1 - self.global_step / scheduled_steps) if scheduled_steps > 0 else 0.0
        output = self.model(batch.audio_BS, batch.audio_lengths_B, batch.languages_B, true_probability)
        named = losses(output, batch)
        head = self.model.attention_head
        if head is not None and output.memory_BTD is not None and not self._new_parts_only:
            named["attention"] = head.loss(output.memory_BTD, output.frames.lengths_B, batch.texts, batch.languages_B)
        # What stands in for a batch with no readable file teaches nothing, though every process needs its gradients.
        is_real = (batch.rows_B >= 0).any()
        named = {name: loss * is_real for name, loss in named.items()}
        if self.replay is not None:
            named["replay"] = self.replay(self.model)
        self.log("train/mean_reliability", output.reliability_B.detach().mean(), batch_size=len(batch))
        return self.weighted_sum(named, len(batch))

    def on_fit_start(self) -> None:
        """Refuses what would end the run in the middle, or train nothing.

        Raises:
            MoleError: an utterance may be too long for the model, processes would wait for what is not trained yet, or
                scaled gradients would be clipped as if they were not.
        """
        if self.trainer.precision == "16-mixed" and isinstance(self.model, PretrainedModel):
            raise MoleError("trainer.precision: fine-tuning clips gradients that 16-mixed has scaled; take bf16-mixed")
        strategy = self.trainer.strategy
        waits = isinstance(strategy, DDPStrategy) and not strategy._ddp_kwargs.get("find_unused_parameters")
        if waits and isinstance(self.model, PretrainedModel) and not self._trained:
            raise MoleError(
                "trainer.strategy: fine-tuning trains not all at once, so on several devices it needs "
                "ddp_find_unused_parameters_true"
            )
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        stretch, limit_s = data.augment.longest_stretch if data.augment else 1.0, self.model.max_seconds
        if data.max_seconds * stretch > limit_s + 1e-6:
            raise MoleError(
                f"data.max_seconds: {data.max_seconds:g}, but the model hears {limit_s:g} s, and changes of speed "
                f"make an utterance {stretch:.2f} times as long; give at most {math.floor(limit_s / stretch + 1e-6)}"
            )

    def on_train_batch_start(self, batch: Batch, batch_index: int) -> None:
        """Chooses the parts of a pretrained model that this step trains."""
        if isinstance(self.model, PretrainedModel) and not self._trained:
            steps = int(self.trainer.estimated_stepping_batches)
            stage = self.model, self.model.sizes.encoder_layers, self.fine_tuning
            self._new_parts_only = choose_trained(*stage, step=self.global_step, steps=steps)

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """Counts character errors a language; the model hears the language by itself."""
        output = self.model(batch.audio_BS, batch.audio_lengths_B)
        is_real_B = batch.languages_B >= 0  # else it stands in for a batch with no readable file
        count = int(is_real_B.sum())
        right_B = (output.language_logits_BN.argmax(1) == batch.languages_B) & is_real_B
        for name, each_B in (("language_accuracy", right_B), ("mean_reliability", output.reliability_B * is_real_B)):
            self.log(f"valid/{name}", each_B.sum() / max(1, count), batch_size=count, sync_dist=True)
        spelled = [self.text_tokenizer.decode(ids) for ids in greedy_ctc(output.log_probs_BTV, output.lengths_B)]
        head, written = self.model.attention_head, spelled
        if head is not None and output.memory_BTD is not None:
            heard_B = output.language_logits_BN.argmax(1)
            written = [each.text for each in head.write(output.memory_BTD, output.frames.lengths_B, heard_B, beam=1)]
        texts = zip(written, spelled, batch.texts, batch.languages_B.tolist(), strict=True)
        for hypothesis, by_ctc, text, language in texts:
            if language < 0:
                continue
            errors = [Levenshtein.distance(text, hypothesis), Levenshtein.distance(text, by_ctc), len(text)]
            self._counts_N3[language] += torch.tensor(errors)
            # The longest utterances come first.
            self._samples.setdefault(language, f"{text}\n      -> {hypothesis}")

    def on_validation_epoch_end(self) -> None:
        """Logs the macro-averaged character error rate and shows one decoded utterance a language."""
        counts_N3 = self.trainer.strategy.reduce(self._counts_N3.to(self.device), reduce_op="sum")
        counts = zip(self.model.languages, (100 * counts_N3 / counts_N3[:, 2:].clamp(min=1)).tolist(), strict=True)
        rates = {code: (rate, by_ctc) for code, (rate, by_ctc, any_text) in counts if any_text}
        if rates and not self.trainer.sanity_checking:
            self.log_dict({f"valid/cer_{code}": rate for code, (rate, _) in rates.items()})
            means = [sum(rate) / len(rates) for rate in zip(*rates.values(), strict=True)]
            self.log("valid/cer", means[0], prog_bar=True)
            if self.model.attention_head is not None:
                self.log("valid/ctc_cer", means[1], prog_bar=True)
            samples = [f"  {self.model.languages[n]}  {sample}" for n, sample in sorted(self._samples.items())]
            self.print("\n".join([f"\nepoch {self.current_epoch}, step {self.global_step}:", *samples]))
        self._counts_N3.zero_()
        self._samples.clear()

    def configure_optimizers(self) -> Any:
        """Muon with AdamW (for a pretrained model AdamW alone), and a schedule a step."""
        config = self.optimizer_config
        steps = self.planned_steps()
        optimizer: torch.optim.Optimizer
        if isinstance(self.model, PretrainedModel):
            blocks = self.model.sizes.encoder_layers
            optimizer, schedule = fine_tuning_optimizer(self.model, blocks, self.fine_tuning, steps)
        else:
            optimizer = build_optimizer(self.model, config.lr, config.adamw_lr, config.weight_decay)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: config.scale(step, steps))
        if self._trained:
            guard(self._trained, optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def blend_with_pretrained(self) -> None:
        """Brings the weights back towards the pretrained ones, as far as `fine_tuning` says."""
        if share := self.fine_tuning.pretrained_share:
            assert isinstance(self.model, PretrainedModel)
            start = from_checkpoint(self.model.config, self.model.languages, self.text_tokenizer.vocab_size)
            blend(self.model, start, share)
            if self.loss_weights.ctc:
                data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
                epochs = [data.training_epoch(n) for n in range(CTC_EPOCHS)]  # the same in a run that is resumed
                print(f"fitting the CTC head anew, {CTC_EPOCHS} epochs", file=sys.stderr)
                torch.manual_seed(self.seed)
                precision = self.trainer.precision_plugin.train_step_context
                fit_ctc_head(self.model, epochs, self.fine_tuning.new_lr, precision)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Logs the norm of each expert's gradient, not yet clipped, in the steps that are logged."""
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and (self.global_step + 1) % every == 0:
            self.log_dict({f"gradient/{name}": norm for name, norm in gradient_norms(self.model).items()})


def _refuse_unused(optimizer: OptimizerConfig, fine_tuning: FineTuning, is_pretrained: bool) -> None:
    """Refuses sections of the config that nothing would read."""
    if is_pretrained and optimizer != OptimizerConfig():
        raise MoleError("model.optimizer: is not for a pretrained model; learning rates are in model.fine_tuning")
    if not is_pretrained and fine_tuning != FineTuning():
        raise MoleError("model.fine_tuning: is for a pretrained model; learning rates are in model.optimizer")
