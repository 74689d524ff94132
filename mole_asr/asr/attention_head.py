"""Whisper's own text decoder as a second head beside the CTC: its training loss, and its batched beam search.

Letters: B batch, T frames, U tokens, V vocabulary, D model width, R drafts of all utterances, C candidates of each.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn import functional

from mole_asr.asr.text_search import BEAM, Prior, TextSearch, Written
from mole_asr.asr.whisper import WhisperConfig
from mole_asr.asr.whisper_decoder import DecoderCache, WhisperDecoder
from mole_asr.asr.whisper_tokenizer import WhisperTokenizer
from mole_asr.errors import MoleError

IGNORED = -100  # no loss there: the prompt and the padding
# Whisper writes about 3 tokens a second in Latin script, 8 in others; 20 ms a frame.
FRAMES_PER_TOKEN = 4
SPARE_TOKENS = 10
# Drafts that are written at once: in float32 their scores of all tokens take 50 MB, their keys and values 200 MB for
# each 32 tokens of Whisper base.
MAX_DRAFTS = 256


class AttentionHead(nn.Module):
    """Text from encoder states, token by token, with the language that the language tokenizer heard in the prompt.

    A text is written as the manifests have it, normalised; Whisper learns that style in its first steps.

    Args:
        config: of the checkpoint.
        tokenizer: Whisper's.
        languages: codes of the model, in its order; one that Whisper has no sign for gets a prompt without a language.
    """

    def __init__(self, config: WhisperConfig, tokenizer: WhisperTokenizer, languages: Sequence[str]) -> None:
        super().__init__()
        self.decoder = WhisperDecoder(config)
        self.tokenizer = tokenizer
        self.max_tokens = config.max_tokens
        self.set_languages(languages)

    def set_languages(self, languages: Sequence[str]) -> None:
        """Says which languages the ids stand for."""
        self.prompts = [self.tokenizer.prompt(code) for code in languages]

    @torch.no_grad()
    def language_opinion(self, memory_BTD: Tensor, lengths_B: Tensor, languages: Sequence[str]) -> Tensor:
        """What the decoder takes for the language, before it is told: float32 log-probabilities [B, N].

        They are those of its signs behind the sign of the start, among the signs of all languages that it knows
        (Radford et al., 2022, section 2.3). A language without a sign is as likely as any.

        Args:
            memory_BTD: what the encoder gives.
            lengths_B: int64, its valid frames.
            languages: codes, N.
        """
        signs = self.tokenizer.language_ids
        start_B1 = torch.full((len(lengths_B), 1), self.tokenizer.prompt(None)[0], device=memory_BTD.device)
        logits_BV = self.decoder.logits(self.decoder.states(start_B1, memory_BTD, lengths_B)[:, 0])
        known_BS = logits_BV[:, list(signs.values())].log_softmax(-1)
        places = [list(signs).index(sign) if (sign := self.tokenizer.sign(code)) else len(signs) for code in languages]
        return functional.pad(known_BS, (0, 1), value=-math.log(len(signs)))[:, places]

    def loss(
        self, memory_BTD: Tensor, lengths_B: Tensor, texts: Sequence[str], languages_B: Tensor, smoothing: float = 0.1
    ) -> Tensor:
        """Cross-entropy of the next token with label smoothing, a mean over tokens.

        Args:
            memory_BTD: what the encoder gives.
            lengths_B: int64, its valid frames.
            texts: what is said.
            languages_B: int64, index into the model's languages; -1 leaves the language out of the prompt.
            smoothing: share of the probability that is spread over all tokens.
        """
        prompts = self._prompts(languages_B)
        bodies = [self.tokenizer.encode(text)[: self.max_tokens - len(prompts[0]) - 1] for text in texts]
        rows = [prompt + body + [self.tokenizer.end_id] for prompt, body in zip(prompts, bodies, strict=True)]
        size = max(map(len, rows)) - 1
        inputs_BU = torch.full((len(rows), size), self.tokenizer.end_id)
        targets_BU = torch.full((len(rows), size), IGNORED)
        for number, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
            inputs_BU[number, : len(row) - 1] = torch.tensor(row[:-1])
            targets_BU[number, len(prompt) - 1 : len(row) - 1] = torch.tensor(row[len(prompt) :])
        device = memory_BTD.device
        states_BUD = self.decoder.states(inputs_BU.to(device), memory_BTD, lengths_B)
        # Only where there is a target: the product with all the vocabulary is most of the work.
        wanted_BU = (targets_BU != IGNORED).to(device)
        logits_NV = self.decoder.logits(states_BUD[wanted_BU])
        return functional.cross_entropy(logits_NV, targets_BU.to(device)[wanted_BU], label_smoothing=smoothing)

    @torch.no_grad()
    def write(
        self,
        memory_BTD: Tensor,
        lengths_B: Tensor,
        languages_B: Tensor,
        beam: int = BEAM,
        words: Mapping[int, Callable[[str, bool], float]] | None = None,
    ) -> list[Written]:
        """The text of each utterance: a beam search (`TextSearch`), all utterances at once.

        A text has at most as many tokens as anybody speaks in its time.

        Args:
            memory_BTD: what the encoder gives.
            lengths_B: int64, its valid frames.
            languages_B: int64, index into the model's languages.
            beam: drafts of an utterance that go on together, from 1 (greedy) to `MAX_DRAFTS`.
            words: of a language, what a text's words say for it; called with the text and whether it is whole; see
                `TextSearch.prior`.

        Raises:
            MoleError: there is no such beam.
        """
        if not 1 <= beam <= MAX_DRAFTS:
            raise MoleError(f"beam {beam}: must be from 1 to {MAX_DRAFTS}")
        limits = (lengths_B // FRAMES_PER_TOKEN + SPARE_TOKENS).clamp(max=self.max_tokens - 4).tolist()
        searches = [
            TextSearch(beam, limit, self.tokenizer.end_id, self._prior((words or {}).get(language)))
            for limit, language in zip(limits, languages_B.tolist(), strict=True)
        ]
        # Prompts with and without a language differ in length.
        by_length: dict[int, list[int]] = {}
        prompts = self._prompts(languages_B)
        for row, prompt in enumerate(prompts):
            by_length.setdefault(len(prompt), []).append(row)
        count = MAX_DRAFTS // beam
        for alike in by_length.values():
            for first in range(0, len(alike), count):
                rows = alike[first : first + count]
                cache = self.decoder.cross_cache(memory_BTD[rows], lengths_B[rows])
                self._search([searches[row] for row in rows], [prompts[row] for row in rows], cache)
        best = [search.best for search in searches]
        return [Written(self.tokenizer.decode(draft.ids).strip(), draft.mean_log_prob, score) for draft, score in best]

    def _prior(self, words: Callable[[str, bool], float] | None) -> Prior | None:
        """What a search asks about words."""
        return None if words is None else lambda ids, whole: words(self.tokenizer.decode(ids), whole)

    def _search(self, searches: list[TextSearch], prompts: list[list[int]], cache: DecoderCache) -> None:
        """Goes on with all searches to their ends."""
        device = cache.bias_G1T.device
        read_RU = prompts
        while searches:
            # The tokens behind the end sign are signs of languages, tasks and times: no text.
            logits_RV = self.decoder.read(torch.tensor(read_RU, device=device), cache)[:, : self.tokenizer.end_id + 1]
            total_R1 = logits_RV.logsumexp(-1, keepdim=True)
            best_RC, tokens_RC = logits_RV.topk(min(2 * searches[0].beam, logits_RV.shape[1]))
            rows = zip(
                tokens_RC.tolist(),
                (best_RC - total_R1).tolist(),
                (logits_RV[:, -1:] - total_R1).flatten().tolist(),
                strict=True,
            )
            going, parents, first = list[int](), list[int](), 0
            for place, search in enumerate(searches):
                count = len(search.drafts)
                kept = search.step(*zip(*islice(rows, count), strict=True))
                if kept:
                    going.append(place)
                    parents += [first + each for each in kept]
                first += count
            if parents != list(range(first)):
                cache.select(
                    torch.tensor(parents, dtype=torch.long, device=device),
                    None if len(going) == len(searches) else torch.tensor(going, dtype=torch.long, device=device),
                )
            searches = [searches[place] for place in going]
            read_RU = [draft.ids[-1:] for search in searches for draft in search.drafts]

    def _prompts(self, languages_B: Tensor) -> list[list[int]]:
        without = self.tokenizer.prompt(None)
        return [self.prompts[language] if language >= 0 else without for language in languages_B.tolist()]
