"""New languages in a trained model: the old bits before training, and what training may touch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mole_asr.asr.checkpoint import load_model, save_model
from mole_asr.asr.extend import extend
from mole_asr.asr.generations import Generation, generations_of, guard, temper, train_last_generation, wake
from mole_asr.asr.losses import losses
from mole_asr.asr.model import MoleModel
from mole_asr.asr.muon import build_optimizer
from mole_asr.cli import main
from mole_asr.corpus.batch import Batch
from mole_asr.corpus.text_tokenizer import TextTokenizer, extend_tokenizer
from mole_asr.decode.ngram import TokenNgram, load_ngrams, save_ngrams
from mole_asr.errors import MoleError
from mole_asr.moe.parts import ASLEEP

from .conftest import LANGUAGES

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "self-conditioned": {"num_mole_blocks": 2, "intermediate_ctc_blocks": (1, 2), "language_tokenizer_block": 0},
    "frames": {"routing_unit": "frame", "reliability": "gumbel"},
    "sigmoid": {"reliability": "sigmoid", "temperature": 2.0},
    "lr_moe": {"reliability": "one", "routing_unit": "frame"},
    "families": {"expert_of": {"de": "gem", "en": "gem", "fr": "fr"}},
    "entropy": {"reliability": "entropy"},
    "dense": {"mixture": "dense"},
    "switch": {"mixture": "switch", "num_experts": 2},
}


@pytest.fixture(scope="module")
def wider_folder(
    tokenizer_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
    write_texts: Callable[[Path, list[str]], Path],
) -> Path:
    """The tokenizer with three more letters."""
    folder = tmp_path_factory.mktemp("wider")
    extend_tokenizer(tokenizer_folder, write_texts(folder / "texts.jsonl", ["abxy zy xz"]), folder, extra_pieces=3)
    return folder


@pytest.fixture
def save(make_model: Callable[..., MoleModel], tokenizer: TextTokenizer, tmp_path: Path) -> Callable[..., Path]:
    """Saves a small model whose heads are sharper than new ones, and gives its folder."""

    def write(**changes: Any) -> Path:
        model = make_model(**changes)
        with torch.no_grad():
            model.ctc.weight.mul_(8)
            model.mixture.language_tokenizer.languages.weight.mul_(8)
        save_model(model, tokenizer, tmp_path / "old")
        return tmp_path / "old"

    return write


@torch.inference_mode()
def outputs(model: MoleModel, batch: Batch) -> list[Any]:
    """What the model gives whole and in single utterances, with the language given and not."""
    found = []
    for told in (None, torch.tensor([0, 1, 2, 0])):
        found.append(model(batch.audio_BS, batch.audio_lengths_B, told))
        for row in range(4):
            length = int(batch.audio_lengths_B[row])
            alone = None if told is None else told[row : row + 1]
            found.append(model(batch.audio_BS[row : row + 1, :length], batch.audio_lengths_B[row : row + 1], alone))
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", [None, "fr"])
def test_old_outputs_keep_their_bits(
    kind: str, family: str | None, save: Callable[..., Path], wider_folder: Path, tmp_path: Path, batch: Batch
) -> None:
    folder = save(**KINDS[kind])
    extend(str(folder), str(tmp_path / "new"), languages=["cs", "nl"], tokenizer=str(wider_folder), family=family)
    # Once more, with what sleeps already.
    extend(str(tmp_path / "new"), str(tmp_path / "newer"), languages=["it"])
    old, tokenizer = load_model(folder)
    new, wider = load_model(tmp_path / "newer")
    V = tokenizer.vocab_size
    assert new.languages == [*LANGUAGES, "cs", "nl", "it"] and wider.vocab_size == V + 3
    assert generations_of(new) == [Generation(3, V), Generation(2, 3), Generation(1, 0)]
    for before, after in zip(outputs(old, batch), outputs(new, batch), strict=True):
        assert torch.equal(after.log_probs_BTV[..., :V], before.log_probs_BTV)
        assert torch.equal(after.language_logits_BN[:, :3], before.language_logits_BN)
        assert torch.equal(after.reliability_B, before.reliability_B)
        for one, other in zip(after.intermediate_log_probs_BTV, before.intermediate_log_probs_BTV, strict=True):
            assert torch.equal(one[..., :V], other)
        posteriors = [m.mixture.language_posterior(o.language_logits_BN) for m, o in ((new, after), (old, before))]
        torch.testing.assert_close(posteriors[0][:, :3], posteriors[1])
        assert not posteriors[0][:, 3:].any() and (after.log_probs_BTV[..., V:] < -1000).all()


def test_a_shared_expert_costs_no_parameter_but_the_language_tokenizers(
    save: Callable[..., Path], tmp_path: Path
) -> None:
    folder = save()
    count = {}
    for family in (None, "en"):
        extend(str(folder), str(tmp_path / str(family)), languages=["cs"], family=family)
        model, _ = load_model(tmp_path / str(family))
        count[family] = sum(p.numel() for p in model.parameters())
    old, _ = load_model(folder)
    row = old.mixture.language_tokenizer.languages.in_features + 1
    assert count["en"] - sum(p.numel() for p in old.parameters()) == row
    assert count[None] - count["en"] == 2 * 16 * 24 + 16 + 24


@pytest.mark.parametrize("kind", ["self-conditioned", "frames", "families", "dense", "switch"])
def test_training_the_new_touches_no_old_bit(
    kind: str, save: Callable[..., Path], wider_folder: Path, tmp_path: Path, batch: Batch
) -> None:
    folder = save(**KINDS[kind])
    extend(str(folder), str(tmp_path / "new"), languages=["cs"], tokenizer=str(wider_folder))
    old, tokenizer = load_model(folder)
    new, wider = load_model(tmp_path / "new")
    wake(new)
    start = {name: tensor.clone() for name, tensor in new.state_dict().items()}
    trained = train_last_generation(new)
    adamw = torch.optim.AdamW(new.parameters(), lr=0.01, weight_decay=0.1)
    muon = build_optimizer(new, lr=0.02, adamw_lr=0.01, weight_decay=0.1)
    for optimizer in (muon, adamw):
        guard(trained, optimizer)
    labels_BU = torch.randint(1, wider.vocab_size, batch.labels_BU.shape)
    czech = Batch(**{**vars(batch), "labels_BU": labels_BU, "languages_B": torch.full((4,), 3)})
    new.train()
    for step in range(12):
        output = new(czech.audio_BS, czech.audio_lengths_B, czech.languages_B, 0.5)
        named = losses(output, czech)
        loss = named["ctc"] + named["language"] + named.get("intermediate_ctc", 0)
        loss.backward()
        (muon if step % 2 else adamw).step()
        new.zero_grad()
    changed = []
    for name, tensor in new.state_dict().items():
        was = old.state_dict()[name]
        changed += [name] if not torch.equal(tensor, start[name]) else []
        for dim, size in enumerate(was.shape):
            tensor = tensor.narrow(dim, 0, size)
        assert torch.equal(tensor, was), name
    V = tokenizer.vocab_size
    heard_old = 0
    for before, after in zip(outputs(old, batch), outputs(new.eval(), batch), strict=True):
        told_or_heard = after.decision.newest_B
        assert told_or_heard is not None
        if told_or_heard.any():  # an utterance that is heard as Czech may change
            continue
        heard_old += 1
        assert torch.equal(after.log_probs_BTV[..., :V], before.log_probs_BTV)
        assert torch.equal(after.reliability_B, before.reliability_B)
        assert (after.log_probs_BTV[..., V:] == ASLEEP).all()
    assert heard_old >= 5, "all that are told"
    new_rows = {"ctc.weight", "ctc.bias", "condition.weight"} & set(start)
    new_rows |= {f"mixture.language_tokenizer.languages.{leaf}" for leaf in ("weight", "bias")}
    if kind in ("self-conditioned", "frames"):
        new_rows |= {name for name in start if name.endswith(("w1_EFD", "b1_EF", "w2_EDF", "b2_ED"))}
    if kind == "families":  # Czech has no relative among these, so it has an expert too
        new_rows |= {name for name in start if name.endswith(("w1_EFD", "b1_EF", "w2_EDF", "b2_ED"))}
    assert set(changed) == new_rows


@pytest.mark.parametrize(("share", "heard"), [(0.5, 2), (1.0, 4)])
def test_a_new_language_that_takes_all_is_tempered(
    share: float, heard: int, save: Callable[..., Path], tmp_path: Path, batch: Batch
) -> None:
    extend(str(save()), str(tmp_path / "new"), languages=["cs", "nl"])
    model, _ = load_model(tmp_path / "new")
    wake(model)
    layer = model.mixture.language_tokenizer.languages
    with torch.no_grad():
        layer.bias[3:] = torch.tensor([50.0, -50.0])
    before = layer.bias.clone()
    czech, old = (Batch(**{**vars(batch), "languages_B": torch.tensor(ids)}) for ids in ([3, 3, 3, 3], [0, 1, 2, 4]))
    temper(model, [czech, old], share)
    own_BN = model(batch.audio_BS, batch.audio_lengths_B).language_logits_BN
    # The one that needs the whole threshold is even with an old language but for rounding.
    lead_B = own_BN[:, 3] - own_BN[:, :3].max(1).values
    assert int((lead_B > -1e-4).sum()) == heard and 20 < before[3] - layer.bias[3] < 80
    assert torch.equal(layer.bias[[0, 1, 2, 4]], before[[0, 1, 2, 4]]), "nor is one raised that is never heard"


def test_ngrams_go_along(save: Callable[..., Path], wider_folder: Path, tmp_path: Path) -> None:
    folder = save()
    V = TextTokenizer(folder).vocab_size
    save_ngrams({"de": TokenNgram.count([[1, 2, 3]], V)}, folder)
    extend(str(folder), str(tmp_path / "new"), languages=["cs"], tokenizer=str(wider_folder))
    old, new = load_ngrams(folder, V)["de"], load_ngrams(tmp_path / "new", V + 3)["de"]
    assert (new.log_probs([1, 2])[[*range(V), V + 3]] == old.log_probs([1, 2])).all()


def test_mistakes_are_explained(save: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, new = str(save()), str(tmp_path / "new")
    for options, match in (
        ({"languages": ["de"]}, "has de already"),
        ({"languages": []}, "name at least one"),
        ({"languages": ["cs"], "family": "sla"}, "no expert 'sla'"),
        ({"languages": ["Czech"]}, "no language code"),
    ):
        with pytest.raises(MoleError, match=match):
            extend(folder, new, **options)
    with pytest.raises(MoleError, match="give another folder"):
        extend(folder, folder, languages=["cs"])
    with pytest.raises(MoleError, match="no new language"):
        train_last_generation(load_model(folder)[0])
    assert main(["extend", folder, new, "--languages", "cs", "nl", "--family", "fr"]) == 0
    assert "0 new experts" in capsys.readouterr().out
