"""Lists of usual words, for `mole-asr transcribe --words`.

They are those of wordfreq (Speer, 2022), which counted words in books, subtitles, news and the web up to 2021; CC BY-SA
4.0.
"""

from collections.abc import Sequence
from pathlib import Path

from mole_asr.corpus.normalize import normalize
from mole_asr.errors import MoleError
from mole_asr.files import check_folder, write_text

_UNSPACED = ("ja", "zh")  # of the languages that wordfreq has


def prepare(output: str | Path, *, languages: Sequence[str]) -> str:
    """Writes `xx.tsv` of each language: a line a word with its frequency, the most usual first.

    Args:
        output: folder to write.
        languages: codes.

    Returns:
        How many words were written.

    Raises:
        MoleError: no language is named, one is written without spaces or has no list, or wordfreq is not installed.
    """
    check_folder(output)
    if not languages:
        raise MoleError("--languages: name at least one, such as --languages en")
    try:
        from wordfreq import available_languages, get_frequency_dict
    except ImportError:
        raise MoleError("prepare words: needs wordfreq; pip install 'mole-asr[words]'") from None
    known = available_languages("small")
    if missing := [code for code in languages if code not in known]:
        raise MoleError(f"languages: wordfreq has no list of {', '.join(missing)}; it has {', '.join(sorted(known))}")
    if unspaced := [code for code in languages if code in _UNSPACED]:
        raise MoleError(f"languages: {', '.join(unspaced)} is written without spaces; word lists do not serve it")
    said = []
    for code in languages:
        # Numbers are spelled out in texts, in many words; hearts and lone accents are not said. Most usual words first.
        words = [
            (word, frequency)
            for word, frequency in get_frequency_dict(code, "small").items()
            if any(map(str.isalpha, normalize(word, code))) and not any(map(str.isdecimal, word))
        ]
        words.sort(key=lambda item: -item[1])
        write_text(Path(output) / f"{code}.tsv", "".join(f"{word}\t{frequency:.3g}\n" for word, frequency in words))
        said.append(f"{code} {len(words)}")
    return f"{output}: words in {', '.join(said)}"
