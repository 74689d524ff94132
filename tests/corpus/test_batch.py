import numpy as np
import pytest
import torch

from mole_asr.corpus.batch import Batch, Example, collate


def example(samples: int, labels: list[int], language: int = 0, row: int = 0) -> Example:
    audio_S = np.linspace(-1, 1, samples, dtype=np.float32)
    return Example(audio_S, np.array(labels, np.int32), language, row, f"u{row}", "text")


def test_collate_pads_with_zeros_and_keeps_the_order() -> None:
    batch = collate([example(5, [3, 4], 1, 8), example(9, [], -1, 2), example(1, [7, 7, 7], 0, 5)], ["u9: gone"])
    assert len(batch) == 3
    assert batch.audio_BS.shape == (3, 9) and batch.audio_BS.dtype == torch.float32
    assert batch.audio_lengths_B.tolist() == [5, 9, 1]
    torch.testing.assert_close(batch.audio_BS[0, :5], torch.linspace(-1, 1, 5))
    assert not batch.audio_BS[0, 5:].any() and not batch.audio_BS[2, 1:].any()
    assert batch.labels_BU.tolist() == [[3, 4, 0], [0, 0, 0], [7, 7, 7]]
    assert batch.label_lengths_B.tolist() == [2, 0, 3]
    assert batch.languages_B.tolist() == [1, -1, 0]
    assert batch.rows_B.tolist() == [8, 2, 5]
    assert batch.ids == ["u8", "u2", "u5"] and batch.skipped == ["u9: gone"]
    integers = (batch.audio_lengths_B, batch.labels_BU, batch.label_lengths_B, batch.languages_B, batch.rows_B)
    assert all(tensor.dtype == torch.int64 for tensor in integers)


def test_to_moves_every_tensor_and_leaves_the_batch_alone() -> None:
    batch = collate([example(4, [1])], ["x: y"])
    moved = batch.to("meta")
    assert all(value.is_meta for value in vars(moved).values() if isinstance(value, torch.Tensor))
    assert (moved.ids, moved.texts, moved.skipped) == (batch.ids, batch.texts, batch.skipped)
    assert not batch.audio_BS.is_meta


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        collate([])


@pytest.mark.gpu
def test_pinned_memory_moves_to_the_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    batch: Batch = collate([example(4, [1])]).pin_memory()
    assert batch.audio_BS.is_pinned() and batch.to("cuda", non_blocking=True).audio_BS.is_cuda
