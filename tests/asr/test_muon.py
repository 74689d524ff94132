import copy

import pytest
import torch
from torch import nn

from mole_asr.asr.model import MoleModel
from mole_asr.asr.muon import Muon, build_optimizer, orthogonalize

from .conftest import LANGUAGES, small_config


@pytest.mark.parametrize("shape", [(1, 16, 16), (2, 24, 8), (1, 8, 24), (3, 20, 12)])
def test_orthogonalize_brings_singular_values_near_one(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    for scale in (1e-4, 1.0, 1e4):
        left, _, right = torch.linalg.svd(torch.randn(shape), full_matrices=False)
        spread = torch.linspace(1, 0.05, min(shape[1:]))  # random square matrices have values too near zero
        matrices = scale * (left * spread) @ right
        result = orthogonalize(matrices).float()
        assert result.shape == matrices.shape
        values = torch.linalg.svdvals(result)
        assert values.min() >= 0.6 and values.max() <= 1.5  # 0.84 to 1.16, and what rounding to bfloat16 adds
        assert 0.9 <= values.mean() <= 1.1
        # It keeps the directions: U V^T has the largest inner product with the matrix, the sum of singular values.
        inner = (result * matrices).sum((-2, -1))
        assert (inner / torch.linalg.svdvals(matrices).sum(-1)).min() > 0.8


def test_orthogonalize_leaves_zero_alone() -> None:
    assert not orthogonalize(torch.zeros(2, 4, 3)).any()


def steps(parameters: list[nn.Parameter], make: type, count: int = 4, **settings: object) -> None:
    """Makes steps with gradients that depend only on the step and the parameter's shape and number."""
    optimizer = make(parameters, **settings)
    for step in range(count):
        for number, parameter in enumerate(parameters):
            generator = torch.Generator().manual_seed(100 * step + number)
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def test_a_stack_moves_as_its_matrices_one_by_one() -> None:
    torch.manual_seed(0)
    stack = nn.Parameter(torch.randn(3, 6, 10))
    alone = [nn.Parameter(matrix.clone()) for matrix in stack.detach()]
    together = Muon([stack], [], lr=0.1)
    apart = Muon(alone, [], lr=0.1)
    for _ in range(4):
        stack.grad = torch.randn(3, 6, 10)
        for matrix, gradient in zip(alone, stack.grad, strict=True):
            matrix.grad = gradient.clone()
        together.step()
        apart.step()
    torch.testing.assert_close(stack.detach(), torch.stack([matrix.detach() for matrix in alone]))


def test_a_matrix_moves_by_its_learning_rate_and_shrinks_by_decay() -> None:
    torch.manual_seed(0)
    for shape, factor in [((8, 8), 1.0), ((16, 4), 2.0), ((4, 16), 1.0)]:
        matrix = nn.Parameter(torch.zeros(shape))
        matrix.grad = torch.randn(shape)
        Muon([matrix], [], lr=0.5).step()
        values = torch.linalg.svdvals(matrix.detach())
        assert 0.6 * 0.5 * factor <= values.min() and values.max() <= 1.3 * 0.5 * factor
    still = nn.Parameter(torch.ones(4, 4))
    still.grad = torch.zeros(4, 4)
    Muon([still], [], lr=0.5, weight_decay=0.1).step()
    torch.testing.assert_close(still.detach(), torch.full((4, 4), 1 - 0.5 * 0.1))


def test_an_expert_that_hears_nothing_keeps_its_weights() -> None:
    experts = nn.Parameter(torch.ones(3, 4, 4))
    experts.grad = torch.zeros(3, 4, 4)
    experts.grad[1] = torch.randn(4, 4)
    Muon([experts], [], lr=0.5, weight_decay=0.1).step()
    changed = [bool((expert != 1).any()) for expert in experts.detach()]
    assert changed == [False, True, False]


def test_an_expert_that_was_heard_once_goes_on_by_its_momentum() -> None:
    experts = nn.Parameter(torch.ones(2, 4, 4))
    optimizer = Muon([experts], [], lr=0.5, weight_decay=0.1)
    for heard in (True, False):
        experts.grad = torch.zeros(2, 4, 4)
        experts.grad[0] = torch.randn(4, 4) * heard
        before = experts.detach().clone()
        optimizer.step()
        assert [bool((new != old).any()) for new, old in zip(experts, before, strict=True)] == [True, False]


def test_the_rest_moves_as_with_adamw() -> None:
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape)) for shape in [(5,), (3, 4), (2, 3, 2)]]
    theirs = copy.deepcopy(ours)
    steps(ours, lambda parameters, **settings: Muon([], parameters, **settings), 10, adamw_lr=1e-2, betas=(0.9, 0.98))
    steps(theirs, torch.optim.AdamW, 10, lr=1e-2, betas=(0.9, 0.98), weight_decay=0.0)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=0)


def test_a_parameter_that_gets_its_first_gradient_later_moves_as_with_adamw() -> None:
    """As the reliability head, or whatever some batches do not use."""

    def train(make: type, **settings: object) -> list[nn.Parameter]:
        parameters = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))]
        optimizer = make(parameters, **settings)
        for step in range(6):
            parameters[0].grad = torch.tensor([1.0, -2.0, 0.5]) * (step + 1)
            parameters[1].grad = torch.tensor([1.0, -2.0, 0.5]) / (step + 1) if step in (3, 5) else None
            optimizer.step()
        return parameters

    ours = train(lambda parameters, **settings: Muon([], parameters, **settings), adamw_lr=1e-2, betas=(0.9, 0.98))
    theirs = train(torch.optim.AdamW, lr=1e-2, betas=(0.9, 0.98), weight_decay=0.0)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=0)


def test_state_dict_round_trip_goes_on_bitwise() -> None:
    def start() -> tuple[list[nn.Parameter], Muon]:
        torch.manual_seed(0)
        parameters = [nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(4))]
        return parameters, Muon(parameters[:1], parameters[1:])

    def step(parameters: list[nn.Parameter], optimizer: Muon, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()

    parameters, optimizer = start()
    for seed in range(3):
        step(parameters, optimizer, seed)
    other_parameters, other = start()
    with torch.no_grad():
        for mine, theirs in zip(other_parameters, parameters, strict=True):
            mine.copy_(theirs)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(parameters, optimizer, 9)
    step(other_parameters, other, 9)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(other_parameters, parameters, strict=True))


def test_every_parameter_of_a_model_is_in_one_group_and_experts_are_matrices() -> None:
    model = MoleModel(small_config(), LANGUAGES, 9)
    optimizer = build_optimizer(model, 0.02, 2e-3, 0.01)
    groups = [{id(p) for p in group["params"]} for group in optimizer.param_groups]
    assert not groups[0] & groups[1]
    assert groups[0] | groups[1] == {id(p) for p in model.parameters()}
    names = {name for name, p in model.named_parameters() if id(p) in groups[0]}
    experts = "blocks.2.feed_forward_out.moe.experts"
    assert {f"{experts}.w1_EFD", f"{experts}.w2_EDF", f"{experts}.shared_w1_FD", f"{experts}.shared_w2_DF"} <= names
    assert {"blocks.0.attention.query_key_value.weight", "blocks.0.feed_forward_in.1.weight"} <= names
    outside = ("ctc.", "condition.", "subsampling.", "mixture.")
    assert not [name for name in names if name.startswith(outside) or "norm" in name or "depthwise" in name]
