from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mole_asr.asr.generations import merge_generations, wake
from mole_asr.asr.grow import grow_model
from mole_asr.asr.model import MoleModel
from mole_asr.corpus.batch import Batch
from mole_asr.corpus.text_tokenizer import TextTokenizer, extend_tokenizer, train_tokenizer
from mole_asr.errors import MoleError
from mole_asr.moe.parts import ASLEEP

from .conftest import LANGUAGES


@pytest.fixture(scope="module")
def wider(
    tokenizer_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
    write_texts: Callable[[Path, list[str]], Path],
) -> TextTokenizer:
    folder = tmp_path_factory.mktemp("wider")
    texts = write_texts(folder / "texts.jsonl", ["abxy zy xz"])
    return extend_tokenizer(tokenizer_folder, texts, folder, extra_pieces=3)


@pytest.fixture
def old(make_model: Callable[..., MoleModel]) -> MoleModel:
    return make_model(num_mole_blocks=2, intermediate_ctc_blocks=(1,), language_tokenizer_block=0).eval()


def test_old_rows_are_untouched_and_a_new_expert_is_the_agnostic_one(
    old: MoleModel, tokenizer: TextTokenizer, wider: TextTokenizer
) -> None:
    before = {name: tensor.clone() for name, tensor in old.state_dict().items()}
    grown = grow_model(old, tokenizer, wider, [*LANGUAGES, "xx"])
    assert grown.languages == [*LANGUAGES, "xx"] and grown.vocab_size == tokenizer.vocab_size + 3
    state = grown.state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in old.state_dict().items())
    assert state.keys() == before.keys()
    for name, tensor in before.items():
        new = state[name]
        for dim, size in enumerate(tensor.shape):
            new = new.narrow(dim, 0, size)
        assert torch.equal(new, tensor), name
    for block in (1, 2):
        experts = grown.blocks[block].feed_forward_out.moe.experts
        shared = experts.shared_weights()
        assert all(torch.equal(a[3], b) for a, b in zip(experts.stack(), shared, strict=True))
    assert not grown.ctc.weight[-3:].any() and (grown.ctc.bias[-3:] == ASLEEP).all()
    wake(grown)
    assert not grown.ctc.weight[-3:].any() and (grown.ctc.bias[-3:] == -10).all()
    languages = grown.mixture.language_tokenizer.languages
    torch.testing.assert_close(languages.weight[3], languages.weight[:3].mean(0))
    torch.testing.assert_close(languages.bias[3], languages.bias[:3].mean())


def test_awake_but_untrained_pieces_change_little(
    make_model: Callable[..., MoleModel], tokenizer: TextTokenizer, wider: TextTokenizer, batch: Batch
) -> None:
    """Asleep, they change nothing: see test_extend.py."""
    old = make_model(intermediate_ctc_blocks=(), reliability="sigmoid").eval()
    grown = grow_model(old, tokenizer, wider, [*LANGUAGES, "xx"]).eval()
    wake(grown)
    merge_generations(grown)
    told = torch.tensor([0, 1, 2, 0])
    before, after = (model(batch.audio_BS, batch.audio_lengths_B, told) for model in (old, grown))
    valid_BT = before.frames.valid_BT
    change_BTV = after.log_probs_BTV[..., : tokenizer.vocab_size] - before.log_probs_BTV
    assert 0 < change_BTV[valid_BT].abs().max() < 1e-3


def test_growing_by_nothing_gives_the_same_model(old: MoleModel, tokenizer: TextTokenizer, batch: Batch) -> None:
    grown = grow_model(old, tokenizer, tokenizer, LANGUAGES).eval()
    before, after = (model(batch.audio_BS, batch.audio_lengths_B) for model in (old, grown))
    assert torch.equal(before.log_probs_BTV, after.log_probs_BTV)


def test_a_dense_model_grows_too(
    make_model: Callable[..., MoleModel], tokenizer: TextTokenizer, wider: TextTokenizer, batch: Batch
) -> None:
    grown = grow_model(make_model(num_mole_blocks=0), tokenizer, wider, [*LANGUAGES, "xx"])
    assert grown(batch.audio_BS, batch.audio_lengths_B).language_logits_BN.shape == (4, 4)


def test_what_would_change_the_meaning_of_old_ids_is_refused(
    old: MoleModel,
    tokenizer: TextTokenizer,
    wider: TextTokenizer,
    tmp_path: Path,
    write_texts: Callable[[Path, list[str]], Path],
) -> None:
    for languages in (["en", "de", "fr"], ["xx", *LANGUAGES], ["de", "en"]):
        with pytest.raises(MoleError, match=r"data\.languages") as caught:
            grow_model(old, tokenizer, wider, languages)
        assert "\n" not in str(caught.value)
    texts = write_texts(tmp_path / "texts.jsonl", ["dcba xyz"])
    other = train_tokenizer(texts, tmp_path, vocab_size=50, byte_fallback=False, model_type="char")
    with pytest.raises(MoleError, match="tokenizer extend"):
        grow_model(old, tokenizer, other, LANGUAGES)


def test_fewer_pieces_are_refused(
    make_model: Callable[..., MoleModel], tokenizer: TextTokenizer, wider: TextTokenizer
) -> None:
    torch.manual_seed(0)
    big = MoleModel(make_model().config, LANGUAGES, wider.vocab_size)
    with pytest.raises(MoleError, match="tokenizer extend"):
        grow_model(big, wider, tokenizer, LANGUAGES)
