"""Which split a text goes to: by its English original, near-duplicates together.

Translations of one text share a split in all languages, so what is tested in one language is trained on in none. The
split of an original depends on the English texts alone, not on which languages are prepared.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

SHINGLE = 5  # characters
NEAR = 0.7  # Jaccard index of two texts' sets of shingles, from which on they are near-duplicates
_TEST_PERCENT, _DEV_PERCENT = 5, 5
_SALT = "texts19"  # with which two articles of the declaration are tested, and two are in dev


def split_of(group: str) -> str:
    """Returns train (90 %), dev (5 %) or test (5 %), by a hash of the group's name."""
    bucket = int(hashlib.sha1(f"{_SALT}:{group}".encode()).hexdigest(), 16) % 100
    if bucket < _TEST_PERCENT:
        return "test"
    return "dev" if bucket < _TEST_PERCENT + _DEV_PERCENT else "train"


def group_keys(forms: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """Puts keys with equal or nearly equal texts into one group.

    Args:
        forms: key -> normal forms (`texts_clean.normal_form`) of its English sentences.

    Returns:
        key -> the smallest key of its group.
    """
    keys_of: dict[str, list[str]] = defaultdict(list)
    for key, its_forms in forms.items():
        for form in its_forms:
            keys_of[form].append(key)
    ordered = sorted(keys_of)
    groups = _Groups(forms)
    for keys in keys_of.values():
        groups.join(keys)
    for first, second in near_pairs(ordered):
        groups.join([keys_of[ordered[first]][0], keys_of[ordered[second]][0]])
    return {key: groups.root(key) for key in forms}


def near_pairs(forms: Sequence[str]) -> Iterable[tuple[int, int]]:
    """Yields the pairs of different forms whose sets of shingles have a Jaccard index of at least `NEAR`.

    Prefix filtering (Chaudhuri, Ganti & Kaushik 2006): with shingles ordered from rare to frequent, two sets that are
    that similar share one of their first |set| - ceil(NEAR * |set|) + 1 shingles. So only few pairs are compared.
    """
    sets = [{form[i : i + SHINGLE] for i in range(max(1, len(form) - SHINGLE + 1))} for form in forms]
    counts = Counter(shingle for shingles in sets for shingle in shingles)
    seen_in: dict[str, list[int]] = defaultdict(list)
    for row in sorted(range(len(sets)), key=lambda row: len(sets[row])):
        shingles = sets[row]
        prefix = sorted(shingles, key=lambda shingle: (counts[shingle], shingle))
        prefix = prefix[: len(shingles) + int(-NEAR * len(shingles) // 1) + 1]
        for other in {other for shingle in prefix for other in seen_in[shingle]}:
            common = len(shingles & sets[other])
            if common >= NEAR * (len(shingles) + len(sets[other]) - common):
                yield other, row
        for shingle in prefix:
            seen_in[shingle].append(row)


class _Groups:
    """Union-find whose roots are the smallest members."""

    def __init__(self, members: Iterable[str]) -> None:
        self._parent = {member: member for member in members}

    def root(self, member: str) -> str:
        while (parent := self._parent[member]) != member:
            self._parent[member] = member = self._parent[parent]
        return member

    def join(self, members: Sequence[str]) -> None:
        roots = {self.root(member) for member in members}
        smallest = min(roots)
        for root in roots:
            self._parent[root] = smallest
