"""Which languages and pieces came when; what came last can sleep, be woken, and be trained alone.

An utterance in a language of one generation, given or heard, is recognised with the languages and pieces of this and
older generations alone: later ones cannot change what it gives.

All functions go by the types of a model's modules, so they serve every model that has an `ExpertMixture`.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mole_asr.asr.attention_head import AttentionHead
from mole_asr.asr.mixture import ExpertMixture, MixtureFeedForward
from mole_asr.corpus.batch import Batch
from mole_asr.errors import MoleError
from mole_asr.moe.parts import ASLEEP, PartedInput, PartedLinear

# What a piece starts from when its training begins: so unlikely that old ones keep their probabilities meanwhile.
NEW_PIECE_BIAS = -10.0
# Of a new language's utterances. In a trial (Dutch, added to the model of recipes/prompts5) this many of the old
# languages' test utterances were heard as Dutch, and of English in other recordings, which that model never heard:
# with neither 85 and 100 %; with 0.95 alone 4 and 89 %; with replay (`asr/replay.py`) alone 2 and 31 %; with both 0 and
# 3 %.
HEARD_SHARE = 0.95


class Generation(NamedTuple):
    """How many languages and pieces came together."""

    languages: int
    pieces: int


@dataclass(frozen=True)
class Rows:
    """The last generation's rows of a parameter: those from `start` on, in dimension `dim`."""

    parameter: Tensor
    start: int
    dim: int = 0

    @property
    def new(self) -> Tensor:
        """These rows, as a view."""
        return self.parameter.data.narrow(self.dim, self.start, self.parameter.shape[self.dim] - self.start)

    @property
    def old(self) -> Tensor:
        """All rows before them, as a view."""
        return self.parameter.data.narrow(self.dim, 0, self.start)

    def without_old(self, gradient: Tensor) -> Tensor:
        """A gradient of the parameter, zero in the old rows."""
        gradient = gradient.clone()
        gradient.narrow(self.dim, 0, self.start).zero_()
        return gradient


def mixture_of(model: nn.Module) -> ExpertMixture:
    """The one `ExpertMixture` of a model."""
    return next(module for module in model.modules() if isinstance(module, ExpertMixture))


def generations_of(model: nn.Module) -> list[Generation]:
    """The generations of a model, the first one first."""
    mixture = mixture_of(model)
    if mixture.generations:
        return [Generation(*counts) for counts in mixture.generations]
    return [Generation(mixture.num_languages, sum(_heads(model)[0].parts))]


def contemporaries(model: nn.Module, language: int) -> int:
    """How many of a model's languages, the first ones, came with this one or before: what it can be confused with."""
    mixture = mixture_of(model)
    kept = mixture.kept or range(mixture.num_languages)
    ends = accumulate(generation.languages for generation in generations_of(model))
    end = next(end for end in ends if kept[language] < end)
    return sum(place < end for place in kept)


def set_generations(model: nn.Module, generations: Sequence[Generation]) -> None:
    """Says what came when; a single generation makes all languages and pieces alike."""
    mixture = mixture_of(model)
    mixture.generations = tuple(generations) if len(generations) > 1 else ()
    for layer in _heads(model):
        layer.parts = tuple(generation.pieces for generation in generations)
    mixture.arrange([generation.languages for generation in generations], mixture.kept)


def merge_generations(model: nn.Module) -> None:
    """Makes all languages and pieces alike, for a training of all."""
    languages, pieces = zip(*generations_of(model), strict=True)
    set_generations(model, [Generation(sum(languages), sum(pieces))])


@torch.no_grad()
def put_to_sleep(model: nn.Module) -> None:
    """Gives the last generation's languages and pieces no probability at all, whatever is heard."""
    embedding = mixture_of(model).language_embedding
    for rows in (*_language_rows(model), *_piece_rows(model)):
        if embedding is None or rows.parameter is not embedding.weight:  # which is looked up only for who is awake
            rows.new.fill_(ASLEEP if rows.parameter.ndim == 1 else 0.0)


@torch.no_grad()
def wake(model: nn.Module) -> None:
    """Gives what sleeps a start from which it can be trained: a language as likely as the mean of the others."""
    for layer in (mixture_of(model).language_tokenizer.languages, *_heads(model)):
        if not isinstance(layer, PartedLinear):
            continue
        asleep = layer.bias == ASLEEP
        if layer in _heads(model):
            layer.bias[asleep] = NEW_PIECE_BIAS
        else:
            layer.weight[asleep], layer.bias[asleep] = layer.weight[~asleep].mean(0), layer.bias[~asleep].mean()


