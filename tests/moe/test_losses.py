import pytest
import torch

from mole_asr.moe import NoisyTopKRouter, PackedRows, RoutingPlan, TopKRouter
from mole_asr.moe.losses import (
    activation_loss,
    cv_squared,
    importance_loss,
    language_loss,
    load_balance_loss,
    load_loss,
    pseudo_label_loss,
    reliability_loss,
    router_z_loss,
)
from mole_asr.moe.statistics import routing_statistics

ROWS = PackedRows.from_lengths(torch.tensor([2, 4, 1]), 4)


def plan(ids: list[list[int]], num_experts: int, **aux: torch.Tensor) -> RoutingPlan:
    return RoutingPlan(torch.tensor(ids, dtype=torch.int32), torch.ones(len(ids), len(ids[0])), num_experts, aux=aux)


def test_load_balance_is_one_when_even_and_e_when_all_go_to_one() -> None:
    even = plan([[0], [1], [2]], 3, probabilities=torch.full((3, 3), 1 / 3))
    assert load_balance_loss(even) == pytest.approx(1)
    p_NE = torch.tensor([[1.0, 0, 0]] * 3, requires_grad=True)
    worst = load_balance_loss(plan([[0], [0], [0]], 3, probabilities=p_NE))
    assert float(worst.detach()) == pytest.approx(3)
    assert torch.autograd.grad(worst, p_NE)[0].abs().sum() > 0
    # Slots without an expert are no load.
    assert load_balance_loss(plan([[0, 3], [1, 3], [2, 3]], 3, probabilities=torch.full((3, 3), 1 / 3))) == (
        pytest.approx(1)
    )


def test_importance_and_z_loss_by_hand() -> None:
    gates = torch.tensor([[0.5, 0.5], [1.0, 9.0]], requires_grad=True)
    uneven = RoutingPlan(torch.tensor([[0, 1], [0, 2]], dtype=torch.int32), gates, 2)
    loss = importance_loss(uneven)  # importance 1.5 and 0.5: variance 0.25, mean 1
    assert float(loss.detach()) == pytest.approx(0.25)
    assert torch.autograd.grad(loss, gates)[0][1, 1] == 0
    assert cv_squared(torch.tensor([3.0])) == 0 and cv_squared(torch.zeros(4)) == 0
    z = router_z_loss(plan([[0], [0]], 2, logits=torch.tensor([[0.0, 0.0], [1.0, 1.0]])))
    assert float(z) == pytest.approx(((0.6931472**2) + 1.6931472**2) / 2)


def test_losses_of_no_rows_are_zero_and_not_nan() -> None:
    empty = TopKRouter(4, 3, 2)(torch.zeros(0, 4))
    for loss in (load_balance_loss, importance_loss, load_loss, router_z_loss):
        assert float(loss(empty).detach()) == 0
    for loss in (pseudo_label_loss, activation_loss):
        assert float(loss(empty, torch.zeros(0, 3)).detach()) == 0
    assert load_loss(NoisyTopKRouter(4, 3, 2)(torch.zeros(0, 4))) == 0
    assert routing_statistics(empty, 0).load_E.tolist() == [0, 0, 0]


def test_language_loss_ignores_unknown_languages_and_padding() -> None:
    z_BN = torch.randn(3, 5)
    expected = torch.nn.functional.cross_entropy(z_BN[[0, 2]], torch.tensor([4, 1]))
    torch.testing.assert_close(language_loss(z_BN, torch.tensor([4, -1, 1]), ROWS), expected)
    assert language_loss(z_BN, torch.tensor([-1, -1, -1]), ROWS) == 0
    z_BTN = torch.randn(3, 4, 5)
    z_BTN[torch.arange(4) >= ROWS.lengths_B[:, None]] = torch.nan
    valid = torch.cat([z_BTN[0, :2], z_BTN[2, :1]])
    expected = torch.nn.functional.cross_entropy(valid, torch.tensor([4, 4, 1]))
    torch.testing.assert_close(language_loss(z_BTN, torch.tensor([4, -1, 1]), ROWS), expected)


def test_reliability_loss_asks_whether_the_prediction_was_right() -> None:
    z_BN = torch.eye(3).requires_grad_()
    head_B = torch.tensor([4.0, -4.0, 0.0], requires_grad=True)
    right, wrong = torch.tensor([0, 0, -1]), torch.tensor([1, 1, -1])
    low, high = (reliability_loss(head_B, z_BN, labels, ROWS) for labels in (right, wrong))
    assert low < 0.1 and high > 3
    gradients = torch.autograd.grad(high, [head_B, z_BN], allow_unused=True)
    assert gradients[0][2] == 0 and gradients[1] is None
    frames = reliability_loss(torch.zeros(3, 4), torch.randn(3, 4, 5), right, ROWS)
    assert float(frames.detach()) == pytest.approx(0.6931472)


