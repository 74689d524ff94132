"""Recordings to text: read -> segments -> batches by length -> model -> CTC search -> word times -> transcript.

Shape letters: B batch, S samples, T frames, V vocabulary, N languages.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from mole_asr.asr.generations import contemporaries
from mole_asr.asr.text_search import BEAM
from mole_asr.audio.segment import MAX_SECONDS
from mole_asr.corpus.normalize import normalize
from mole_asr.decode.alignment import Tokenizer, align_words
from mole_asr.decode.decoder import CtcDecoder, LmMode
from mole_asr.decode.ngram import TokenNgram, load_ngrams
from mole_asr.decode.word import Word
from mole_asr.decode.words import WordList, load_words
from mole_asr.errors import MoleError
from mole_asr.transcribe.few_languages import expect_few_languages
from mole_asr.transcribe.pieces import Heard, Input, Piece, Recording, batches, cut, name_of, pad, read_input
from mole_asr.transcribe.transcript import Segment, Transcript

if TYPE_CHECKING:
    from mole_asr.asr.checkpoint import Recogniser
    from mole_asr.asr.model import ModelOutput
    from mole_asr.asr.text_search import Written

Head = Literal["attention", "ctc"]
Precision = Literal["32-true", "bf16-mixed"]

# Sorting needs a choice of segments; more of them would only delay the first text and take more memory.
_WINDOW_BATCHES = 4
# The first window is this part of a full one, so that the first text comes soon; each next one is twice as long.
_FIRST_WINDOW = 1 / 16
# Where no language is as likely as this, the attention head writes in each of the likeliest five.
_SURE, _CANDIDATES = 0.98, 5
# What a text says for its language: the logarithm of its probability a token, times this. Both were chosen on new
# voices that recipes/whisper_mole does not score; its README says what they bring.
_TEXT_WEIGHT = 10.0


def load(folder: str | Path, device: str | torch.device | None = None) -> "Transcriber":
    """Loads a trained model for transcription.

    Args:
        folder: what training wrote: `model.safetensors`, `config.json`, `tokenizer.model`, `languages.json`.
        device: where to run; None takes the GPU if there is one.

    Raises:
        MoleError: a file is missing or does not fit the others.
    """
    from mole_asr.asr.checkpoint import load_model

    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model, tokenizer = load_model(Path(folder), device)
    return Transcriber(model, tokenizer, device, ngrams=load_ngrams(folder, tokenizer.vocab_size))


class Transcriber:
    """A model with its text tokenizer, ready to transcribe.

    Attributes:
        model: in evaluation mode, on `device`.
        tokenizer: its text tokenizer.
        max_seconds: recordings longer than this are cut at their pauses.
        decoder: of the CTC head: its n-grams, its beam, its weights.
        text_beam: drafts that the text decoder keeps; 1 is greedy.
        words: word lists by language: they help the attention head choose among its drafts, and among languages.
        few_languages: whether recordings are taken to be in the same few languages, for the attention head, where no
            language is given (see `few_languages.py`).
        head: "attention" writes with the text decoder of a model that has one, "ctc" with the CTC head alone.
        precision: "32-true", or "bf16-mixed": faster where the processor has bfloat16 products.
        failures: (id, reason) of each input of the last call that could not be read and was skipped.
    """

    def __init__(
        self,
        model: "Recogniser",
        tokenizer: Tokenizer,
        device: str | torch.device = "cpu",
        max_seconds: float = MAX_SECONDS,
        ngrams: Mapping[str, TokenNgram] | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.device = torch.device(device)
        self.max_seconds = max_seconds
        self.decoder = CtcDecoder(tokenizer, ngrams or {})
        self.text_beam = BEAM
        self.words: dict[str, WordList] = {}
        self.few_languages = False
        self.head: Head = "ctc" if model.attention_head is None else "attention"
        self.precision: Precision = "32-true"
        self.failures: list[tuple[str, str]] = []

    def transcribe(
        self, inputs: Input | Iterable[Input], language: str | None = None, batch_seconds: float = 240.0
    ) -> Iterator[Transcript]:
        """Transcribes recordings, in the order given.

        Inputs are read as they are needed and sorted by length within a window of a few batches: memory does not grow
        with their number, and texts come while later files are still unread.

        Args:
            inputs: one or many of: path of an audio file, float samples [S] at 16 kHz, utterance of a manifest.
            language: its code, if known; None leaves it to the model.
            batch_seconds: sound in a batch, padding included; less needs less memory.

        Returns:
            An iterator of one transcript for each input that can be read; the others are in `failures`.

        Raises:
            MoleError: the model does not know the language, or few languages are expected where that says nothing.
        """
        if self.few_languages and self.head != "attention":
            raise MoleError(f"few-languages: serves the attention head; {self._where_it_is()}")
        if self.few_languages and language is not None:
            raise MoleError(f"few-languages: the language is given, {language}; leave one of the two out")
        language_id = None if language is None else self._language_id(language)
        self.failures = []
        if isinstance(inputs, str | Path | np.ndarray) or hasattr(inputs, "audio_path"):
            inputs = [inputs]  # type: ignore[list-item]
        return self._transcribe(inputs, language_id, batch_seconds)

    def choose_head(self, head: Head) -> None:
        """Says which head of the model writes.

        Raises:
            MoleError: the model has no such head.
        """
        if head == "attention" and self.model.attention_head is None:
            raise MoleError("head: the model has no attention head; leave the option out")
        self.head = head

    def choose_beam(self, beam: int) -> None:
        """Says how many texts the search of either head keeps.

        Args:
            beam: 0 decodes greedily, the CTC head by the sound alone; to the attention head 1 is the same.

        Raises:
            MoleError: it is negative.
        """
        if beam < 0:
            raise MoleError(f"beam {beam}: must be at least 0")
        self.decoder.beam, self.text_beam = beam, max(1, beam)

    def choose_weights(self, weights: Mapping[str, float]) -> None:
        """Says what the search of the CTC head believes.

        Args:
            weights: fields of `decode.decoder.Weights`; others stay as they are.

        Raises:
            MoleError: some are not zero, and the CTC head does not write, or does not search.
        """
        if any(weights.values()) and (self.head != "ctc" or not self.decoder.beam):
            raise MoleError(
                "ngram-weight, length-bonus: serve the search of the CTC head; give --head ctc, no --beam 0"
            )
        self.decoder.weights = replace(self.decoder.weights, **weights)

    def use_language_model(self, folder: str | Path, mode: LmMode) -> None:
        """Lets a neural language model help the CTC head.

        Args:
            folder: of a trained text model.
            mode: "rescore" puts what the search has found into a new order, by whole texts; "fusion" scores within the
                search, token by token.

        Raises:
            MoleError: the CTC head does not write, or does not search; or the language model does not fit.
        """
        if self.head != "ctc":
            raise MoleError("lm: serves the CTC head; give --head ctc too")
        if not self.decoder.beam:
            raise MoleError("lm: needs a search; give a --beam above 0, or leave it out")
        self.decoder.use(folder, mode, self.device)

    def use_words(self, folder: str | Path) -> None:
        """Lets word lists help the attention head.

        Args:
            folder: of the lists, `xx.tsv` a language (see `decode/words.py`).

        Raises:
            MoleError: there is none of a language of the model, or the attention head does not write.
        """
        if self.head != "attention":
            raise MoleError(f"words: serve the attention head; {self._where_it_is()}")
        self.words = load_words(folder, self.model.languages)

    def _where_it_is(self) -> str:
        return "the model has none" if self.model.attention_head is None else "leave --head ctc out"

    def _language_id(self, language: str) -> int:
        known = list(self.model.languages)
        if language in known:
            return known.index(language)
        close = get_close_matches(language, known, n=1)
        hint = f"; did you mean '{close[0]}'?" if close else ""
        raise MoleError(f"language '{language}': the model knows only {', '.join(known)}{hint}")

    def _transcribe(
        self, inputs: Iterable[Input], language_id: int | None, batch_seconds: float
    ) -> Iterator[Transcript]:
        for window in self._windows(inputs, _WINDOW_BATCHES * batch_seconds):
            pieces = [piece for recording in window for piece in recording.pieces]
            for batch in batches(pieces, batch_seconds):
                told = None if language_id is None else [language_id] * len(batch)
                for piece, heard in zip(batch, self._listen(batch, told), strict=True):
                    piece.heard = heard
            if language_id is None and self.head == "attention" and pieces:
                self._reconsider(pieces, batch_seconds)
            for recording in window:
                yield self._transcript(recording, language_id)

    def _windows(self, inputs: Iterable[Input], window_s: float) -> Iterator[list[Recording]]:
        window: list[Recording] = []
        # The prior of few languages is that of a window.
        seconds, wanted_s = 0.0, window_s if self.few_languages else _FIRST_WINDOW * window_s
        for index, item in enumerate(inputs):
            try:
                name, audio_S = read_input(item, index)
            except (MoleError, OSError) as error:
                self.failures.append((name_of(item, index), str(error)))
                continue
            window.append(cut(name, audio_S, self.max_seconds))
            seconds += window[-1].duration_s
            if seconds >= wanted_s:
                yield window
                window, seconds, wanted_s = [], 0.0, min(2 * wanted_s, window_s)
        yield window

    def _reconsider(self, pieces: list[Piece], batch_seconds: float) -> None:
        """Compares the likeliest languages where that is unsure, or not the one that the piece was written in.

        Where few languages are expected, what is heard of a piece depends on all of these.
        """
        posterior_PN = np.stack([self._possible(piece.heard.language_probabilities_N) for piece in pieces])
        written_P = posterior_PN.argmax(1)
        if self.few_languages:
            posterior_PN = expect_few_languages(posterior_PN)
        unsure_P = (posterior_PN.max(1) < _SURE) | (posterior_PN.argmax(1) != written_P)
        for piece, posterior_N, unsure in zip(pieces, posterior_PN, unsure_P, strict=True):
            if unsure or self.few_languages:
                piece.heard.language_probabilities_N, piece.heard.reliability = posterior_N, float(posterior_N.max())
        for batch in batches([pieces[place] for place in unsure_P.nonzero()[0]], batch_seconds):
            self._compare_languages(batch)

    def _possible(self, posterior_N: np.ndarray) -> np.ndarray:
        """The posterior among the languages that the likeliest one can be confused with (see `generations`)."""
        count = contemporaries(self.model, int(posterior_N.argmax()))
        possible_N = np.where(np.arange(len(posterior_N)) < count, posterior_N, 0.0)
        return possible_N / possible_N.sum()

    def _compare_languages(self, batch: list[Piece]) -> None:
        """Listens once more in each of the likeliest languages of a piece; the likeliest text tells which it is.

        A posterior p becomes p x exp(`_TEXT_WEIGHT` x log-probability of the text a token), among these languages;
        that of the language chosen is the reliability. Words have a say where each of the languages has a list.
        """
        posterior_BN = np.stack([piece.heard.language_probabilities_N for piece in batch])
        order_BC = (-posterior_BN).argsort(axis=1, kind="stable")[:, :_CANDIDATES]
        heard_CB = [self._listen(batch, languages.tolist()) for languages in order_BC.T]
        with np.errstate(divide="ignore"):  # a language without any probability gets none
            prior_BC = np.log(np.take_along_axis(posterior_BN, order_BC, axis=1))
        for row, piece in enumerate(batch):
            candidates = [heard_B[row] for heard_B in heard_CB]
            listed = all(self.model.languages[language] in self.words for language in order_BC[row])
            said_C = np.array([each.score if listed else each.log_prob for each in candidates])
            score_C = prior_BC[row] + _TEXT_WEIGHT * said_C
            share_C = np.exp(score_C - score_C.max())
            after_N = posterior_BN[row].copy()
            after_N[order_BC[row]] = after_N[order_BC[row]].sum() * share_C / share_C.sum()
            chosen, reliability = candidates[int(score_C.argmax())], float(after_N.max())
            piece.heard = replace(chosen, reliability=reliability, language_probabilities_N=after_N)

    # Not inference_mode: under autocast it casts every weight anew in each step of the text decoder.
    @torch.no_grad()
    def _listen(self, batch: list[Piece], languages: list[int] | None) -> list[Heard]:
        """Runs the model on a batch, told the language of each piece or None."""
        audio_BS, lengths_B = pad([piece.audio_S for piece in batch])
        languages_B = None if languages is None else torch.tensor(languages)
        told_B = None if languages_B is None else languages_B.to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16-mixed"):
            output = self.model(audio_BS.to(self.device), lengths_B.to(self.device), told_B)
            probabilities_BN = self.model.mixture.language_posterior(output.language_logits_BN).cpu()
            heard_B = probabilities_BN.argmax(1) if languages_B is None else languages_B
            written = self._write(output, heard_B)
        log_probs_BTV, frames = output.log_probs_BTV.float().cpu(), output.lengths_B.tolist()
        log_probs = [log_probs_TV[:count] for log_probs_TV, count in zip(log_probs_BTV, frames, strict=True)]
        said: Sequence[list[int] | str]
        if written is None:
            codes = [self.model.languages[language] for language in heard_B.tolist()]
            said = self.decoder.decode([each_TV.numpy() for each_TV in log_probs], codes)
        else:
            said = [each.text for each in written]
        words = [self._align(*each) for each in zip(log_probs, said, strict=True)]
        facts = zip(words, output.reliability_B.tolist(), probabilities_BN.numpy(), strict=True)
        heard = [Heard(*each) for each in facts]
        for each, text in zip(heard, written or [], strict=False):
            each.log_prob, each.score = text.log_prob, text.score
        return heard

    def _write(self, output: "ModelOutput", languages_B: Tensor) -> "list[Written] | None":
        """The texts that the attention head writes; None where the CTC head is to do it."""
        head = self.model.attention_head
        if self.head == "ctc" or head is None or output.memory_BTD is None:
            return None
        words = {n: self.words[code].score for n, code in enumerate(self.model.languages) if code in self.words}
        written = head.write(output.memory_BTD, output.frames.lengths_B, languages_B, self.text_beam, words)
        codes = [self.model.languages[language] for language in languages_B.tolist()]
        return [each._replace(text=normalize(each.text, code)) for each, code in zip(written, codes, strict=True)]

    def _align(self, log_probs_TV: Tensor, said: list[int] | str) -> list[Word]:
        """Words and their times, of token ids or of a text."""
        if not isinstance(said, str):
            return align_words(log_probs_TV, said, self.tokenizer, self.model.frame_shift_s)
        words = align_words(log_probs_TV, self.tokenizer.encode(said), self.tokenizer, self.model.frame_shift_s)
        spelled = said.split()
        if len(words) == len(spelled):  # a letter that the CTC head does not know comes back as a sign of that
            words = [replace(word, text=text) for word, text in zip(words, spelled, strict=True)]
        return words

    def _transcript(self, recording: Recording, language_id: int | None) -> Transcript:
        """Joins the pieces; language and reliability are means over them, weighted by their seconds."""
        pieces = recording.pieces
        segments = [
            Segment(piece.start_s, piece.end_s, " ".join(word.text for word in words), words)
            for piece in pieces
            if (words := piece.words)
        ]
        text = " ".join(segment.text for segment in segments)
        if not pieces:
            return Transcript(recording.id, text, "", 0.0, {}, recording.duration_s)
        weights = np.array([piece.end_s - piece.start_s for piece in pieces])
        weights /= weights.sum()
        mean_N = weights @ np.stack([piece.heard.language_probabilities_N for piece in pieces])
        reliability = float(weights @ np.array([piece.heard.reliability for piece in pieces]))
        probabilities = dict(zip(self.model.languages, mean_N.tolist(), strict=True))
        language = self.model.languages[int(mean_N.argmax()) if language_id is None else language_id]
        return Transcript(recording.id, text, language, reliability, probabilities, recording.duration_s, segments)
