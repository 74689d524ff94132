"""Whisper's own text decoder as a second head beside the CTC: its training loss, and batched greedy search.

Letters: B batch, T frames, U tokens, V vocabulary, D model width.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from mole_asr.asr.whisper import WhisperConfig
from mole_asr.asr.whisper_decoder import WhisperDecoder
from mole_asr.asr.whisper_tokenizer import WhisperTokenizer

IGNORED = -100  # no loss there: the prompt and the padding
# Whisper writes about 3 tokens a second in Latin script, 8 in others; 20 ms a frame.
FRAMES_PER_TOKEN = 4
SPARE_TOKENS = 10
# Nobody says the same three times over, so many tokens in all; a decoder that has lost its place goes on for ever.
LOOP_COPIES, LOOP_TOKENS = 3, 8


class Written(NamedTuple):
    """A text, and the mean logarithm of the probability of its tokens, the end sign's too."""

    text: str
    log_prob: float


def cut_loop(ids: list[int]) -> bool:
    """Whether a text ends in a loop: the same tokens at least three times, eight tokens in all; leaves one copy.

    Args:
        ids: tokens; those of the other copies are removed.
    """
    for period in range(1, len(ids) // LOOP_COPIES + 1):
        copies = max(LOOP_COPIES, -(-LOOP_TOKENS // period))
        if copies * period <= len(ids) and ids[-period:] * copies == ids[-copies * period :]:
            del ids[-(copies - 1) * period :]
            return True
    return False


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
    def greedy(self, memory_BTD: Tensor, lengths_B: Tensor, languages_B: Tensor) -> list[Written]:
        """The text of each utterance: the likeliest token again and again, all utterances at once.

        An utterance that has ended leaves the batch. It ends, too, where it repeats itself (`cut_loop`), and at the
        latest after as many tokens as nobody speaks in its time.

        Args:
            memory_BTD: what the encoder gives.
            lengths_B: int64, its valid frames.
            languages_B: int64, index into the model's languages.
        """
        limits = (lengths_B // FRAMES_PER_TOKEN + SPARE_TOKENS).clamp(max=self.max_tokens - 4).tolist()
        # Prompts with and without a language differ in length.
        by_length: dict[int, list[int]] = {}
        prompts = self._prompts(languages_B)
        for row, prompt in enumerate(prompts):
            by_length.setdefault(len(prompt), []).append(row)
        drafts = [_Draft(limit) for limit in limits]
        for rows in by_length.values():
            self._greedy_rows(memory_BTD, lengths_B, rows, prompts, drafts)
        return [Written(self.tokenizer.decode(draft.ids).strip(), draft.log_prob) for draft in drafts]

    def _greedy_rows(
        self, memory_BTD: Tensor, lengths_B: Tensor, rows: list[int], prompts: list[list[int]], drafts: list["_Draft"]
    ) -> None:
        """Writes the drafts of `rows`."""
        device, end = memory_BTD.device, self.tokenizer.end_id
        cache = self.decoder.cross_cache(memory_BTD[rows], lengths_B[rows])
        logits_BV = self.decoder.read(torch.tensor([prompts[row] for row in rows], device=device), cache)
        while rows:
            # The tokens behind the end sign are signs of languages, tasks and times: no text.
            logits_BV = logits_BV[:, : end + 1]
            best_B, next_B = logits_BV.max(-1)
            total_B = logits_BV.logsumexp(-1)
            chances = (best_B - total_B).tolist(), (logits_BV[:, end] - total_B).tolist()
            steps = enumerate(zip(rows, next_B.tolist(), *chances, strict=True))
            going = [place for place, (row, token, *chance) in steps if drafts[row].add(token, token == end, *chance)]
            if not going:
                return
            if len(going) < len(rows):
                cache = cache.select(torch.tensor(going, device=device))
                rows = [rows[place] for place in going]
            last_B1 = torch.tensor([[drafts[row].ids[-1]] for row in rows], device=device)
            logits_BV = self.decoder.read(last_B1, cache)

    def _prompts(self, languages_B: Tensor) -> list[list[int]]:
        without = self.tokenizer.prompt(None)
        return [self.prompts[language] if language >= 0 else without for language in languages_B.tolist()]


class _Draft:
    """A text that is being written.

    Args:
        limit: of its tokens.

    Attributes:
        ids: its tokens.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.ids = limit, list[int]()
        self._log_probs: list[float] = []  # of each token
        self._end_log_probs: list[float] = []  # of the end sign, in place of each token and behind the last

    def add(self, token: int, is_end: bool, log_prob: float, end_log_prob: float) -> bool:
        """Takes the likeliest token; False where the text ends."""
        self._end_log_probs.append(end_log_prob)
        if is_end or len(self.ids) == self.limit:
            return False
        self.ids.append(token)
        self._log_probs.append(log_prob)
        return not cut_loop(self.ids)

    @property
    def log_prob(self) -> float:
        """Mean over the tokens and the end sign behind them."""
        count = len(self.ids)
        return (sum(self._log_probs[:count]) + self._end_log_probs[count]) / (count + 1)