def test_balance_over_one_expert_rows_counts_no_row_with_two() -> None:
    p_NE = torch.tensor([[0.7, 0.2, 0.1], [0.4, 0.4, 0.2], [0.1, 0.3, 0.6]], requires_grad=True)
    adaptive = plan([[0, 3], [0, 1], [2, 3]], 3, probabilities=p_NE)
    loss = load_balance_loss(adaptive, one_expert_only=True)
    # Shares 1/2, 0, 1/2 of the two rows with one expert; mean probabilities 0.4, 0.3, 0.3 of all three.
    assert float(loss.detach()) == pytest.approx(3 * (0.5 * 0.4 + 0.5 * 0.3))
    # Without the restriction: shares 2/4, 1/4, 1/4.
    assert float(load_balance_loss(adaptive).detach()) == pytest.approx(3 * (0.5 * 0.4 + 0.25 * 0.3 + 0.25 * 0.3))
    gradient = torch.autograd.grad(loss, p_NE)[0]
    torch.testing.assert_close(gradient, torch.tensor([[0.5, 0, 0.5]] * 3))
    assert load_balance_loss(plan([[0, 1], [2, 0], [1, 2]], 3, probabilities=p_NE), one_expert_only=True) == 0


def test_the_smooth_load_is_the_chance_of_being_chosen_when_the_own_noise_is_drawn_anew() -> None:
    router = NoisyTopKRouter(4, 5, 2)
    x_ND = torch.randn(3, 4)
    noisy = router(x_ND)
    clean_NE, noisy_NE, std_NE = (noisy.aux[key].detach() for key in ("logits", "noisy_logits", "noise_std"))
    draws = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    load_E = torch.zeros(5)
    for n in range(3):
        for e in range(5):
            second_of_others = noisy_NE[n, [i for i in range(5) if i != e]].topk(2).values[1]
            load_E[e] += (clean_NE[n, e] + std_NE[n, e] * draws > second_of_others).float().mean()
    loss = load_loss(noisy)
    assert float(loss.detach()) == pytest.approx(float(cv_squared(load_E)), abs=0.01)
    for weight in router.parameters():
        assert torch.autograd.grad(loss, weight, retain_graph=True)[0].abs().sum() > 0


def test_the_load_without_noise_is_counted() -> None:
    assert load_loss(plan([[0, 1], [0, 3], [0, 2]], 3)) == pytest.approx(cv_squared(torch.tensor([3.0, 1, 1])))
    every = NoisyTopKRouter(4, 3, 3)(torch.randn(5, 4))  # all experts a row: nothing to balance
    assert load_loss(every) == 0


def test_the_load_loss_evens_the_load() -> None:
    router, x_ND = NoisyTopKRouter(4, 5, 1), torch.rand(200, 4)
    with torch.no_grad():
        router.scores.weight[0] += 1
    assert load_loss(router(x_ND)) > 1
    optimizer = torch.optim.Adam(router.parameters(), 0.02)
    for _ in range(60):
        loss = load_loss(router(x_ND))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert load_loss(router(x_ND)) < 0.1


def test_pseudo_label_losses_by_hand() -> None:
    logits_NE = torch.randn(4, 3, requires_grad=True)
    labels_NE = torch.tensor([[0.5, 0.5, 0], [0, 1, 0], [0.5, 0, 0.5], [0, 0, 1]])
    routed = plan([[0]] * 4, 3, logits=logits_NE)
    loss = pseudo_label_loss(routed, labels_NE)
    entropy = 2 * 0.6931472 / 4
    cross = torch.nn.functional.cross_entropy(logits_NE, labels_NE)
    assert float(loss.detach()) == pytest.approx(float(cross.detach()) - entropy, abs=1e-6)
    # The gradient of a Kullback-Leibler divergence to a softmax: p - labels.
    torch.testing.assert_close(torch.autograd.grad(loss, logits_NE)[0], (logits_NE.softmax(-1) - labels_NE) / 4)
    mass_NE = torch.tensor([[2.0, 4, 0], [1, 1, 1], [0, 0, 3], [2, 2, 0]])
    fitted = activation_loss(routed, mass_NE)
    p_NE = logits_NE.sigmoid()
    expected = -(mass_NE / 4 * p_NE.log() + (1 - mass_NE / 4) * (1 - p_NE).log()).mean()
    torch.testing.assert_close(fitted, expected)
    assert activation_loss(routed, torch.zeros(4, 3)).isfinite()
