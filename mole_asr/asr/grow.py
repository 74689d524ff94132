"""Grow a trained model to more token pieces and more languages; what it knew keeps its place and its weights."""

from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from mole_asr.asr.checkpoint import Recogniser
from mole_asr.asr.generations import Generation, generations_of, put_to_sleep, set_generations
from mole_asr.asr.mixture import MixtureConfig
from mole_asr.asr.model import EncoderConfig, MoleModel
from mole_asr.asr.pretrained import PretrainedConfig, PretrainedModel
from mole_asr.corpus.families import expert_names, family_of
from mole_asr.corpus.text_tokenizer import TextTokenizer
from mole_asr.errors import MoleError
from mole_asr.moe.convert.sliced import describe, rebuild

Config = TypeVar("Config", bound=MixtureConfig)

# A new language's expert starts as a copy of the agnostic expert, which heard all languages.
_EXPERTS = {"w1_EFD": "shared_w1_FD", "b1_EF": "shared_b1_F", "w2_EDF": "shared_w2_DF", "b2_ED": "shared_b2_D"}


def grow_model(
    model: Recogniser,
    tokenizer: TextTokenizer,
    new_tokenizer: TextTokenizer,
    new_languages: list[str],
    expert_of: dict[str, str] | None = None,
) -> Recogniser:
    """Makes a model with the old weights and room for new pieces and languages, which sleep (see `asr/generations.py`).

    Before it is trained, it gives bit for bit what the old one gave.

    Args:
        model: the trained model.
        tokenizer: its text tokenizer.
        new_tokenizer: the same or one that `mole-asr tokenizer extend` made of it.
        new_languages: codes; those the model has must come first, in its order.
        expert_of: for a new language the name of the expert that it shares (a language's code or a family's, as in
            `model.mixture.expert_names`); by default that of its family where there is one, else a new expert.

    Raises:
        MoleError: old ids or languages would change their meaning, or the model was pruned.
    """
    old_pieces = [tokenizer.piece(i) for i in range(tokenizer.vocab_size)]
    if [new_tokenizer.piece(i) for i in range(min(tokenizer.vocab_size, new_tokenizer.vocab_size))] != old_pieces:
        raise MoleError(
            "data.tokenizer: its first pieces are not those of the model to start from; make it with "
            "`mole-asr tokenizer extend`"
        )
    if new_languages[: len(model.languages)] != model.languages:
        raise MoleError(
            f"data.languages: {new_languages} must begin with those of the model to start from, {model.languages}"
        )
    if model.mixture.kept is not None:
        raise MoleError("the model to start from was pruned; take the one that it was made of")
    config = grown_config(model.config, model.languages, new_languages, expert_of or {})
    if config.mixture == "forced" and set(expert_names(config.expert_of, new_languages)) > set(
        model.mixture.expert_names
    ):
        raise MoleError("the model's routers know no new expert; name the one that a new language shares (--family)")
    grown = _wider(model, config, new_languages, new_tokenizer.vocab_size)
    rebuild(grown, describe(model))
    old_state = model.state_dict()
    for name, new in grown.state_dict().items():
        grow_tensor(name, new, old_state, config.num_experts if config.mixture == "group" else 1)
    added = Generation(len(new_languages) - len(model.languages), new_tokenizer.vocab_size - tokenizer.vocab_size)
    set_generations(grown, [*generations_of(model), added] if any(added) else generations_of(model))
    if any(added):
        put_to_sleep(grown)
    return grown


def _wider(model: Recogniser, config: MixtureConfig, languages: list[str], vocab_size: int) -> Recogniser:
    """An untrained model of the same kind."""
    if isinstance(model, PretrainedModel):
        assert isinstance(config, PretrainedConfig)
        return PretrainedModel(config, model.sizes, model.whisper_tokenizer, languages, vocab_size)
    assert isinstance(config, EncoderConfig)
    return MoleModel(config, languages, vocab_size)


def grown_config(config: Config, languages: list[str], new_languages: list[str], expert_of: dict[str, str]) -> Config:
    """The config of a model of more languages: it says which expert each has.

    Args:
        config: of the old model.
        languages: of the old model.
        new_languages: of the new one, the old ones first.
        expert_of: as of `grow_model`.

    Raises:
        MoleError: `expert_of` gives an old language another expert, or names an expert that is not there.
    """
    names = dict(zip(languages, expert_names(config.expert_of, languages), strict=True))
    of_families = any(name not in names for name in names.values())
    for code in new_languages[len(languages) :]:
        own = family_of(code) if of_families else code
        names[code] = family_of(code) if family_of(code) in names.values() else own
    for code, name in expert_of.items():
        if code in languages or code not in names:
            raise MoleError(
                f"expert_of: {code} is no new language; new are {', '.join(new_languages[len(languages) :])}"
            )
        if name not in expert_names(config.expert_of, languages):
            known = ", ".join(dict.fromkeys(expert_names(config.expert_of, languages)))
            raise MoleError(f"--family: the model has no expert {name!r}; it has {known}")
        names[code] = name
    if all(code == name for code, name in names.items()):
        return config
    return replace(config, expert_of=names)


@torch.no_grad()
def grow_tensor(name: str, new: Tensor, old_state: dict[str, Tensor], group: int = 1) -> None:
    """Fills a parameter of a grown model in place: the old rows first, and behind them what is sensible to start from.

    Args:
        name: of the parameter.
        new: the parameter.
        old_state: parameters of the old model.
        group: experts that a language has.
    """
    old = old_state[name]
    if old.shape == new.shape:
        new.copy_(old)
        return
    leaf = name.rpartition(".")[2]
    shared = old_state.get(f"{name.rpartition('.')[0]}.{_EXPERTS.get(leaf)}")
    dim = next(dim for dim, size in enumerate(old.shape) if size != new.shape[dim])
    if leaf in _EXPERTS and shared is not None:
        new.copy_(shared.expand_as(new))
    elif leaf in _EXPERTS or ".router." in name:
        # No expert heard all languages: their mean did (a language's first expert from the first experts, and so on).
        mean = old.unflatten(0, (-1, group)).mean(0)
        new.copy_(mean.repeat(len(new) // group, *[1] * (new.ndim - 1)))
    elif name.endswith("language_embedding.weight"):
        new.copy_(old.mean(0).expand_as(new))
    # Else a row of a head or of the language tokenizer: it will sleep.
    new.narrow(dim, 0, old.shape[dim]).copy_(old)
