"""Which experts a batch pulls at, and how strongly."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mole_asr.asr.gradients import gradient_norms
from mole_asr.asr.losses import losses
from mole_asr.asr.mixture import MixtureFeedForward
from mole_asr.corpus.batch import Batch

from .conftest import LANGUAGES


def backward(model: torch.nn.Module, batch: Batch) -> None:
    """Gradients of the CTC loss alone."""
    model.train()
    losses(model(batch.audio_BS, batch.audio_lengths_B, batch.languages_B), batch)["ctc"].backward()


def test_norms_are_over_all_layers_and_parameters_of_an_expert(make_model: Callable[..., Any], batch: Batch) -> None:
    model = make_model(num_blocks=3, num_mole_blocks=2)
    assert gradient_norms(model) == {}
    backward(model, batch)
    norms = gradient_norms(model)
    layers = [layer.moe.experts for layer in model.modules() if isinstance(layer, MixtureFeedForward)]
    assert len(layers) > 1 and set(norms) == {*LANGUAGES, "agnostic"}
    parameters = [p for experts in layers for p in experts.parameters()]
    whole = torch.cat([p.grad.flatten() for p in parameters]).norm()
    assert torch.stack(list(norms.values())).norm().item() == pytest.approx(whole.item(), rel=1e-5)
    second = [p.grad[1].flatten() for e in layers for n, p in e.named_parameters() if not n.startswith("shared")]
    assert norms[LANGUAGES[1]].item() == pytest.approx(torch.cat(second).norm().item(), rel=1e-5)


def test_only_who_computed_is_pulled_at(make_model: Callable[..., Any], batch: Batch) -> None:
    model = make_model(routing="true")
    batch.languages_B[:] = 2
    backward(model, batch)
    norms = gradient_norms(model)
    assert norms[LANGUAGES[2]] > 0 and norms["agnostic"] > 0
    assert [norms[code].item() for code in LANGUAGES[:2]] == [0.0, 0.0]


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"mixture": "dense"}, set()),
        ({"mixture": "switch", "num_experts": 2}, {"0", "1"}),
        ({"reliability": "one"}, set(LANGUAGES)),
    ],
)
def test_names(make_model: Callable[..., Any], batch: Batch, changes: dict, names: set[str]) -> None:
    model = make_model(**changes)
    backward(model, batch)
    assert set(gradient_norms(model)) == names
