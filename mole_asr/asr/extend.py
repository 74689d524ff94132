"""The `extend` verb: room for new languages in a trained model, which stays what it is until it is trained further."""

from collections.abc import Sequence

from mole_asr.asr.checkpoint import load_model, save_model
from mole_asr.asr.grow import grow_model
from mole_asr.asr.replay import load_examples
from mole_asr.corpus.languages import check_language
from mole_asr.corpus.text_tokenizer import TextTokenizer
from mole_asr.decode.ngram import load_ngrams, save_ngrams
from mole_asr.errors import MoleError
from mole_asr.files import check_output_folder


def extend(
    model: str, output: str, *, languages: Sequence[str], tokenizer: str | None = None, family: str | None = None
) -> str:
    """Adds languages to a trained model; what it gives for the old ones does not change by a bit.

    A new language gets an expert of its own in each MoLE block, a copy of the agnostic expert, or shares an old one. It
    sleeps: nothing is recognised as it until `mole-asr fit --model.init_from OUTPUT --model.freeze_old true` has
    trained what is new, and nothing else, on recordings of the new languages alone. After that too, an utterance whose
    language is given, or heard, as an old one (both times, on a Whisper that hears twice) gives the old bits: new
    languages have no part in its reliability, nor new pieces in its text. What can still change is what is heard as a
    new language and is not; what the model keeps of its old languages makes that rare (`asr/replay.py`). (Training
    without `freeze_old` trains all, and makes all languages alike.)

    Args:
        model: folder of the trained model.
        output: folder of the wider one.
        languages: codes of the new languages.
        tokenizer: what `mole-asr tokenizer extend` made, for letters that the model does not know; left out, the new
            languages are spelled with the old pieces.
        family: name of the expert that the new languages share: a language of the model, or a family where the model
            has experts of families. Left out, each gets an expert of its own, or, in a model with experts of families,
            that of its family.

    Returns:
        What was added.

    Raises:
        MoleError: the model or the tokenizer cannot be read or do not fit, or a language is there already.
    """
    new = list(dict.fromkeys(check_language(code) for code in languages))
    if not new:
        raise MoleError("languages: name at least one, such as --languages nl")
    check_output_folder(output, model)
    old, old_tokenizer = load_model(model)
    for code in new:
        if code in old.languages:
            raise MoleError(f"languages: the model has {code} already; it has {', '.join(old.languages)}")
    new_tokenizer = TextTokenizer(tokenizer) if tokenizer is not None else old_tokenizer
    shared = dict.fromkeys(new, family) if family is not None else None
    grown = grow_model(old, old_tokenizer, new_tokenizer, [*old.languages, *new], shared)
    experts = grown.mixture.language_router.num_experts - old.mixture.language_router.num_experts
    save_ngrams(load_ngrams(model, old_tokenizer.vocab_size), output)
    save_model(grown, new_tokenizer, output, load_examples(model, old))
    added = sum(p.numel() for p in grown.parameters()) - sum(p.numel() for p in old.parameters())
    pieces = new_tokenizer.vocab_size - old_tokenizer.vocab_size
    return f"{output}: {', '.join(new)} with {experts} new experts a block, {pieces} pieces, {added:,} parameters more"
