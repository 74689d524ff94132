"""Whisper's own text decoder as a second head beside the CTC: its training loss, and batched greedy search.

Letters: B batch, T frames, U tokens, V vocabulary, D model width.
"""

import math
from collections.abc import Sequence

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
    def greedy(self, memory_BTD: Tensor, lengths_B: Tensor, languages_B: Tensor) -> list[str]:
        """The text of each utterance: the likeliest token again and again, all utterances at once.

        An utterance that has ended leaves the batch. It ends, too, where it repeats itself (`cut_loop`), and at the
        latest after as many tokens as nobody speaks in its time.

        Args:
            memory_BTD: what the encoder gives.
            lengths_B: int64, its valid frames.
            languages_B: int64, index into the model's languages.
        """
        texts: list[list[int]] = [[] for _ in languages_B]
        limits = (lengths_B // FRAMES_PER_TOKEN + SPARE_TOKENS).clamp(max=self.max_tokens - 4).tolist()
        # Prompts with and without a language differ in length.
        by_length: dict[int, list[int]] = {}
        prompts = self._prompts(languages_B)
        for row, prompt in enumerate(prompts):
            by_length.setdefault(len(prompt), []).append(row)
        for rows in by_length.values():
            self._greedy_rows(memory_BTD, lengths_B, rows, prompts, limits, texts)
        return [self.tokenizer.decode(ids).strip() for ids in texts]

    def _greedy_rows(
        self,
        memory_BTD: Tensor,
        lengths_B: Tensor,
        rows: list[int],
        prompts: list[list[int]],
        limits: list[int],
        texts: list[list[int]],
    ) -> None:
        """Writes the token ids of `rows` into `texts`."""
        device = memory_BTD.device
        cache = self.decoder.cross_cache(memory_BTD[rows], lengths_B[rows])
        logits_BV = self.decoder.read(torch.tensor([prompts[row] for row in rows], device=device), cache)
        while rows:
            # The tokens behind the end sign are signs of languages, tasks and times: no text.
            next_ids = logits_BV[:, : self.tokenizer.end_id + 1].argmax(-1).tolist()
            going = []
            for place, (row, token) in enumerate(zip(rows, next_ids, strict=True)):
                if token != self.tokenizer.end_id and len(texts[row]) < limits[row]:
                    texts[row].append(token)
                    if not cut_loop(texts[row]):
                        going.append(place)
            if not going:
                return
            if len(going) < len(rows):
                cache = cache.select(torch.tensor(going, device=device))
                rows = [rows[place] for place in going]
            last_B1 = torch.tensor([[texts[row][-1]] for row in rows], device=device)
            logits_BV = self.decoder.read(last_B1, cache)

    def _prompts(self, languages_B: Tensor) -> list[list[int]]:
        without = self.tokenizer.prompt(None)
        return [self.prompts[language] if language >= 0 else without for language in languages_B.tolist()]
