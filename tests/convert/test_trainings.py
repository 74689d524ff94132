"""The trainings behind the verbs, and sliced models that are trained further."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mole_asr.asr.grow import grow_model
from mole_asr.asr.parameters import count_parameters
from mole_asr.convert.factor import EndToEndRouter, route_loss, train_slices
from mole_asr.convert.host import Host, open_host
from mole_asr.convert.moefy import moefy
from mole_asr.convert.slicing import Cut, output_error
from mole_asr.convert.training import distillation_loss, relu_adaptation, train
from mole_asr.corpus.text_tokenizer import TextTokenizer
from mole_asr.errors import MoleError
from mole_asr.moe import PseudoLabelRouter
from mole_asr.moe.experts import feed_forward
from mole_asr.moe.losses import load_balance_loss, pseudo_label_loss
from mole_asr.moe.pseudo_labels import prior_approximate_labels
from mole_asr.text.policies import ExpertsConfig, routing_losses
from mole_asr.text.upcycle import upcycle

from .conftest import sliced_host


def test_adaptation_brings_the_relu_model_back_to_the_old_one(text_folder: Callable[..., Path], texts: Path) -> None:
    old, host = open_host(text_folder(activation="gelu")), open_host(text_folder(activation="gelu"))
    for each in (old, host):  # weights large enough that the activation matters
        for name, parameter in each.model.named_parameters():
            if "feed_forward." in name:
                parameter.data.mul_(4)
    batches = host.read(str(texts), 600, 0)
    changed = host.clone()
    changed.set_activation({"gelu": "relu"})
    losses = relu_adaptation(host, batches, steps=30, lr=3e-3)
    assert len(losses) == 30 and {part.activation for part in host.parts().values()} == {"relu"}

    def distance(other: Host) -> float:
        with torch.no_grad():
            each = [distillation_loss(other.predict(batch), old.predict(batch)) for batch in batches]
        return float(sum(each)) / len(each)

    assert distance(host) < 0.7 * distance(changed)
    assert distance(old) == pytest.approx(0, abs=1e-6)


def test_training_stops_where_it_cannot_go_on(text_folder: Callable[..., Path]) -> None:
    host = open_host(text_folder())
    with pytest.raises(MoleError, match="nothing to train on"):
        train(host.model, [{"params": host.model.parameters(), "lr": 1.0}], [], lambda batch: torch.zeros(()), 3)


def test_steps_that_a_narrow_type_cannot_hold_add_up() -> None:
    model = torch.nn.Linear(2, 1).to(torch.bfloat16)
    torch.nn.init.ones_(model.weight)
    wide = torch.nn.Linear(2, 1)
    torch.nn.init.ones_(wide.weight)
    for each in (model, wide):  # the next value below one is 1 - 1/256
        train(each, [{"params": [each.weight], "lr": 1e-3}], [0], lambda _, each=each: each.weight.sum(), 20)
    assert model.weight.dtype == torch.bfloat16 and (model.weight < 1).all()
    torch.testing.assert_close(model.weight.float(), wide.weight, atol=2**-9, rtol=0)


def test_a_model_in_bfloat16_learns(huggingface_folder: Callable[..., Path], texts: Path, tmp_path: Path) -> None:
    folder = huggingface_folder("llama", torch.bfloat16)
    host, parts = sliced_host(folder, Cut("random", 4, 2, "linear"))
    before = {name: tensor.clone() for name, tensor in host.model.state_dict().items()}
    train_slices(host, parts, host.read(str(texts), 100, 0), "prior", steps=20, lr=2e-4)
    share = [
        float((tensor != before[name]).float().mean())
        for name, tensor in host.model.state_dict().items()
        if ".experts." in name
    ]
    assert min(share) > 0.4  # single steps of 2e-4 change 15 % of the weights
    host.save(tmp_path / "out")
    again = open_host(tmp_path / "out")
    assert {layer.experts.w1_EFD.dtype for layer in again.layers().values()} == {torch.bfloat16}


def test_every_batch_is_seen_before_one_is_seen_again(text_folder: Callable[..., Path]) -> None:
    host, seen = open_host(text_folder()), []

    def loss_of(batch: int) -> torch.Tensor:
        seen.append(batch)
        return host.model.embedding.weight.sum()

    assert len(train(host.model, [{"params": host.model.parameters(), "lr": 1e-9}], [0, 1, 2], loss_of, 7, seed=1)) == 7
    assert sorted(seen[:3]) == sorted(seen[3:6]) == [0, 1, 2]


def test_the_prior_router_learns_its_labels_and_nothing_else_changes(
    text_folder: Callable[..., Path], texts: Path
) -> None:
    host, parts = sliced_host(text_folder(), Cut("random", 4, 1, "linear"))
    batches = host.read(str(texts), 900, 0)
    rows_of = open_host(text_folder()).record(batches)
    before = {name: tensor.clone() for name, tensor in host.model.state_dict().items()}

    def distance() -> float:
        layers = host.layers()
        each = [
            route_loss(layers[name], parts[name], rows_of[name], layers[name].router(rows_of[name])) for name in parts
        ]
        return float(sum(loss.detach() for loss in each))

    first = distance()
    train_slices(host, parts, batches, "prior", steps=25, lr=1e-5, router_lr=3e-2)
    assert distance() < first - 0.05
    changed = {name for name, tensor in host.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if ".experts." in name or ".router." in name}
    assert all(parameter.requires_grad and parameter.grad is None for parameter in host.model.parameters())


def test_the_loss_of_the_slices_is_that_of_the_paper(text_folder: Callable[..., Path], texts: Path) -> None:
    """Of the task, 0.05 of the route loss and 0.01 of the balance loss, these two summed over layers."""
    host, parts = sliced_host(text_folder(), Cut("random", 4, 2, "linear"))
    (batch,) = host.read(str(texts), 60, 0)
    rows_of = open_host(text_folder()).record([batch])
    expected = host.predict(batch).loss
    for name, layer in host.layers().items():
        # What the layer gets: in the second one not what the dense model gives it.
        heard: list[torch.Tensor] = []
        handle = layer.router.register_forward_pre_hook(lambda _, found, heard=heard: heard.append(found[0]))
        host.predict(batch)
        handle.remove()
        plan = layer.router(heard[0])
        assert len(heard[0]) == len(rows_of[name])
        expected = expected + 0.05 * route_loss(layer, parts[name], heard[0], plan) + 0.01 * load_balance_loss(plan)
    (first,) = train_slices(host, parts, [batch], "prior", steps=1)
    assert first == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("learning", ["prior", "end_to_end", "untrained", "oracle"])
def test_who_trains_the_router(learning: Any, text_folder: Callable[..., Path], texts: Path) -> None:
    kind = "prior_oracle" if learning == "oracle" else "linear"
    host, parts = sliced_host(text_folder(), Cut("contiguous", 4, 2, kind))
    batches = host.read(str(texts), 600, 0)
    routers = {name: tensor.clone() for name, tensor in host.model.state_dict().items() if ".router." in name}
    host_before = [host.quality(batches).figures["bits_per_byte"]]
    train_slices(host, parts, batches, learning, steps=12, lr=1e-3)
    moved = [not torch.equal(host.model.state_dict()[name], tensor) for name, tensor in routers.items()]
    assert all(moved) == (learning in ("prior", "end_to_end", "oracle")) and any(moved) == (
        learning in ("prior", "end_to_end")
    )
    assert host.quality(batches).figures["bits_per_byte"] < host_before[0]
    assert not any(isinstance(layer.router, EndToEndRouter) for layer in host.layers().values())


def test_the_end_to_end_router_computes_the_same_and_has_a_gradient() -> None:
    torch.manual_seed(0)
    plain, through = PseudoLabelRouter(6, 4, 2), EndToEndRouter(6, 4, 2)
    through.load_state_dict(plain.state_dict())
    x_ND = torch.randn(9, 6)
    torch.testing.assert_close(through(x_ND).gates, plain(x_ND).gates)
    assert torch.equal(through(x_ND).expert_ids, plain(x_ND).expert_ids)
    values_NK = torch.randn(9, 2)
    (through(x_ND).gates * values_NK).sum().backward()
    p_NK = plain(x_ND).aux["probabilities"].gather(-1, plain(x_ND).expert_ids.long())
    expected = torch.autograd.grad((2 * p_NK.log() * values_NK).sum(), plain.scores.weight)[0]
    torch.testing.assert_close(through.scores.weight.grad, expected)


def test_a_chosen_slice_may_be_as_good_as_impossible() -> None:
    router = EndToEndRouter(1, 3, 2)
    with torch.no_grad():
        router.scores.weight.copy_(torch.tensor([[60.0], [-60.0], [-70.0]]))
    plan = router(torch.ones(1, 1))
    assert plan.expert_ids.tolist() == [[0, 1]] and plan.gates.tolist() == [[1.5, 1.5]]
    plan.gates[0, 1].backward()
    torch.testing.assert_close(router.scores.weight.grad, torch.tensor([[-1.5], [1.5], [0.0]]))


def test_the_output_error_is_that_of_what_was_written(
    text_folder: Callable[..., Path], texts: Path, tmp_path: Path
) -> None:
    folder, out, data = text_folder(), str(tmp_path / "out"), str(texts)
    options = {"router": "oracle", "slices": 4, "share": 0.5, "data": data, "rows": 300}
    shown = moefy(str(folder), out, tune_steps=5, lr=0.05, **options)
    host, written = open_host(folder), open_host(out)
    rows = host.record(host.read(data, 300, 0))
    for name, part in host.parts().items():
        assert f"output error {output_error(part, written.layers()[name], rows[name]):.3f}" in str(shown)


def test_padding_is_in_no_route_loss(speech: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host, parts = sliced_host(speech / "model", Cut("contiguous", 4, 1, "linear"))
    batches = host.read(str(speech / "cuts.jsonl"), 200, 0)
    valid = int(sum(len(host.predict(batch).outputs_NV) for batch in batches))
    rows: list[int] = []
    loss = lambda plan, labels: rows.append(len(labels)) or pseudo_label_loss(plan, labels)  # noqa: E731
    monkeypatch.setattr("mole_asr.convert.factor.pseudo_label_loss", loss)
    train_slices(host, parts, batches, "prior", steps=len(batches))
    assert rows == [valid] * 3 and valid < sum(len(b) * int(b.audio_lengths_B.max()) // 640 for b in batches)


def test_labels_come_from_the_dense_part_that_was(text_folder: Callable[..., Path]) -> None:
    host, parts = sliced_host(text_folder(), Cut("random", 4, 2, "linear"))
    name, layer = next(iter(host.layers().items()))
    with torch.no_grad():
        layer.experts.w2_EDF.mul_(torch.tensor([1.0, 3.0, -1.0, 0.1])[:, None, None])
    x_ND = torch.randn(50, 16)
    dense_ND = feed_forward(x_ND, parts[name].weights, parts[name].activation)
    plan = layer.router(x_ND)
    expected = pseudo_label_loss(plan, prior_approximate_labels(x_ND, layer.experts, 2, dense_ND))
    torch.testing.assert_close(route_loss(layer, parts[name], x_ND, plan), expected)
    assert expected != pseudo_label_loss(plan, prior_approximate_labels(x_ND, layer.experts, 2))


# --- sliced models are trained further


def test_a_sliced_language_model_may_be_trained_further(text_folder: Callable[..., Path], texts: Path) -> None:
    host, _ = sliced_host(text_folder(), Cut("random", 4, 2, "centroid"))
    again = upcycle(host.model, [ExpertsConfig()], ["de", "en"])
    batch = host.read(str(texts), 100, 0)[0]
    ids_BT = batch.tokens_BS[:, :-1]
    output = again(ids_BT)
    assert torch.equal(output.logits_BTV, host.model(ids_BT).logits_BTV)
    assert len(output.plans) == 2 and routing_losses(again.policies, output.plans) == {}
    for experts, activation in ((ExpertsConfig("top_k", num_experts=2), None), (ExpertsConfig(), "reglu")):
        with pytest.raises(MoleError, match="is sliced"):
            upcycle(host.model, [experts], ["de", "en"], activation)


def test_a_sliced_recogniser_may_grow(speech: Path) -> None:
    host, _ = sliced_host(speech / "model", Cut("random", 4, 2, "centroid"))
    tokenizer = TextTokenizer(speech / "model")
    grown = grow_model(host.model, tokenizer, tokenizer, ["de", "en", "fr"]).eval()
    batch = host.read(str(speech / "cuts.jsonl"), 50, 0)[0]
    with torch.no_grad():
        expected = host.model(batch.audio_BS, batch.audio_lengths_B).log_probs_BTV
        assert torch.equal(grown(batch.audio_BS, batch.audio_lengths_B).log_probs_BTV, expected)


def test_parameters_that_compute_a_frame_are_counted(speech: Path) -> None:
    dense = count_parameters(open_host(speech / "model").model)
    host, _ = sliced_host(speech / "model", Cut("random", 4, 1, "oracle"))
    sliced = count_parameters(host.model)
    of_experts = sum(p.numel() for layer in host.layers().values() for p in layer.experts.parameters())
    assert sliced.total == dense.total
    assert dense.active - sliced.active == of_experts * 3 // 4
