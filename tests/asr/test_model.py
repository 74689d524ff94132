from collections.abc import Callable
from typing import get_args

import pytest
import torch

from mole_asr.asr.losses import ctc_loss, losses
from mole_asr.asr.model import ModelOutput, MoleModel
from mole_asr.corpus.batch import Batch
from mole_asr.errors import MoleError
from mole_asr.moe.routers import Reliability

from .conftest import LANGUAGES, small_config

UNITS = ["utterance", "frame"]


def run(model: MoleModel, batch: Batch, languages: bool = False) -> ModelOutput:
    return model(batch.audio_BS, batch.audio_lengths_B, batch.languages_B if languages else None)


# --- padding


@pytest.mark.parametrize("reliability", get_args(Reliability))
@pytest.mark.parametrize("unit", UNITS)
def test_an_utterance_is_recognised_alone_as_in_company(
    make_model: Callable[..., MoleModel], batch: Batch, unit: str, reliability: str
) -> None:
    model = make_model(routing_unit=unit, reliability=reliability).eval()
    with torch.no_grad():
        together = run(model, batch)
        for b, samples in enumerate(batch.audio_lengths_B.tolist()):
            alone = model(batch.audio_BS[b : b + 1, :samples], torch.tensor([samples]))
            frames = int(alone.lengths_B)
            assert frames == int(together.lengths_B[b]) == alone.log_probs_BTV.shape[1]
            for one, many in [
                (alone.log_probs_BTV[0], together.log_probs_BTV[b, :frames]),
                (alone.intermediate_log_probs_BTV[0][0], together.intermediate_log_probs_BTV[0][b, :frames]),
                (alone.reliability_B[0], together.reliability_B[b]),
                (alone.language_logits_BN[0], together.language_logits_BN[b]),
                (alone.decision.evidence.evidence_BTN[0], together.decision.evidence.evidence_BTN[b, :frames]),
            ]:
                torch.testing.assert_close(one, many, atol=1e-4, rtol=0)
            first = 0 if unit == "utterance" else int(together.lengths_B[:b].sum())
            units = slice(b, b + 1) if unit == "utterance" else slice(first, first + frames)
            assert torch.equal(alone.decision.heard.expert_ids, together.decision.heard.expert_ids[units])


@pytest.mark.parametrize("unit", UNITS)
def test_company_changes_little_in_bfloat16(make_model: Callable[..., MoleModel], batch: Batch, unit: str) -> None:
    model = make_model(routing_unit=unit).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        together = run(model, batch)
        samples = int(batch.audio_lengths_B[0])
        alone = model(batch.audio_BS[:1, :samples], torch.tensor([samples]))
    assert together.log_probs_BTV.dtype == together.reliability_B.dtype == torch.float32
    frames = int(alone.lengths_B)
    torch.testing.assert_close(alone.log_probs_BTV[0], together.log_probs_BTV[0, :frames], atol=0.1, rtol=0)
    torch.testing.assert_close(alone.reliability_B[0], together.reliability_B[0], atol=0.02, rtol=0)


@pytest.mark.parametrize("unit", UNITS)
def test_padding_gets_no_gradient(make_model: Callable[..., MoleModel], batch: Batch, unit: str) -> None:
    """The loss of a batch is the sum of the losses of its utterances alone, and so are its gradients."""
    model = make_model(routing_unit=unit, dropout=0.0).eval()

    def gradients(audio_BS: torch.Tensor, lengths_B: torch.Tensor) -> list[torch.Tensor]:
        model.zero_grad()
        output = model(audio_BS, lengths_B)
        valid_BT = output.frames.valid_BT
        (output.log_probs_BTV[..., 2][valid_BT].sum() + output.language_logits_BN[:, 0].sum()).backward()
        return [p.grad.clone() if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]

    together = gradients(batch.audio_BS, batch.audio_lengths_B)
    apart = [torch.zeros_like(gradient) for gradient in together]
    for b, samples in enumerate(batch.audio_lengths_B.tolist()):
        for total, gradient in zip(
            apart, gradients(batch.audio_BS[b : b + 1, :samples], torch.tensor([samples])), strict=True
        ):
            total += gradient
    for many, one in zip(together, apart, strict=True):
        torch.testing.assert_close(many, one, atol=2e-3, rtol=2e-3)


