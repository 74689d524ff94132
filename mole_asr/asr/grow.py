"""Grow a trained model to more token pieces and more languages; what it knew keeps its place and its weights."""

import torch
from torch import Tensor

from mole_asr.asr.model import MoleModel
from mole_asr.corpus.text_tokenizer import TextTokenizer
from mole_asr.errors import MoleError

# Where, in which dimension, and with which value the new rows of a parameter start. A new language's expert starts
# as a copy of the agnostic expert, which heard all languages; a new piece starts so unlikely that the old ones keep
# their probabilities until it is trained.
_VOCABULARY = {"ctc.weight": 0, "ctc.bias": 0, "condition.weight": 1}
_NEW_PIECE_BIAS = -10.0
_LANGUAGES = ("language_tokenizer.languages.weight", "language_tokenizer.languages.bias")
_EXPERTS = {"w1_EFD": "shared_w1_FD", "b1_EF": "shared_b1_F", "w2_EDF": "shared_w2_DF", "b2_ED": "shared_b2_D"}


def grow_model(
    model: MoleModel, tokenizer: TextTokenizer, new_tokenizer: TextTokenizer, new_languages: list[str]
) -> MoleModel:
    """Makes a model with the old weights and room for new pieces and languages.

    Args:
        model: the trained model.
        tokenizer: its text tokenizer.
        new_tokenizer: the same or one that `mole-asr tokenizer extend` made of it.
        new_languages: codes; those the model has must come first, in its order.

    Raises:
        MoleError: old ids or languages would change their meaning.
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
    grown = MoleModel(model.config, new_languages, new_tokenizer.vocab_size)
    old_state, new_state = model.state_dict(), grown.state_dict()
    for name, new in new_state.items():
        old = old_state[name]
        if old.shape == new.shape:
            new.copy_(old)
        elif name in _VOCABULARY:
            _copy_into(new.fill_(_NEW_PIECE_BIAS if name == "ctc.bias" else 0.0), old, _VOCABULARY[name])
        elif name in _LANGUAGES:
            _copy_into(new, old, 0)
        else:
            prefix, _, leaf = name.rpartition(".")
            new.copy_(old_state[f"{prefix}.{_EXPERTS[leaf]}"].expand_as(new))
            _copy_into(new, old, 0)
    return grown


@torch.no_grad()
def _copy_into(new: Tensor, old: Tensor, dim: int) -> None:
    new.narrow(dim, 0, old.shape[dim]).copy_(old)
