"""Lists of usual words, for `mole-asr transcribe --words`.

They are those of wordfreq (Speer, 2022), which counted words in books, subtitles, news and the web up to 2021; CC BY-SA
4.0.
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from mole_asr.corpus.normalize import normalize
from mole_asr.errors import MoleError
from mole_asr.files import write_text


def prepare(output: str | Path, *, languages: Sequence[str]) -> str:
    """Writes `xx.tsv` of each language: a line a word with its frequency, the most usual first.

    Args:
        output: folder to write.
        languages: codes.

    Returns:
        How many words were written.

    Raises:
        MoleError: wordfreq is not installed, or has no list of a language.
    """
    try:
        from wordfreq import available_languages, get_frequency_dict
    except ImportError:
        raise MoleError("prepare words: needs wordfreq; pip install 'mole-asr[words]'") from None
    known = available_languages("small")
    if missing := [code for code in languages if code not in known]:
        raise MoleError(f"languages: wordfreq has no list of {', '.join(missing)}; it has {', '.join(sorted(known))}")
    said = []
    for code in languages:
        counts: dict[str, float] = defaultdict(float)
        for word, frequency in get_frequency_dict(code, "small").items():
            spelled = normalize(word, code)
            if " " not in spelled and not any(map(str.isdecimal, word)):  # numbers are spelled out, in many words
                counts[spelled] += frequency
        counts.pop("", None)
        usual_first = sorted(counts.items(), key=lambda item: -item[1])
        lines = [f"{word}\t{frequency:.3g}\n" for word, frequency in usual_first]
        write_text(Path(output) / f"{code}.tsv", "".join(lines))
        said.append(f"{code} {len(lines)}")
    return f"{output}: words in {', '.join(said)}"
