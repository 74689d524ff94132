"""MoLE and its rivals as switches of one model: who computes, what is learned, what is counted, saved and grown."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mole_asr.asr.checkpoint import load_model, save_model
from mole_asr.asr.grow import grow_model
from mole_asr.asr.language_tokenizer import LanguageEvidence
from mole_asr.asr.losses import losses
from mole_asr.asr.mixture import PaddedFrames
from mole_asr.asr.model import ModelOutput, MoleModel
from mole_asr.asr.parameters import count_parameters
from mole_asr.corpus.batch import Batch
from mole_asr.corpus.families import family_of
from mole_asr.corpus.text_tokenizer import TextTokenizer
from mole_asr.errors import MoleError

from .conftest import LANGUAGES, small_config

WIDTH = 48  # of all experts that compute a frame, together
SYSTEMS: dict[str, dict[str, Any]] = {
    "dense": {"mixture": "dense", "expert_d_ff": WIDTH, "language_probe": True},
    "dense-embedding": {"mixture": "dense", "expert_d_ff": WIDTH, "language_embedding": True, "routing": "true"},
    "switch": {"mixture": "switch", "expert_d_ff": WIDTH, "num_experts": 4, "language_probe": True},
    "omni": {"mixture": "omni", "expert_d_ff": WIDTH, "num_experts": 4, "num_mole_blocks": 2},
    "lr-moe": {"reliability": "one", "routing_unit": "frame", "expert_d_ff": WIDTH},
    "dlg-moe": {"mixture": "group", "routing_unit": "frame", "expert_d_ff": WIDTH // 2, "num_experts": 3, "top_k": 2},
    "post-moe": {"mixture": "forced", "expert_d_ff": WIDTH // 2, "top_k": 2},
    "post-moe of families": {"mixture": "forced", "expert_of": "family", "expert_d_ff": WIDTH // 2, "top_k": 2},
    "group by utterance": {"mixture": "group", "expert_d_ff": WIDTH, "num_experts": 2},
    "mole": {"expert_d_ff": WIDTH // 2},
    "mole sigmoid by frame": {"expert_d_ff": WIDTH // 2, "reliability": "sigmoid", "routing_unit": "frame"},
    "mole-family": {"expert_d_ff": WIDTH // 2, "expert_of": "family"},
    "mole-r0": {"reliability": "zero", "expert_d_ff": WIDTH},
}


def run(model: MoleModel, batch: Batch, told: bool = False) -> ModelOutput:
    return model(batch.audio_BS, batch.audio_lengths_B, batch.languages_B if told else None)


def grads(model: MoleModel, loss: torch.Tensor) -> dict[str, float]:
    """Size of the gradient of each parameter."""
    model.zero_grad()
    loss.backward()
    return {n: 0.0 if p.grad is None else float(p.grad.abs().sum()) for n, p in model.named_parameters()}


@pytest.mark.parametrize("name", SYSTEMS)
def test_each_system_learns_its_batch_and_is_the_same_from_disk(
    make_model: Callable[..., MoleModel], tokenizer: TextTokenizer, batch: Batch, tmp_path: Path, name: str
) -> None:
    model = make_model(**SYSTEMS[name], dropout=0.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    first = None
    for _ in range(30):
        named = losses(run(model, batch, told=True), batch)
        loss = sum(named.values(), torch.zeros(()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        first = first or named["ctc"].item()
    assert named["ctc"] < 0.5 * first
    save_model(model.eval(), tokenizer, tmp_path)
    loaded, _ = load_model(tmp_path)
    assert loaded.config == model.config
    with torch.no_grad():
        before, after = run(model, batch), run(loaded, batch)
    assert torch.equal(before.log_probs_BTV, after.log_probs_BTV)
    assert torch.equal(before.reliability_B, after.reliability_B)


@pytest.mark.parametrize("name", SYSTEMS)
def test_an_utterance_is_recognised_alone_as_in_company(
    make_model: Callable[..., MoleModel], batch: Batch, name: str
) -> None:
    model = make_model(**SYSTEMS[name]).eval()
    with torch.no_grad():
        together = run(model, batch).log_probs_BTV[0]
        alone = model(batch.audio_BS[:1, : int(batch.audio_lengths_B[0])], batch.audio_lengths_B[:1]).log_probs_BTV[0]
    torch.testing.assert_close(alone, together[: len(alone)], atol=1e-4, rtol=0)


def test_active_parameters_are_equal_but_for_small_routers(make_model: Callable[..., MoleModel]) -> None:
    changes = {"d_model": 64, "d_ff": 96, "num_mole_blocks": 1}
    systems = {name: {**system, **changes} for name, system in SYSTEMS.items()}
    systems = {n: {**s, "expert_d_ff": 192 * s["expert_d_ff"] // WIDTH} for n, s in systems.items()}
    counts = {name: count_parameters(make_model(**system)) for name, system in systems.items()}
    dense = counts["dense"].active
    assert counts["dense"].total == dense
    for name, count in counts.items():
        assert abs(count.active / dense - 1) < 0.01, name
    # By hand: three language experts and the agnostic one instead of two.
    expert = 64 * 96 + 96 + 96 * 64 + 64
    assert counts["mole"].total - counts["mole"].active == 2 * expert
    assert counts["mole-r0"].total == counts["mole-r0"].active == dense
    wide = 64 * 192 + 192 + 192 * 64 + 64
    assert counts["lr-moe"].total - counts["lr-moe"].active == 2 * wide
    assert counts["switch"].total - counts["switch"].active == 3 * wide
    assert counts["dlg-moe"].total - counts["dlg-moe"].active == 7 * expert
    assert counts["dense-embedding"].total - counts["dense-embedding"].active == 2 * 64


def test_a_probe_leaves_the_encoder_alone(make_model: Callable[..., MoleModel], batch: Batch) -> None:
    for probe in (True, False):
        model = make_model(mixture="dense", language_probe=probe)
        found = grads(model, losses(run(model, batch, told=True), batch)["language"])
        assert (found["subsampling.first.weight"] > 0) is not probe
        assert found["mixture.language_tokenizer.languages.weight"] > 0


def test_the_language_vector_is_that_of_the_true_language_where_it_is_given(
    make_model: Callable[..., MoleModel], batch: Batch
) -> None:
    for unit in ("utterance", "frame"):
        model = make_model(mixture="dense", language_embedding=True, routing="true", routing_unit=unit)
        found = model(batch.audio_BS, batch.audio_lengths_B, torch.tensor([1, 1, 1, -1]))
        found.log_probs_BTV[:3].square().sum().backward()
        by_language_N = model.mixture.language_embedding.weight.grad.abs().sum(1)
        assert by_language_N[1] > 0 and by_language_N[0] == by_language_N[2] == 0
        model.eval()
        heard_B = run(model, batch).language_logits_BN.argmax(1)
        told = model(batch.audio_BS, batch.audio_lengths_B, heard_B)
        if unit == "utterance":
            assert torch.equal(told.log_probs_BTV, run(model, batch).log_probs_BTV)
        other = model(batch.audio_BS, batch.audio_lengths_B, (heard_B + 1) % 3)
        assert not torch.allclose(other.log_probs_BTV, told.log_probs_BTV, atol=1e-4)


def test_routers_of_their_own_differ_and_omni_has_one(make_model: Callable[..., MoleModel], batch: Batch) -> None:
    own = make_model(mixture="switch", num_mole_blocks=2)
    shared = make_model(mixture="omni", num_mole_blocks=2)
    assert len([name for name in own.state_dict() if "router" in name]) == 2
    assert [name for name in shared.state_dict() if "router" in name] == ["mixture.router.scores.weight"]
    for model in (own, shared):
        output = run(model, batch, told=True)
        assert len(output.decision.plans) == 2
        assert not torch.equal(output.decision.plans[0].gates, output.decision.plans[1].gates)
        found = grads(model, losses(output, batch)["balance"])
        assert all(size > 0 for name, size in found.items() if "router" in name)


def test_balance_is_a_loss_where_routers_choose_by_themselves(
    make_model: Callable[..., MoleModel], batch: Batch
) -> None:
    for name, system in SYSTEMS.items():
        model = make_model(**system)
        named = losses(run(model, batch, told=True), batch)
        assert ("balance" in named) == (name in ("switch", "omni", "dlg-moe", "group by utterance"))


def test_all_layers_are_told_the_same_language(make_model: Callable[..., MoleModel], batch: Batch) -> None:
    model = make_model(mixture="group", num_experts=2, num_mole_blocks=2, routing="scheduled")
    rows = run(model, batch).frames.rows.utterance_of_row
    drawn = set()
    for seed in range(8):
        torch.manual_seed(seed)
        output = model(batch.audio_BS, batch.audio_lengths_B, (batch.languages_B + 1) % 3, 0.5)
        first, second = (plan.expert_ids[:, 0] // 2 for plan in output.decision.plans)
        assert torch.equal(first, second)
        drawn.add(tuple(first[rows.diff(prepend=rows[:1] - 1) > 0].tolist()))
    assert len(drawn) > 1


def test_in_training_the_configured_routing_says_what_the_labels_are_for(
    make_model: Callable[..., MoleModel], batch: Batch
) -> None:
    def routed(routing: str, probability: float, evaluate: bool = False) -> bool:
        """Whether all utterances are in the languages that were given, none of which is heard."""
        torch.manual_seed(0)
        model = make_model(routing=routing, dropout=0.0).train(not evaluate)
        given_B = (model(batch.audio_BS, batch.audio_lengths_B).language_logits_BN.argmax(1) + 1) % 3
        chosen_B = model(batch.audio_BS, batch.audio_lengths_B, given_B, probability).decision.heard.expert_ids[:, 0]
        is_given_B = chosen_B == given_B
        assert is_given_B.all() or not is_given_B.any()
        return bool(is_given_B[0])

    assert routed("true", 0.0) and routed("scheduled", 1.0)
    assert not routed("predicted", 1.0) and not routed("scheduled", 0.0)
    assert all(routed(routing, 0.0, evaluate=True) for routing in ("predicted", "true", "scheduled"))
    with pytest.raises(MoleError, match="routing: 'random' is unknown"):
        make_model(routing="random")


def test_families_share_an_expert(make_model: Callable[..., MoleModel], batch: Batch) -> None:
    model = make_model(expert_of="family", routing="true")  # de, en, fr
    assert model.mixture.expert_names == ["gem", "roa"]
    assert model.config.expert_of == {"de": "gem", "en": "gem", "fr": "roa"}
    assert make_model(expert_of="branch").config.expert_of == model.config.expert_of
    with pytest.raises(MoleError, match=r"expert_of: 'dee' is no language of the model; did you mean de\?"):
        make_model(expert_of={"dee": "gem", "en": "gem"})
    output = run(model, batch, told=True)
    assert output.decision.heard.expert_ids[:, 0].tolist() == [0, 0, 0, 1]
    posterior_BN = model.mixture.language_posterior(output.language_logits_BN)
    torch.testing.assert_close(output.reliability_B[3], posterior_BN[3, 2])
    torch.testing.assert_close(output.reliability_B[0], posterior_BN[0, :2].sum())


def test_reliability_of_families_asks_for_the_family(make_model: Callable[..., MoleModel], batch: Batch) -> None:
    """German taken for English is right for an expert of both."""
    model = make_model(expert_of="family", reliability="sigmoid")
    with torch.no_grad():
        model.mixture.language_tokenizer.languages.weight.zero_()
        model.mixture.language_tokenizer.languages.bias.copy_(torch.tensor([0.0, 5.0, 0.0]))  # always English
    batch.languages_B = torch.zeros(4, dtype=torch.int64)
    output = run(model, batch)
    wanted = torch.nn.functional.binary_cross_entropy(output.reliability_B, torch.ones(4))
    torch.testing.assert_close(losses(output, batch)["reliability"], wanted)


@pytest.mark.parametrize(("code", "family"), [("pt-BR", "roa"), ("be", "sla"), ("el", "grk"), ("eu", "eu"), ("q", "q")])
def test_family_of(code: str, family: str) -> None:
    assert family_of(code) == family


# --- growing


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_grown_system_knows_what_it_knew(
    make_model: Callable[..., MoleModel], tokenizer: TextTokenizer, batch: Batch, name: str
) -> None:
    old = make_model(**SYSTEMS[name]).eval()
    expert_of = None
    if old.config.mixture == "forced":  # its routers choose among all experts
        with pytest.raises(MoleError, match="--family"):
            grow_model(old, tokenizer, tokenizer, [*LANGUAGES, "ru"])
        expert_of = {"ru": old.mixture.expert_names[-1]}
    grown = grow_model(old, tokenizer, tokenizer, [*LANGUAGES, "ru"], expert_of).eval()
    told = torch.tensor([0, 1, 2, 1])
    with torch.no_grad():
        before, after = (model(batch.audio_BS, batch.audio_lengths_B, told) for model in (old, grown))
        new = grown(batch.audio_BS, batch.audio_lengths_B, torch.full((4,), 3))
    torch.testing.assert_close(after.log_probs_BTV, before.log_probs_BTV)
    assert torch.isfinite(new.log_probs_BTV).all()


def test_a_new_language_takes_the_expert_of_its_family(
    make_model: Callable[..., MoleModel], tokenizer: TextTokenizer
) -> None:
    old = make_model(expert_of="family")
    kin = grow_model(old, tokenizer, tokenizer, [*LANGUAGES, "es", "ru"])
    assert kin.mixture.expert_names == ["gem", "roa", "sla"]
    assert kin.config.expert_of == {"de": "gem", "en": "gem", "fr": "roa", "es": "roa", "ru": "sla"}
    by_language = make_model()
    shared = grow_model(by_language, tokenizer, tokenizer, [*LANGUAGES, "es"], {"es": "fr"})
    assert shared.mixture.expert_names == LANGUAGES
    assert count_parameters(shared).total - count_parameters(by_language).total == 96 + 1  # a row of the tokenizer
    own = grow_model(by_language, tokenizer, tokenizer, [*LANGUAGES, "es"])
    assert own.mixture.expert_names == [*LANGUAGES, "es"] and own.config.expert_of == "language"
    for wrong, words in [({"es": "xx"}, "no expert 'xx'"), ({"fr": "en"}, "fr is no new language; new are es")]:
        with pytest.raises(MoleError, match=words):
            grow_model(by_language, tokenizer, tokenizer, [*LANGUAGES, "es"], wrong)


def test_new_groups_and_experts_without_an_agnostic_one_start_from_the_mean(
    make_model: Callable[..., MoleModel], tokenizer: TextTokenizer
) -> None:
    grown = grow_model(make_model(**SYSTEMS["dlg-moe"]), tokenizer, tokenizer, [*LANGUAGES, "ru"])
    moe = grown.blocks[-1].feed_forward_out.moe
    for tensor in (moe.experts.w1_EFD, moe.experts.b2_ED, moe.router.scores.weight):
        by_group = tensor.unflatten(0, (4, 3))
        torch.testing.assert_close(by_group[3], by_group[:3].mean(0))
    assert moe.router.num_languages == 4


# --- bad configs


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"mixture": "soup"}, "mixture: 'soup' is unknown"),
        ({"expert_d_ff": 0}, "expert_d_ff: 0 must be positive"),
        ({"expert_of": "village"}, "expert_of: 'village' is unknown"),
        ({"top_k": 6}, "top_k: 6 must be 1..5"),
    ],
)
def test_a_config_that_cannot_be_built_is_named_in_one_line(changes: dict, key: str) -> None:
    with pytest.raises(MoleError) as caught:
        small_config(**changes)
    assert str(caught.value).startswith(f"model.encoder.{key}") and "\n" not in str(caught.value)


def test_of_a_batch_a_share_is_routed_by_labels(make_model: Callable[..., MoleModel]) -> None:
    model = make_model(routing="scheduled").train()
    logits_BN = torch.tensor([[1.0, 0.0, 0.0]]).repeat(400, 1)
    evidence = LanguageEvidence(logits_BN[:, None], logits_BN, torch.zeros(400, 1, 96))
    frames = PaddedFrames.of_lengths(torch.ones(400, dtype=torch.long), 1)
    decision = model.mixture.decide(evidence, frames, torch.ones(400, dtype=torch.long), 0.25)
    assert 0.15 < float((decision.heard.expert_ids == 1).float().mean()) < 0.35


@pytest.mark.parametrize("routing", ["predicted", "scheduled", "true"])
def test_the_labels_expert_computes_in_training_alone(
    make_model: Callable[..., MoleModel], batch: Batch, routing: str
) -> None:
    with pytest.raises(MoleError, match="language_embedding: is not for the mixture"):
        make_model(mixture="forced", top_k=2, language_embedding=True)
    model = make_model(mixture="forced", top_k=2, routing=routing, dropout=0.0)
    trained = model.train()(batch.audio_BS, batch.audio_lengths_B, batch.languages_B, 0.0)
    heard = run(model.eval(), batch, told=True)
    languages_N = batch.languages_B[trained.frames.rows.utterance_of_row]
    shares = []
    for output in (trained, heard):
        (plan,) = output.decision.plans
        shares.append(float((plan.expert_ids == languages_N[:, None]).any(-1)[languages_N >= 0].float().mean()))
        assert plan.expert_ids.shape[1] == 2 and "balance" not in losses(output, batch)
    assert shares[0] == 1 > shares[1]


def test_post_moe_needs_two_experts_a_frame(make_model: Callable[..., MoleModel]) -> None:
    with pytest.raises(MoleError, match=r"top_k: 1 must be 2\.\.3"):
        make_model(mixture="forced", top_k=1)
