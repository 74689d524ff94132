import torch
from hypothesis import given
from hypothesis import strategies as st

from mole_asr.decode.greedy import greedy_ctc


def collapse(ids: list[int]) -> list[int]:
    """The definition, one utterance at a time."""
    return [b for a, b in zip([None, *ids], ids, strict=False) if b != 0 and a != b]


@given(st.lists(st.lists(st.integers(0, 3), max_size=12), min_size=1, max_size=4))
def test_agrees_with_the_definition(paths: list[list[int]]) -> None:
    longest = max(len(path) for path in paths)
    ids_BT = torch.randint(0, 4, (len(paths), longest + 2))  # padding holds anything
    for row, path in enumerate(paths):
        ids_BT[row, : len(path)] = torch.tensor(path, dtype=torch.long)
    log_probs_BTV = torch.nn.functional.one_hot(ids_BT, 4).float().log_softmax(-1)
    lengths_B = torch.tensor([len(path) for path in paths])
    assert greedy_ctc(log_probs_BTV, lengths_B) == [collapse(path) for path in paths]
