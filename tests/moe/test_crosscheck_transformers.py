"""Our layer against the mixture-of-experts blocks of Hugging Face transformers, with their weights copied into ours.

Their softmax of the router is always float32, so whole blocks agree to single precision even where the rest is
float64; the experts alone, given the same gates, agree to double precision.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from mole_asr.moe import MoELayer, PackedRows, RoutingContext, RoutingPlan, TopKRouter, dispatch
from mole_asr.moe.losses import load_balance_loss

mixtral = pytest.importorskip(
    "transformers.models.mixtral.modeling_mixtral", reason="transformers is missing: pip install mole-asr[dev]"
)
qwen = pytest.importorskip("transformers.models.qwen2_moe.modeling_qwen2_moe")

LENGTHS = torch.tensor([5, 0, 9, 3])
ROWS = PackedRows.from_lengths(LENGTHS, 9)
D, F, E = 16, 24, 5
CASES = [
    ("reference", torch.float64),
    ("cpu_tiled", torch.float64),
    ("reference", torch.float32),
    ("cpu_tiled", torch.float32),
    ("grouped_mm", torch.float32),
]


class GatedSharedRouter(TopKRouter):
    """Top-k, and a shared expert whose weight is a sigmoid of the row, as in Qwen's blocks."""

    def __init__(self, d_model: int, num_experts: int, k: int, renormalize: bool) -> None:
        super().__init__(d_model, num_experts, k, renormalize)
        self.shared_gate = nn.Linear(d_model, 1, bias=False)

    def forward(self, x_ND: Tensor | None, context: RoutingContext | None = None) -> RoutingPlan:
        assert x_ND is not None
        return replace(super().forward(x_ND, context), shared_gates=self.shared_gate(x_ND).sigmoid().squeeze(-1))


def mixtral_pair(k: int, backend: str, dtype: torch.dtype) -> tuple[nn.Module, MoELayer]:
    config = mixtral.MixtralConfig(
        hidden_size=D, intermediate_size=F, num_local_experts=E, num_experts_per_tok=k, experts_implementation="eager"
    )
    theirs = drawn(mixtral.MixtralSparseMoeBlock(config), dtype)
    ours = MoELayer(D, F, E, TopKRouter(D, E, k), "swiglu", bias=False, backend=backend).to(dtype)
    copy(corresponding(ours, theirs))
    return theirs, ours


def qwen_pair(k: int, renormalize: bool, backend: str, dtype: torch.dtype) -> tuple[nn.Module, MoELayer]:
    config = qwen.Qwen2MoeConfig(
        hidden_size=D,
        moe_intermediate_size=F,
        shared_expert_intermediate_size=F,
        num_experts=E,
        num_experts_per_tok=k,
        norm_topk_prob=renormalize,
        experts_implementation="eager",
    )
    theirs = drawn(qwen.Qwen2MoeSparseMoeBlock(config), dtype)
    router = GatedSharedRouter(D, E, k, renormalize)
    ours = MoELayer(D, F, E, router, "swiglu", bias=False, shared_expert=True, backend=backend).to(dtype)
    copy(corresponding(ours, theirs))
    return theirs, ours


def drawn(block: nn.Module, dtype: torch.dtype) -> nn.Module:
    for parameter in block.parameters():  # their blocks alone leave these as they were in memory
        nn.init.normal_(parameter, std=0.4)
    with torch.no_grad():
        block.gate.weight[E - 1, 0] = -20  # where every row has a one: nobody chooses this expert
    return block.to(dtype)


def corresponding(ours: MoELayer, theirs: nn.Module) -> list[tuple[Tensor, list[Tensor]]]:
    """Our parameters, and what of theirs makes each, one above the other."""
    pairs = [
        (ours.router.scores.weight, [theirs.gate.weight]),
        (ours.experts.w1_EFD, [theirs.experts.gate_up_proj]),
        (ours.experts.w2_EDF, [theirs.experts.down_proj]),
    ]
    if ours.experts.shared:
        shared = theirs.shared_expert
        pairs += [
            (ours.experts.shared_w1_FD, [shared.gate_proj.weight, shared.up_proj.weight]),
            (ours.experts.shared_w2_DF, [shared.down_proj.weight]),
            (ours.router.shared_gate.weight, [theirs.shared_expert_gate.weight]),
        ]
    assert sum(p.numel() for p, _ in pairs) == sum(p.numel() for p in ours.parameters())
    return pairs


