"""Shallow fusion: a neural language model that reads the prefixes of a beam search, token by token.

All prefixes make a tree. Each of its nodes has a slot in the pools of keys and values, so a token is read once however
many prefixes go on from it, and prefixes of any length are read in one batch.

Letters: B new prefixes, S tokens of the longest one, H heads, C width of a head, N slots, V pieces of the recogniser.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mole_asr.decode.beam import Prefix
from mole_asr.text.checkpoint import LanguageModel
from mole_asr.text.model import KeyValueCache


@dataclass(slots=True)
class _Node:
    """Slots of a prefix: of the separator, of each token; and the log-probabilities of what follows."""

    slots_S: np.ndarray
    log_probs_V: np.ndarray


class _Tree(KeyValueCache):
    """Keys and values of a layer are pools [N, H, C]; `slots_BS` says which of them each row of a batch sees.

    Attributes:
        slots_BS: int64; a row is padded in front with any slot, and `valid_BS` is false there.
        valid_BS: bool.
        positions_B: int64, of the new tokens.
        first: their slots begin here.
    """

    slots_BS: Tensor
    valid_BS: Tensor
    positions_B: Tensor
    first: int

    def __len__(self) -> int:
        """Slots in use before the new tokens."""
        return self.first

    def extend(self, layer: int, keys_BHTC: Tensor, values_BHTC: Tensor) -> tuple[Tensor, Tensor]:
        """Writes those of one new token a row into the pools and returns, of each row, all that it sees."""
        seen = []
        for pools, new_BHTC in ((self.keys, keys_BHTC), (self.values, values_BHTC)):
            new_BHC = new_BHTC[:, :, 0]
            end = self.first + len(new_BHC)
            pool = pools.get(layer)
            if pool is None or len(pool) < end:
                larger = new_BHC.new_empty(max(1024, 2 * end), *new_BHC.shape[1:])
                if pool is not None:
                    larger[: self.first] = pool[: self.first]
                pool = pools[layer] = larger
            pool[self.first : end] = new_BHC
            seen.append(pool[self.slots_BS].transpose(1, 2))
        return seen[0], seen[1]

    def positions(self, count: int, device: torch.device) -> Tensor:
        """[B, 1, 1]: of the one new token of each row."""
        return self.positions_B[:, None, None]

    def mask(self, count: int, device: torch.device) -> Tensor:
        """[B, 1, 1, S]: the tokens of each row, itself among them."""
        return self.valid_BS[:, None, None, :]


class FusionModel:
    """A language model for `beam_search`.

    A token looks back at no more tokens than the windows hold that the model was trained on.

    Args:
        language_model: a decoder; its first V ids are the recogniser's pieces, and its separator is their blank.
        num_pieces: V.
    """

    def __init__(self, language_model: LanguageModel, num_pieces: int) -> None:
        self.model, self.window = language_model.model, language_model.window
        self.separator, self.num_pieces = language_model.vocabulary.separator, num_pieces
        self.device = self.model.embedding.weight.device
        self.forget()

    def forget(self) -> None:
        """Forgets all prefixes."""
        self._tree, self._nodes, self._used = _Tree(), dict[Prefix, _Node](), 0

    def __len__(self) -> int:
        """Prefixes that are known."""
        return len(self._nodes)

    def log_probs(self, prefix: Prefix) -> np.ndarray:
        """Natural logarithms float64[V + 1] of what follows a prefix; the last one is the end."""
        return self._nodes[prefix].log_probs_V

    @torch.inference_mode()
    def read(self, prefixes: Iterable[Prefix]) -> None:
        """Reads the last token of each prefix that is new; what stands before it must have been read."""
        new = [prefix for prefix in dict.fromkeys(prefixes) if prefix not in self._nodes]
        if not new:
            return
        own = np.arange(self._used, self._used + len(new))
        before = [self._nodes[prefix[:-1]].slots_S if prefix else own[:0] for prefix in new]
        slots = [np.append(slots_S, slot)[-self.window :] for slots_S, slot in zip(before, own, strict=True)]
        tree, longest = self._tree, max(map(len, slots))
        padded_BS = np.zeros((len(new), longest), np.int64)
        for row, slots_S in enumerate(slots):
            padded_BS[row, longest - len(slots_S) :] = slots_S
        lengths_B = np.array([len(slots_S) for slots_S in slots])
        tree.slots_BS = torch.from_numpy(padded_BS).to(self.device)
        tree.valid_BS = torch.from_numpy(np.arange(longest) >= longest - lengths_B[:, None]).to(self.device)
        tree.positions_B = torch.tensor([len(prefix) for prefix in new], device=self.device)
        tree.first = self._used
        tokens_B = torch.tensor([prefix[-1] if prefix else self.separator for prefix in new], device=self.device)
        logits_BV = self.model(tokens_B[:, None], cache=tree).logits_BTV[:, 0].double().log_softmax(-1)
        pieces = torch.tensor([*range(self.num_pieces), self.separator], device=self.device)
        log_probs_BV = logits_BV[:, pieces].cpu().numpy()
        for prefix, slots_S, log_probs_V in zip(new, slots, log_probs_BV, strict=True):
            self._nodes[prefix] = _Node(slots_S, log_probs_V)
        self._used += len(new)

    def keep(self, prefixes: Iterable[Prefix]) -> None:
        """Forgets all prefixes but these; of those not read yet, all but what they follow."""
        kept = {prefix if prefix in self._nodes else prefix[:-1] for prefix in prefixes}
        self._nodes = {prefix: node for prefix, node in self._nodes.items() if prefix in kept}
        slots_N = np.unique(np.concatenate([node.slots_S for node in self._nodes.values()] or [np.zeros(0, np.int64)]))
        index_N = torch.from_numpy(slots_N).to(self.device)
        for pools in (self._tree.keys, self._tree.values):
            for layer, pool in pools.items():
                pools[layer] = pool[index_N]
        for node in self._nodes.values():
            node.slots_S = np.searchsorted(slots_N, node.slots_S)
        self._used = len(slots_N)