def train_last_generation(model: nn.Module) -> list[Rows]:
    """Freezes all but what the last generation brought: its experts, and its rows of heads and language tokenizer.

    Returns:
        The rows that are to be trained. The old rows beside them get no gradients; see `guard` for what else it takes.

    Raises:
        MoleError: the model has no second generation, or each language has routers of its own.
    """
    mixture = mixture_of(model)
    if len(generations_of(model)) < 2 or not generations_of(model)[-1].languages:
        raise MoleError("model.freeze_old: the model has no new language; make room for one with `mole-asr extend`")
    if mixture.config.mixture == "group":
        raise MoleError("model.freeze_old: a model with groups of experts cannot be trained in part")
    trained = [*_language_rows(model), *_piece_rows(model), *_expert_rows(model)]
    model.requires_grad_(False)
    for rows in trained:
        rows.parameter.requires_grad_().register_hook(rows.without_old)
    for module in model.modules():
        if isinstance(module, _BatchNorm):  # its running statistics are old, too
            module.register_forward_pre_hook(lambda module, _: module.eval() and None)
    return trained


@torch.no_grad()
def temper(model: nn.Module, batches: Iterable[Batch], share: float = HEARD_SHARE) -> None:
    """Lowers the new languages' biases so far that only this share of their own utterances is still heard as them.

    Who learns a language from its recordings alone never hears what it is not, at most what is kept of the old ones
    (`asr/replay.py`): the bias and the weights of its row grow until all other speech sounds like it. What its least
    typical utterances need is the highest threshold that serves it.

    Args:
        model: trained on its last generation alone.
        batches: utterances of the new languages, not of the training; others are left out.
        share: between 0 and 1.
    """
    layer, new = mixture_of(model).language_tokenizer.languages, generations_of(model)[-1].languages
    first = layer.out_features - new
    leads: dict[int, list[float]] = defaultdict(list)
    model.eval()
    for batch in batches:
        batch = batch.to(layer.bias.device)
        logits_BN = model(batch.audio_BS, batch.audio_lengths_B).language_logits_BN.float()
        best_old_B = logits_BN[:, :first].max(1).values
        for language, own_N, best_old in zip(batch.languages_B.tolist(), logits_BN, best_old_B, strict=True):
            if language >= first:
                leads[language].append(float(own_N[language] - best_old))
    for language, lead in leads.items():
        layer.bias[language] -= torch.tensor(lead).quantile(1 - share).clamp(min=0)


def guard(trained: Sequence[Rows], optimizer: torch.optim.Optimizer) -> None:
    """Puts the old rows back after each step of an optimizer: not even weight decay changes a bit of them."""
    saved = [(rows, rows.old.clone()) for rows in trained]

    def put_back(*_: object) -> None:
        for rows, old in saved:
            rows.old.copy_(old)

    optimizer.register_step_post_hook(put_back)


def _heads(model: nn.Module) -> list[PartedLinear | PartedInput]:
    """The layers that give or take tokens."""
    languages = mixture_of(model).language_tokenizer.languages
    return [m for m in model.modules() if isinstance(m, PartedLinear | PartedInput) and m is not languages]


def _language_rows(model: nn.Module) -> Iterator[Rows]:
    mixture = mixture_of(model)
    start = mixture.num_languages - generations_of(model)[-1].languages
    yield from (Rows(parameter, start) for parameter in mixture.language_tokenizer.languages.parameters())
    if mixture.language_embedding is not None:
        yield Rows(mixture.language_embedding.weight, start)


def _piece_rows(model: nn.Module) -> Iterator[Rows]:
    generations = generations_of(model)
    start = sum(generation.pieces for generation in generations[:-1])
    for layer in _heads(model) if generations[-1].pieces else []:
        if isinstance(layer, PartedInput):
            yield Rows(layer.weight, start, dim=1)
        else:
            yield from (Rows(parameter, start) for parameter in layer.parameters())


def _expert_rows(model: nn.Module) -> Iterator[Rows]:
    """Experts of the last generation's languages that no older language has."""
    mixture, new = mixture_of(model), generations_of(model)[-1].languages
    experts = mixture.families or range(mixture.num_languages)
    start = max(experts[: mixture.num_languages - new]) + 1
    if mixture.config.mixture != "language" or start == mixture.language_router.num_experts:
        return
    for layer in model.modules():
        if isinstance(layer, MixtureFeedForward):
            yield from (Rows(tensor, start) for tensor in layer.moe.experts.stack() if tensor is not None)


def keep_languages(model: nn.Module, languages: Sequence[str]) -> None:
    """Takes all other languages out of a model, in place, with the experts that only they have.

    The language tokenizer still hears them: the reliability depends on it.

    Args:
        model: with `languages`, its codes.
        languages: those to keep, in the order of the model; not empty.

    Raises:
        MoleError: the experts are not those of languages.
    """
    mixture = mixture_of(model)
    if mixture.config.mixture != "language" or mixture.config.language_embedding or not languages:
        raise MoleError("languages: only a model with experts of languages can be pruned, and one must be left")
    experts = mixture.families or list(range(mixture.num_languages))
    before = sorted({experts[language] for language in mixture.kept or range(mixture.num_languages)})
    kept = [mixture.languages.index(code) for code in languages]
    left = [before.index(expert) for expert in sorted({experts[language] for language in kept})]
    for layer in model.modules():
        if isinstance(layer, MixtureFeedForward):
            layer.moe.experts.keep(left)
        if isinstance(layer, AttentionHead):
            layer.set_languages(languages)
    mixture.arrange(mixture.language_router.parts, kept)
    model.languages = list(languages)  # type: ignore[assignment]
