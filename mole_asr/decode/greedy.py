import torch

from mole_asr.decode.beam import BLANK


def greedy_ctc(log_probs_BTV: torch.Tensor, lengths_B: torch.Tensor) -> list[list[int]]:
    """Best-path decoding: the best token of each frame, repeats merged, blanks (id 0) dropped.

    Args:
        log_probs_BTV: CTC scores; any monotone function of the posteriors will do.
        lengths_B: frames of each utterance; later frames are padding and are ignored.

    Returns:
        The token ids of each utterance.
    """
    ids_BT = log_probs_BTV.argmax(dim=-1)
    frames_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
    keep_BT = (ids_BT != BLANK) & (frames_T < lengths_B.to(ids_BT.device)[:, None])
    keep_BT[:, 1:] &= ids_BT[:, 1:] != ids_BT[:, :-1]
    counts = keep_BT.sum(dim=1).tolist()
    return [part.tolist() for part in ids_BT[keep_BT].cpu().split(counts)]
