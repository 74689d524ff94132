import pytest
import torch

from mole_asr.asr.conformer import (
    ConformerBlock,
    Convolution,
    Frames,
    SelfAttention,
    UtteranceDropout,
    attention_bias,
)
from mole_asr.asr.language_tokenizer import LanguageEvidence
from mole_asr.asr.mixture import Decision, MixtureFeedForward
from mole_asr.audio.features import valid_mask
from mole_asr.moe.layer import MoELayer
from mole_asr.moe.plan import RoutingPlan
from mole_asr.moe.routers import RoutingContext

D, HEADS = 8, 2
LENGTHS_B = torch.tensor([3, 11, 7])


def mole(languages: int) -> MixtureFeedForward:
    return MixtureFeedForward(D, MoELayer(D, 12, languages, shared_expert=True))


def decided(frames: Frames, plan: RoutingPlan) -> Decision:
    """A decision that was taken without hearing anything."""
    nothing = LanguageEvidence(torch.zeros(0), torch.zeros(0), torch.zeros(0))
    return Decision(nothing, plan, RoutingContext(frames.rows), plan)


def plan(frames: Frames, by_frame: bool, languages: int = 3) -> Decision:
    """Utterance n (or each of its frames) goes to expert n with r = 0.7."""
    units = frames.rows.utterance_of_row if by_frame else torch.arange(len(frames.lengths_B))
    r_U = torch.full((len(units),), 0.7)
    return decided(
        frames,
        RoutingPlan(
            expert_ids=units.int()[:, None],
            gates=r_U[:, None],
            num_experts=languages,
            layout="token" if by_frame else "segment",
            segments=None if by_frame else frames.rows.segments_B1,
            shared_gates=1 - r_U,
        ),
    )


@pytest.mark.parametrize("by_frame", [None, False, True], ids=["dense", "utterance", "frame"])
def test_padding_reaches_no_valid_frame_of_a_block(by_frame: bool | None) -> None:
    torch.manual_seed(0)
    block = ConformerBlock(D, 12, HEADS, 5, dropout=0.1, feed_forward_out=None if by_frame is None else mole(3)).eval()
    x_BTD = torch.randn(3, 11, D)
    frames = Frames.of(LENGTHS_B, 11, HEADS)
    routing = None if by_frame is None else plan(frames, by_frame)
    y_BTD = block(x_BTD, frames, routing)

    wide_frames = Frames.of(LENGTHS_B, 20, HEADS)
    garbage_BTD = torch.where(wide_frames.valid_BT[:, :, None], 0.0, 1e3 * torch.randn(3, 20, D))
    garbage_BTD[:, :11] += x_BTD * frames.valid_BT[:, :, None]
    wide_BTD = block(garbage_BTD, wide_frames, routing)
    torch.testing.assert_close(wide_BTD[wide_frames.valid_BT], y_BTD[frames.valid_BT])
    assert torch.isfinite(wide_BTD).all()


@pytest.mark.parametrize("part", [SelfAttention(D, HEADS), Convolution(D, 5)], ids=["attention", "convolution"])
def test_padding_reaches_no_valid_frame_of_a_part(part: torch.nn.Module) -> None:
    frames = Frames.of(LENGTHS_B, 11, HEADS)
    x_BTD = torch.randn(3, 11, D)
    changed_BTD = torch.where(frames.valid_BT[:, :, None], x_BTD, 1e3)
    told = frames.bias_GTT if isinstance(part, SelfAttention) else frames
    torch.testing.assert_close(part(changed_BTD, told)[frames.valid_BT], part(x_BTD, told)[frames.valid_BT])
    moved_BTD = x_BTD.clone()
    moved_BTD[1, 4, 0] += 1
    assert (part(moved_BTD, told)[1, 5] - part(x_BTD, told)[1, 5]).abs().max() > 1e-4


@pytest.mark.parametrize("by_frame", [False, True], ids=["utterance", "frame"])
def test_nan_in_padding_does_not_reach_a_mole_block(by_frame: bool) -> None:
    frames = Frames.of(LENGTHS_B, 11, HEADS)
    block, x_BTD = mole(3), torch.randn(3, 11, D)
    poisoned_BTD = x_BTD.masked_fill(~frames.valid_BT[:, :, None], float("nan"))
    y_BTD = block(poisoned_BTD, frames, plan(frames, by_frame))
    assert torch.isfinite(y_BTD).all()
    assert not y_BTD[~frames.valid_BT].any()
    torch.testing.assert_close(y_BTD, block(x_BTD, frames, plan(frames, by_frame)))
    y_BTD.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in block.moe.parameters())


def test_mole_block_mixes_its_two_experts_by_reliability() -> None:
    frames = Frames.of(torch.tensor([4]), 4, HEADS)
    block, x_BTD = mole(1), torch.randn(1, 4, D)

    def routed(r: float) -> torch.Tensor:
        plan = RoutingPlan(
            expert_ids=torch.zeros(1, 1, dtype=torch.int32),
            gates=torch.tensor([[r]]),
            num_experts=1,
            layout="segment",
            segments=frames.rows.segments_B1,
            shared_gates=torch.tensor([1 - r]),
        )
        return block(x_BTD, frames, decided(frames, plan))

    torch.testing.assert_close(routed(0.3), 0.3 * routed(1.0) + 0.7 * routed(0.0))
    assert (routed(1.0) - routed(0.0)).abs().max() > 1e-3


def test_attention_bias_is_symmetric_and_hides_padding() -> None:
    bias_GTT = attention_bias(valid_mask(torch.tensor([2, 3]), 3), HEADS)
    assert bias_GTT.shape == (4, 3, 3)
    slope = 2.0 ** (-8 / HEADS)  # of the first head
    expected_TT = [[0, -slope, -1e4], [-slope, 0, -1e4], [-2 * slope, -slope, -1e4]]
    torch.testing.assert_close(bias_GTT[0], torch.tensor(expected_TT))
    torch.testing.assert_close(bias_GTT[2], bias_GTT[2].mT)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attention_bias(valid_mask(torch.tensor([2]), 3), HEADS).dtype == torch.bfloat16


def test_dropout_drops_whole_channels_and_nothing_in_evaluation() -> None:
    torch.manual_seed(0)
    dropout, ones_BTD = UtteranceDropout(0.5), torch.ones(3, 5, 16)
    y_BTD = dropout(ones_BTD)
    assert (y_BTD == y_BTD[:, :1]).all()
    assert set(y_BTD.unique().tolist()) == {0.0, 2.0}
    assert (dropout.eval()(ones_BTD) == ones_BTD).all()