# --- what comes out


def test_output_shapes_and_types(make_model: Callable[..., MoleModel], batch: Batch) -> None:
    model = make_model().eval()
    output = run(model, batch)
    frames = -(-(batch.audio_lengths_B // 160 + 1) // 4)
    assert output.lengths_B.tolist() == frames.tolist()
    assert output.log_probs_BTV.shape == (4, int(frames.max()), model.vocab_size)
    torch.testing.assert_close(output.log_probs_BTV.exp().sum(-1), torch.ones(4, int(frames.max())))
    assert output.language_logits_BN.shape == (4, len(LANGUAGES))
    assert ((output.reliability_B >= 0) & (output.reliability_B <= 1)).all()
    assert model.frame_shift_s == pytest.approx(0.04)
    assert (output.decision.heard.expert_ids[:, 0] == output.language_logits_BN.argmax(1)).all()


def test_a_given_language_is_taken_in_evaluation(make_model: Callable[..., MoleModel], batch: Batch) -> None:
    model = make_model().eval()
    heard = run(model, batch)
    others_B = (heard.decision.heard.expert_ids[:, 0].long() + 1) % len(LANGUAGES)
    told = model(batch.audio_BS, batch.audio_lengths_B, others_B)
    assert told.decision.heard.expert_ids[:, 0].tolist() == others_B.tolist()
    posterior_BN = heard.language_logits_BN.softmax(1)
    torch.testing.assert_close(told.reliability_B, posterior_BN.gather(1, others_B[:, None])[:, 0])
    assert not torch.allclose(told.log_probs_BTV, heard.log_probs_BTV, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "heads"),
    [({}, 1), ({"intermediate_ctc_blocks": ()}, 0), ({"intermediate_ctc_blocks": (1, 2)}, 2)],
)
def test_intermediate_heads(make_model: Callable[..., MoleModel], batch: Batch, changes: dict, heads: int) -> None:
    model = make_model(**changes)
    output = run(model, batch, languages=True)
    assert len(output.intermediate_log_probs_BTV) == heads
    assert (model.condition is not None) == (heads > 0)
    named = losses(output, batch)
    assert ("intermediate_ctc" in named) == (heads > 0)
    sum(named.values()).backward()
    assert torch.isfinite(model.ctc.weight.grad).all()


@pytest.mark.parametrize("unit", UNITS)
def test_without_mole_blocks_the_language_is_heard_all_the_same(
    make_model: Callable[..., MoleModel], batch: Batch, unit: str
) -> None:
    for place in (0, 1, 3):
        model = make_model(num_mole_blocks=0, language_tokenizer_block=place, routing_unit=unit)
        assert not [name for name, _ in model.named_parameters() if "expert" in name]
        output = run(model, batch, languages=True)
        assert output.language_logits_BN.shape == (4, 3)
        sum(losses(output, batch).values()).backward()
        assert model.mixture.language_tokenizer.languages.weight.grad.abs().sum() > 0


def test_mole_blocks_only(make_model: Callable[..., MoleModel], batch: Batch) -> None:
    model = make_model(num_mole_blocks=3, language_tokenizer_block=0).eval()
    assert torch.isfinite(run(model, batch).log_probs_BTV).all()


def test_each_language_has_its_expert(make_model: Callable[..., MoleModel], batch: Batch) -> None:
    """Nothing but the expert of the routed language, and the agnostic one, gets a gradient."""
    model = make_model(routing="true", dropout=0.0)
    output = model(batch.audio_BS, batch.audio_lengths_B, torch.tensor([1, 1, 1, 1]))
    output.log_probs_BTV.square().sum().backward()
    experts = model.blocks[-1].feed_forward_out.moe.experts
    by_expert_E = experts.w1_EFD.grad.abs().sum((1, 2))
    assert by_expert_E[1] > 0 and by_expert_E[0] == by_expert_E[2] == 0
    assert experts.shared_w1_FD.grad.abs().sum() > 0


# --- gradients


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("reliability", get_args(Reliability))
def test_recognition_alone_teaches_the_language_tokenizer_through_r(
    make_model: Callable[..., MoleModel], batch: Batch, unit: str, reliability: str
) -> None:
    model = make_model(routing_unit=unit, reliability=reliability, routing="predicted")
    output = run(model, batch)
    ctc_loss(output.log_probs_BTV, output.lengths_B, batch).backward()
    tokenizer = model.mixture.language_tokenizer

    def taught(module: torch.nn.Module | None) -> bool:
        return module is not None and module.weight.grad is not None and bool(module.weight.grad.abs().sum() > 0)

    assert taught(tokenizer.languages) == (reliability in ("max_posterior", "entropy", "gumbel"))
    assert taught(tokenizer.reliability) == (reliability == "sigmoid")
    assert taught(tokenizer.convolution) == (reliability not in ("one", "zero"))


# --- losses


@pytest.mark.parametrize("unit", UNITS)
def test_losses_by_name(make_model: Callable[..., MoleModel], batch: Batch, unit: str) -> None:
    for reliability, names in [
        ("max_posterior", {"ctc", "intermediate_ctc", "language"}),
        ("sigmoid", {"ctc", "intermediate_ctc", "language", "reliability"}),
    ]:
        model = make_model(routing_unit=unit, reliability=reliability)
        named = losses(run(model, batch, languages=True), batch)
        assert set(named) == names
        assert all(loss.ndim == 0 and torch.isfinite(loss) and loss > 0 for loss in named.values())


def test_ctc_is_a_mean_over_labels(make_model: Callable[..., MoleModel], batch: Batch) -> None:
    output = run(make_model().eval(), batch)
    each = [
        torch.nn.functional.ctc_loss(
            output.log_probs_BTV[b : b + 1, : int(output.lengths_B[b])].transpose(0, 1),
            batch.labels_BU[b : b + 1, : int(batch.label_lengths_B[b])],
            output.lengths_B[b : b + 1],
            batch.label_lengths_B[b : b + 1],
            reduction="sum",
        )
        for b in range(4)
    ]
    wanted = torch.stack(each).sum() / batch.label_lengths_B.sum()
    torch.testing.assert_close(ctc_loss(output.log_probs_BTV, output.lengths_B, batch), wanted)


def test_unknown_languages_and_empty_texts_do_no_harm(make_model: Callable[..., MoleModel], batch: Batch) -> None:
    """The stand-in for a batch with no readable file: silence, no label, no language."""
    model = make_model(reliability="sigmoid", intermediate_ctc_blocks=(1,))
    batch.audio_BS = torch.zeros(1, 16000)
    batch.audio_lengths_B, batch.languages_B = torch.tensor([16000]), torch.tensor([-1])
    batch.labels_BU, batch.label_lengths_B = torch.zeros(1, 0, dtype=torch.int64), torch.tensor([0])
    named = losses(run(model, batch, languages=True), batch)
    sum(named.values()).backward()
    assert named["language"].item() == named["reliability"].item() == 0
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


# --- reproducibility and bad configs


def test_state_dict_round_trip(make_model: Callable[..., MoleModel], batch: Batch) -> None:
    model = make_model().eval()
    other = make_model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    other.load_state_dict(model.state_dict())
    assert torch.equal(run(other.eval(), batch).log_probs_BTV, run(model, batch).log_probs_BTV)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"d_model": 15}, "d_model: 15 is no multiple of num_heads"),
        ({"kernel_size": 6}, "kernel_size: 6 must be odd"),
        ({"num_mole_blocks": 4}, "num_mole_blocks: 4 is more than num_blocks 3"),
        ({"language_tokenizer_block": 3}, "language_tokenizer_block: 3 must be 0..2"),
        ({"language_tokenizer_block": -1}, "language_tokenizer_block: -1 must be 0..2"),
        ({"intermediate_ctc_blocks": (3,)}, "intermediate_ctc_blocks: (3,) must be between 1 and"),
        ({"intermediate_ctc_blocks": (0,)}, "intermediate_ctc_blocks: (0,) must be between 1 and"),
        ({"routing_unit": "word"}, "routing_unit: 'word' is unknown"),
    ],
)
def test_a_config_that_cannot_be_built_is_named_in_one_line(changes: dict, key: str) -> None:
    with pytest.raises(MoleError) as caught:
        small_config(**changes)
    assert str(caught.value).startswith(f"model.encoder.{key}")
    assert "\n" not in str(caught.value)
