"""Word lists: whether a text consists of words of its language, and how usual they are.

A text decoder that was trained on little speech writes what it hears letter by letter where it does not know a word.
How usual words are can be had for many languages, without any speech; that tells `un escargot` from `un escarbo`.

A list is a file `xx.tsv` (a language's code): a line a word, the word and how often it comes, with a tab between.
"""

import math
import unicodedata
from collections import defaultdict
from pathlib import Path

from mole_asr.corpus.normalize import normalize
from mole_asr.errors import MoleError

# The logarithm of the probability of a word that is not in the list: of all together, and for each letter. Chosen, with
# the weight, on utterances of volunteers that recipes/whisper_mole does not score.
_UNKNOWN, _LETTER = -18.0, -0.7
# What the words of a text count beside its sound.
WEIGHT = 0.15


class WordList:
    """A unigram model of the words of a language.

    Args:
        language: its code.
        counts: word, as `normalize` writes it -> how often it comes, in any unit.
    """

    def __init__(self, language: str, counts: dict[str, float]) -> None:
        self.language = language
        total = sum(counts.values())
        # A recogniser may have learned a language without its accents; the words are the same.
        plain: dict[str, float] = defaultdict(float)
        for word, count in counts.items():
            plain[normalize(word, language, fold_accents=True)] += count
        self._log_probs = {word: math.log(count / total) for word, count in (counts | plain).items()}
        # Of the likeliest word that begins so.
        self._begun: dict[str, float] = {}
        for word, log_prob in sorted(self._log_probs.items(), key=lambda item: item[1]):
            self._begun |= dict.fromkeys((word[:end] for end in range(1, len(word) + 1)), log_prob)

    def __len__(self) -> int:
        return len(self._log_probs)

    def log_prob(self, text: str, whole: bool = True) -> float:
        """Natural logarithm of the probability of a text's words, whatever their order.

        Args:
            text: as it is written.
            whole: whether the last word ends with the text; else it counts as the likeliest word that begins so.
        """
        *words, last = normalize(text, self.language).split() or [""]
        known = self._log_probs if whole else self._begun
        return sum(_of(word, self._log_probs) for word in words) + (_of(last, known) if last else 0.0)


def _of(word: str, log_probs: dict[str, float]) -> float:
    return log_probs.get(word, _UNKNOWN + _LETTER * len(word))


def load_words(folder: str | Path) -> dict[str, WordList]:
    """Reads all lists of a folder, by language.

    Raises:
        MoleError: there is none, or a line is none of a list.
    """
    paths = sorted(Path(folder).glob("*.tsv"))
    if not paths:
        raise MoleError(f"{folder}: no word list (xx.tsv) there; `mole-asr prepare words {folder}` writes some")
    return {path.stem: WordList(path.stem, _read(path)) for path in paths}


def _read(path: Path) -> dict[str, float]:
    counts: dict[str, float] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise MoleError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    for number, line in enumerate(lines, 1):
        word, _, count = line.partition("\t")
        try:
            value = float(count)
        except ValueError:
            value = math.nan
        if not word or not 0 < value < math.inf:
            raise MoleError(f"{path}, line {number}: {line!r} is not a word, a tab and how often it comes")
        word = unicodedata.normalize("NFC", word)
        counts[word] = counts.get(word, 0.0) + value
    if not counts:
        raise MoleError(f"{path}: is empty; give a word a line, or remove it")
    return counts
