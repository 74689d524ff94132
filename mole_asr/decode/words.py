"""Word lists: whether a text consists of words of its language, and how usual they are.

A text decoder that was trained on little speech writes what it hears letter by letter where it does not know a word.
How usual words are can be had for many languages, without any speech; that tells `un escargot` from `un escarbo`. A
word that is not in the list is as likely as its spelling: letters follow each other as in the words of the list. That
tells a name, or a plural, from what no speaker would write, such as `инватюрдекурс`, which is French.

A list is a file `xx.tsv` (a language's code): a line a word, the word and how often it comes, with a tab between. Words
that are added, such as names, are given in the same unit as the others.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from functools import cached_property, lru_cache
from pathlib import Path

from mole_asr.corpus.normalize import normalize, without_accents
from mole_asr.decode.ngram import TokenNgram
from mole_asr.errors import MoleError

# The logarithm of the probability of all words together that are not in the list. recipes/whisper_mole says what this,
# the order and the weight bring.
_UNKNOWN = -8.0
_SPELLING_ORDER = 4  # of the n-grams of letters
# A recogniser may have learned a language without its accents; words without them count by this less.
_PLAIN = 0.1
# What the words of a text count beside its sound.
WEIGHT = 0.1
_REMEMBERED = 4096  # beginnings of texts, and of words: all drafts of an utterance, and all next tokens, share a few


class WordList:
    """A unigram model of the words of a language; those that it does not know are spelled by n-grams of letters.

    Args:
        language: its code.
        counts: word, as `normalize` writes it -> how often it comes, in any unit.
    """

    def __init__(self, language: str, counts: dict[str, float]) -> None:
        self.language = language
        total = sum(counts.values())
        likely: dict[str, float] = defaultdict(float)
        for word, count in counts.items():
            likely[without_accents(word)] += _PLAIN * count
        for word, count in counts.items():
            likely[word] = max(likely[word], count)
        likely = {word: count for word, count in likely.items() if count > 0}  # a tenth of the least float is 0
        self._log_probs = {word: math.log(count) - math.log(total) for word, count in likely.items()}
        # Of the likeliest word that begins so.
        self._begun: dict[str, float] = {}
        for word, log_prob in sorted(self._log_probs.items(), key=lambda item: item[1]):
            self._begun |= dict.fromkeys((word[:end] for end in range(1, len(word) + 1)), log_prob)
        self._listed = list(counts)
        self._finished = lru_cache(_REMEMBERED)(self._sum)

    def __len__(self) -> int:
        return len(self._log_probs)

    def log_prob(self, text: str, whole: bool = True) -> float:
        """Natural logarithm of the probability of a text's words, whatever their order.

        Args:
            text: as it is written.
            whole: whether the last word ends with the text; else it counts as the likeliest that begins so.
        """
        finished, _, last = text.rpartition(" ")
        return self._finished(finished) + self._sum(last, whole)

    def score(self, text: str, whole: bool = True) -> float:
        """What a text's words say for it beside its sound: their `log_prob` x `WEIGHT`."""
        return WEIGHT * self.log_prob(text, whole)

    def _sum(self, text: str, whole: bool = True) -> float:
        *words, last = normalize(text, self.language).split() or [""]
        return sum(self._of(word, True) for word in words) + self._of(last, whole)

    def _of(self, word: str, whole: bool) -> float:
        """Of a word: in the list, or by its spelling, or by its parts (lists have l and eau, and not l'eau)."""
        if not word:
            return 0.0
        known = self._log_probs if whole else self._begun
        log_prob = max(known.get(word, -math.inf), _UNKNOWN + self._spelling.log_prob(word, whole))
        first, joined, rest = word.partition("'")
        return max(log_prob, self._of(first, True) + self._of(rest, whole)) if joined else log_prob

    @cached_property
    def _spelling(self) -> "_Spelling":
        return _Spelling(self._listed)


class _Spelling:
    """How words of a language are spelled: n-grams of the letters of some of them, each counted once."""

    def __init__(self, words: Iterable[str]) -> None:
        words = list(words)
        letters = sorted(set("".join(words)))
        self._ids = {letter: place for place, letter in enumerate(letters)}
        self._other, self._end = len(letters), len(letters) + 1  # any letter that none of them has; the end
        spelled = ([self._ids[letter] for letter in word] for word in words)
        self._ngram = TokenNgram.count(spelled, vocab_size=self._end, order=_SPELLING_ORDER)
        self._next = lru_cache(_REMEMBERED)(self._letter_log_prob)

    def log_prob(self, word: str, whole: bool) -> float:
        """Natural logarithm of the probability of a word, or of all that begin so."""
        ids = [self._ids.get(letter, self._other) for letter in word] + [self._end] * whole
        history = _SPELLING_ORDER - 1
        return sum(self._next(tuple(ids[max(0, place - history) : place]), ids[place]) for place in range(len(ids)))

    def _letter_log_prob(self, history: tuple[int, ...], letter: int) -> float:
        return float(self._ngram.log_probs(history)[letter])


def load_words(folder: str | Path, languages: Iterable[str]) -> dict[str, WordList]:
    """Reads the lists of those languages that have one; pt-BR takes that of pt where it has none.

    Raises:
        MoleError: none has one, or a line is none of a list.
    """
    languages = list(languages)
    found = {}
    for code in languages:
        paths = [path for name in (code, code.split("-")[0]) if (path := Path(folder) / f"{name}.tsv").exists()]
        if paths:
            found[code] = WordList(code, _read(paths[0], code))
    if not found:
        raise MoleError(
            f"{folder}: no word list (xx.tsv) of {', '.join(languages)}; `mole-asr prepare words` writes some"
        )
    return found


def _read(path: Path, language: str) -> dict[str, float]:
    counts: dict[str, float] = defaultdict(float)
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
        words = normalize(word, language).split()
        if not words or not 0 < value < math.inf:
            raise MoleError(f"{path}, line {number}: {line!r} is not a word, a tab and how often it comes")
        for word in words:  # of New York, both
            counts[word] += value
    if not counts:
        raise MoleError(f"{path}: is empty; give a word a line, or remove it")
    return counts
