"""The `generate` verb: text that a language model writes on."""

import torch

from mole_asr.arguments import check_at_least, check_seed
from mole_asr.errors import MoleError
from mole_asr.files import is_unicode
from mole_asr.text.checkpoint import LanguageModel, load_text_model
from mole_asr.text.model import KeyValueCache


def generate(
    model: str, prompt: str, tokens: int = 200, temperature: float = 0.8, top_k: int = 40, seed: int = 0
) -> str:
    """Writes on behind a prompt.

    Args:
        model: folder of a trained language model.
        prompt: text to go on from, a sentence a line; may be empty. Behind `--` it may begin with a dash.
        tokens: how many to write; a line break ends a sentence, and the next one follows.
        temperature: of the choice; 0 takes the likeliest token.
        top_k: only so many likeliest tokens are drawn from.
        seed: of the choice.

    Returns:
        The prompt and what follows.

    Raises:
        MoleError: the model cannot be read, is an encoder, lacks letters of the prompt, or a number is out of range.
    """
    check_at_least(0, tokens=tokens, temperature=temperature)
    check_at_least(1, top_k=top_k)
    check_seed(seed)
    if not is_unicode(prompt):
        raise MoleError("prompt: is not UTF-8")
    loaded = load_text_model(model)
    vocabulary = loaded.vocabulary
    if unspelled := vocabulary.unspelled(prompt.replace("\n", " ")):
        raise MoleError(f"prompt: the tokenizer of {model} lacks {' '.join(unspelled)}")
    ids = [token for line in prompt.split("\n") for token in (vocabulary.separator, *vocabulary.encode(line).tolist())]
    return vocabulary.decode(write_on(loaded, ids, tokens, temperature, top_k, seed)[1:])


@torch.inference_mode()
def write_on(
    language_model: LanguageModel, ids: list[int], tokens: int, temperature: float, top_k: int, seed: int
) -> list[int]:
    """Token ids with as many more as asked for; see `generate`.

    Never looks back further than the windows that the model was trained on: where one is full, it goes on from its
    second half.

    Raises:
        MoleError: the model is an encoder.
    """
    model, window = language_model.model, language_model.window
    if not model.config.causal:
        raise MoleError("the model is an encoder; only a decoder (model.network.causal true) writes text")
    generator, vocabulary = torch.Generator().manual_seed(seed), language_model.vocabulary
    never = [vocabulary.mask] if vocabulary.unknown is None else [vocabulary.mask, vocabulary.unknown]
    ids, cache, unread = list(ids), KeyValueCache(), list(ids)[-window:]
    for _ in range(tokens):
        if len(cache) + len(unread) > window:
            cache, unread = KeyValueCache(), ids[-max(1, window // 2) :]
        logits_V = model(torch.tensor([unread]), cache=cache).logits_BTV[0, -1].float()
        logits_V[never] = -torch.inf
        unread = [_draw(logits_V, temperature, top_k, generator)]
        ids += unread
    return ids


def _draw(logits_V: torch.Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits_V.argmax())
    best_K = logits_V.topk(min(top_k, len(logits_V)))
    behind_K = best_K.values - best_K.values[0]  # so that a tiny temperature gives -inf, not inf
    chosen = torch.multinomial(
        (behind_K / temperature).nan_to_num(0.0, neginf=-torch.inf).softmax(-1), 1, generator=generator
    )
    return int(best_K.indices[chosen])