def copy(pairs: list[tuple[Tensor, list[Tensor]]]) -> None:
    with torch.no_grad():
        for mine, parts in pairs:
            mine.copy_(torch.cat(parts))


def padded_batch(dtype: torch.dtype) -> Tensor:
    x_BTD = torch.randn(4, 9, D, dtype=torch.float64)
    x_BTD[..., 0] = 1
    x_BTD[torch.arange(9) >= LENGTHS[:, None]] = torch.nan  # padding, which ours never looks at
    return x_BTD.to(dtype)


def assert_same_block(theirs: nn.Module, ours: MoELayer, dtype: torch.dtype) -> None:
    """Values, and gradients in rows, router, experts and shared expert; theirs computes the valid rows as one batch."""
    x_BTD = padded_batch(dtype).requires_grad_()
    rows_1ND = ROWS.pack(x_BTD.detach())[None].requires_grad_()
    y_BTD, plan = ours(x_BTD, LENGTHS)
    assert 1 < len(plan.expert_ids.unique()) < E  # some expert has no rows
    expected_1ND = theirs(rows_1ND)
    dy_1ND = torch.linspace(-1, 2, expected_1ND.numel(), dtype=dtype).view_as(expected_1ND)
    (y_BTD * ROWS.unpack(dy_1ND[0])).sum().backward()
    (expected_1ND * dy_1ND).sum().backward()
    close(ROWS.pack(y_BTD), expected_1ND[0])
    close(ROWS.pack(x_BTD.grad), rows_1ND.grad[0])
    for mine, parts in corresponding(ours, theirs):
        close(mine.grad, torch.cat([part.grad for part in parts]))
        assert mine.grad.norm() > 0


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=2e-6 * float(expected.detach().abs().max()), rtol=1e-5)


@pytest.mark.parametrize("k", [2, 4])
@pytest.mark.parametrize(("backend", "dtype"), CASES)
def test_mixtral_block(backend: str, dtype: torch.dtype, k: int) -> None:
    assert_same_block(*mixtral_pair(k, backend, dtype), dtype)


@pytest.mark.parametrize(("k", "renormalize"), [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize(("backend", "dtype"), CASES)
def test_qwen_block_with_its_gated_shared_expert(backend: str, dtype: torch.dtype, k: int, renormalize: bool) -> None:
    assert_same_block(*qwen_pair(k, renormalize, backend, dtype), dtype)


@pytest.mark.parametrize("backend", ["reference", "cpu_tiled"])
def test_experts_alone_to_double_precision_with_slots_without_expert(backend: str) -> None:
    theirs, ours = mixtral_pair(2, backend, torch.float64)
    x_ND = torch.randn(40, D, dtype=torch.float64, requires_grad=True)
    gates_NK = torch.randn(40, 2, dtype=torch.float64, requires_grad=True)
    ids_NK = torch.randint(0, E + 1, (40, 2))  # E: their sentinel in expert parallelism, our "no expert"
    expected_ND = theirs.experts(x_ND, ids_NK, gates_NK)
    found_ND = dispatch(x_ND, RoutingPlan(ids_NK.int(), gates_NK, E), ours.experts, backend)
    expected = torch.autograd.grad(expected_ND.square().sum(), [x_ND, gates_NK, *theirs.experts.parameters()])
    found = torch.autograd.grad(found_ND.square().sum(), [x_ND, gates_NK, *ours.experts.parameters()])
    for mine, their in zip((found_ND, *found), (expected_ND, *expected), strict=True):
        torch.testing.assert_close(mine, their, atol=1e-11, rtol=1e-11)


def test_balance_loss_and_its_gradient_with_padding() -> None:
    router = TopKRouter(D, E, 2)
    x_BTD = torch.randn(4, 9, D)
    plan = router(ROWS.pack(x_BTD))
    logits_ME = router.scores(x_BTD).flatten(0, 1)
    mask_BT = (torch.arange(9) < LENGTHS[:, None]).float()
    # They sum the share over the K slots of a row, we average it.
    expected = mixtral.load_balancing_loss_func((logits_ME,), E, 2, mask_BT) / 2
    found = load_balance_loss(plan)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(loss, router.scores.weight)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients)
