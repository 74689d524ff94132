"""The `prune` verb: a smaller model of some of the languages, which gives the same for them."""

from collections.abc import Sequence

from mole_asr.asr.checkpoint import load_model, save_model
from mole_asr.asr.generations import keep_languages
from mole_asr.asr.replay import load_examples
from mole_asr.decode.ngram import load_ngrams, save_ngrams
from mole_asr.errors import MoleError
from mole_asr.files import check_output_folder


def prune(model: str, output: str, *, languages: Sequence[str]) -> str:
    """Takes all languages but a few out of a trained model, with their experts.

    For an utterance whose language is given, or heard as one that is kept, log-probabilities and reliability are those
    of the whole model, bit for bit; on a Whisper that hears twice (`PretrainedConfig.second_hearing`), heard so both
    times, and in transcription, where the language is unsure and texts are compared, with the same languages among the
    likeliest (but where few languages are expected, which ones there are counts for all). Where the whole model would
    hear a language that was taken out, the pruned one takes the likeliest of those that are left. The language
    tokenizer keeps its few weights for the others: how much it hears of them is part of the reliability. Pieces stay
    for the same reason. The language probabilities of a transcript are over those that are left.

    Args:
        model: folder of the trained model.
        output: folder of the smaller one; it cannot be trained further.
        languages: codes of those to keep.

    Returns:
        What is left.

    Raises:
        MoleError: the model cannot be read, has not one of the languages, or has no experts of languages.
    """
    check_output_folder(output, model)
    whole, tokenizer = load_model(model)
    before = sum(p.numel() for p in whole.parameters())
    for code in languages:
        if code not in whole.languages:
            raise MoleError(f"languages: the model has no {code}; it has {', '.join(whole.languages)}")
    keep_languages(whole, [code for code in whole.languages if code in languages])
    ngrams = load_ngrams(model, tokenizer.vocab_size)
    save_ngrams({code: ngrams[code] for code in whole.languages if code in ngrams}, output)
    save_model(whole, tokenizer, output, load_examples(model, whole))
    after = sum(p.numel() for p in whole.parameters())
    return f"{output}: {', '.join(whole.languages)}; {after:,} of {before:,} parameters"
