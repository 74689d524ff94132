"""CTC log-probabilities to token ids: greedy, or beam search with n-grams and a neural language model.

Letters: T frames, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from mole_asr.corpus.text_tokenizer import TextTokenizer
from mole_asr.decode.alignment import Tokenizer
from mole_asr.decode.beam import BEAM, Hypothesis, Weights, beam_search
from mole_asr.decode.fusion import FusionModel
from mole_asr.decode.greedy import greedy_ctc
from mole_asr.decode.ngram import TokenNgram
from mole_asr.decode.rescore import rescore
from mole_asr.errors import MoleError
from mole_asr.text.checkpoint import LanguageModel, load_text_model

LmMode = Literal["rescore", "fusion"]
# Chosen on the dev split of recipes/prompts5 (lm/results.json there).
WEIGHTS: dict[LmMode | None, Weights] = {
    None: Weights(),
    "rescore": Weights(ngram=0.4, lm=0.2, bonus=0.9),
    "fusion": Weights(ngram=0.4, lm=0.4, bonus=0.9),
}
# Utterances that are searched side by side; more take more memory.
_TOGETHER = 48


@dataclass(eq=False)
class CtcDecoder:
    """Chooses the token ids of utterances.

    Attributes:
        tokenizer: spells token ids.
        ngrams: language -> n-grams of its training texts. A language without any is decoded greedily where there is no
            neural language model either.
        beam: prefixes that the search keeps; 0 decodes greedily.
        weights: of the n-grams, of the neural language model, and for each token.
        fusion: a neural language model that scores the prefixes of the search.
        rescorer: one that scores the whole texts which the search has found.
    """

    tokenizer: Tokenizer
    ngrams: Mapping[str, TokenNgram] = field(default_factory=dict)
    beam: int = BEAM
    weights: Weights = field(default_factory=Weights)
    fusion: FusionModel | None = None
    rescorer: LanguageModel | None = None

    def use(self, folder: str | Path, mode: LmMode, device: torch.device) -> None:
        """Loads a neural language model, and takes the weights that go with it.

        Raises:
            MoleError: it cannot be read, is an encoder, or has other pieces and is to be fused.
        """
        model = load_text_model(folder, device)
        if not model.model.config.causal:
            raise MoleError(f"--lm {folder}: is an encoder; only a decoder (model.network.causal true) scores texts")
        if mode == "fusion":
            assert isinstance(self.tokenizer, TextTokenizer)
            if model.vocabulary.fingerprint != self.tokenizer.model:
                raise MoleError(
                    f"--lm {folder}: its pieces are not the recogniser's; give --lm-mode rescore, "
                    "or train it with data.vocabulary set to the recogniser's folder"
                )
            self.fusion, self.rescorer = FusionModel(model, self.tokenizer.vocab_size), None
        else:
            self.fusion, self.rescorer = None, model
        self.weights = WEIGHTS[mode]

    def decode(self, log_probs: Sequence[np.ndarray], languages: Sequence[str]) -> list[list[int]]:
        """Token ids of each utterance.

        Args:
            log_probs: of each utterance, float [T, V] natural logarithms; id 0 is the blank.
            languages: of each utterance; says which n-grams count.
        """
        neural = self.fusion is not None or self.rescorer is not None
        searched = [row for row, code in enumerate(languages) if self.beam and (neural or code in self.ngrams)]
        nbests = self.nbest([log_probs[row] for row in searched], [languages[row] for row in searched])
        found = {row: list(nbest[0].ids) for row, nbest in zip(searched, nbests, strict=True)}
        return [found[row] if row in found else _greedy(frames_TV) for row, frames_TV in enumerate(log_probs)]

    def nbest(self, log_probs: Sequence[np.ndarray], languages: Sequence[str]) -> list[list[Hypothesis]]:
        """The hypotheses of each utterance, best first, at most `beam`; arguments as those of `decode`."""
        ngrams = [self.ngrams.get(code) for code in languages]
        parts = [slice(start, start + _TOGETHER) for start in range(0, len(log_probs), _TOGETHER)]
        return [nbest for part in parts for nbest in self._nbest(log_probs[part], ngrams[part])]

    def _nbest(self, log_probs: Sequence[np.ndarray], ngrams: Sequence[TokenNgram | None]) -> list[list[Hypothesis]]:
        if self.fusion is not None:
            self.fusion.forget()
        if self.rescorer is None:
            return beam_search(log_probs, ngrams, self.fusion, self.weights, self.beam)
        first_pass = replace(self.weights, lm=0.0, bonus=WEIGHTS[None].bonus)
        return [
            rescore(nbest, [self.tokenizer.decode(list(each.ids)) for each in nbest], self.rescorer, self.weights)
            for nbest in beam_search(log_probs, ngrams, None, first_pass, self.beam)
        ]


def _greedy(frames_TV: np.ndarray) -> list[int]:
    return greedy_ctc(torch.from_numpy(frames_TV)[None], torch.tensor([len(frames_TV)]))[0]
