from pathlib import Path

import pytest
import sentencepiece
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mole_asr.decode.alignment import WORD_MARK, align_words
from mole_asr.decode.greedy import greedy_ctc


class PieceTokenizer:
    def __init__(self, model: Path) -> None:
        self.sp = sentencepiece.SentencePieceProcessor(model_file=str(model))

    def piece(self, token_id: int) -> str:
        return self.sp.id_to_piece(token_id)

    def decode(self, token_ids: list[int]) -> str:
        return self.sp.decode(token_ids)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PieceTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    lines = ["all the birds sing", "the king of all things", "bring the bird a thing", "она поёт", "sing a song"] * 20
    (folder / "text").write_text("\n".join(lines), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "m"), vocab_size=300, byte_fallback=True, pad_id=0,
        pad_piece="<blank>", unk_id=1, bos_id=-1, eos_id=-1, normalization_rule_name="identity", minloglevel=2,
        hard_vocab_limit=False,
    )  # fmt: skip
    return PieceTokenizer(folder / "m.model")


def posteriors(path: list[int], vocab_size: int, sure: float = 0.9) -> torch.Tensor:
    probs_TV = torch.full((len(path), vocab_size), (1 - sure) / (vocab_size - 1))
    probs_TV[torch.arange(len(path)), torch.tensor(path)] = sure
    return probs_TV.log()


def test_times_and_confidence_of_a_known_path(tokenizer: PieceTokenizer) -> None:
    first, second = tokenizer.sp.encode("king"), tokenizer.sp.encode("birds")
    path = [0, 0, *(i for token in first for i in (token, token)), 0, 0, 0, *second, 0]
    log_probs_TV = posteriors(path, tokenizer.sp.vocab_size())
    one, two = align_words(log_probs_TV, first + second, tokenizer, 0.04)
    assert (one.text, two.text) == ("king", "birds")
    spaces = [tokenizer.piece(token_ids[0]) == WORD_MARK for token_ids in (first, second)]
    assert one.start_s == pytest.approx(0.08 + 0.08 * spaces[0])
    assert one.end_s == pytest.approx(0.08 + 0.04 * 2 * len(first))
    assert two.start_s == pytest.approx(one.end_s + 0.12 + 0.04 * spaces[1])
    assert two.end_s == pytest.approx(0.04 * (len(path) - 1))
    assert one.confidence == pytest.approx(0.9, abs=1e-4)


class CharacterTokenizer:
    PIECES = ("<blank>", "<unk>", "▁", "a", "b")

    def piece(self, token_id: int) -> str:
        return self.PIECES[token_id]

    def decode(self, token_ids: list[int]) -> str:
        return "".join(map(self.piece, token_ids)).replace("▁", " ").strip()


def test_a_space_by_itself_is_no_part_of_a_word() -> None:
    space, a, b = 2, 3, 4
    path = [space, 0, a, b, 0, space, 0, 0, 0, 0, b, b, a, 0]
    log_probs_TV = posteriors(path, 5)
    log_probs_TV[5] = posteriors([space], 5, sure=0.4)[0]
    one, two = align_words(log_probs_TV, [space, a, b, space, b, a], CharacterTokenizer(), 0.04)
    assert (one.text, two.text) == ("ab", "ba")
    assert (one.start_s, one.end_s) == (pytest.approx(0.08), pytest.approx(0.16))
    assert (two.start_s, two.end_s) == (pytest.approx(0.4), pytest.approx(0.52))
    assert two.confidence == pytest.approx(0.9, abs=1e-4)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.text("abginorst", min_size=1, max_size=6) | st.sampled_from(["поёт", "日本", "the", "don't", "😀a", "é"])
    ),
    st.integers(0, 99),
)
def test_words_are_the_text_in_order(tokenizer: PieceTokenizer, said: list[str], seed: int) -> None:
    token_ids = tokenizer.sp.encode(" ".join(said))
    torch.manual_seed(seed)
    frames = 2 * len(token_ids) + seed % 7
    log_probs_TV = torch.randn(frames, tokenizer.sp.vocab_size()).log_softmax(-1)
    words = align_words(log_probs_TV, token_ids, tokenizer, 0.04)
    assert " ".join(word.text for word in words) == tokenizer.decode(token_ids) == " ".join(said)
    times = [time for word in words for time in (word.start_s, word.end_s)]
    assert times == sorted(times)
    assert all(word.start_s < word.end_s <= 0.04 * frames + 1e-9 for word in words)
    assert all(0 <= word.confidence <= 1 for word in words)


def test_more_tokens_than_frames_are_spread(tokenizer: PieceTokenizer) -> None:
    token_ids = tokenizer.sp.encode("bb")
    assert len(token_ids) >= 2
    for frames in (0, 1, len(token_ids) - 1):
        log_probs_TV = torch.zeros(frames, tokenizer.sp.vocab_size()).log_softmax(-1)
        (word,) = align_words(log_probs_TV, token_ids, tokenizer, 0.04)
        assert (word.text, word.start_s, word.confidence) == ("bb", 0.0, 0.0)
        assert word.end_s == pytest.approx(0.04 * frames)


def test_nothing_said(tokenizer: PieceTokenizer) -> None:
    assert align_words(torch.zeros(5, 9), [], tokenizer, 0.04) == []
    assert align_words(torch.zeros(0, 9), [], tokenizer, 0.04) == []


def test_the_greedy_path_can_always_be_aligned(tokenizer: PieceTokenizer) -> None:
    torch.manual_seed(0)
    log_probs_TV = torch.randn(50, tokenizer.sp.vocab_size()).log_softmax(-1)
    (token_ids,) = greedy_ctc(log_probs_TV[None], torch.tensor([50]))
    assert all(word.confidence > 0 for word in align_words(log_probs_TV, token_ids, tokenizer, 0.04))
