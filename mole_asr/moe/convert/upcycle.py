"""A dense FFN copied into experts (sparse upcycling, as in Post-MoE).

Shape letters: E experts, D model width, F width of the dense FFN and of each expert.
"""

from mole_asr.moe.convert.slices import set_parameters
from mole_asr.moe.dispatch import Backend
from mole_asr.moe.experts import Activation, Experts, ExpertWeights
from mole_asr.moe.layer import MoELayer
from mole_asr.moe.routers.base import Router


def upcycle_dense(
    dense: ExpertWeights,
    num_experts: int,
    activation: Activation,
    router: Router | None = None,
    shared_expert: bool = False,
    backend: Backend = "auto",
) -> MoELayer:
    """A layer of E copies of a dense FFN; training with a random router makes them differ.

    Where a row's weights sum to one, the layer computes what the dense FFN computes: `TopKRouter` and
    `ForcedLabelRouter` with renormalised weights, `LanguageRouter` with a shared expert (r + 1 - r). With raw weights
    it starts smaller, at about k / E of the output (Post-MoE, Zheng et al., arXiv 2410.10626, uses raw ones).

    Args:
        dense: the tensors of the dense FFN; with "swiglu" the first matrix has 2F rows, gate first. They are copied.
        num_experts: E, without the shared expert.
        activation: of the dense FFN.
        router: of the layer; None to give a plan to every forward.
        shared_expert: whether there is a shared expert, one more copy.
        backend: "auto", or a fixed backend of `dispatch`.

    Raises:
        ValueError: the tensors do not fit together.
    """
    d_model, d_ff = dense.w2_DF.shape
    bias = dense.b1_F is not None or dense.b2_D is not None
    layer = MoELayer(d_model, d_ff, num_experts, router, activation, bias, shared_expert, backend)
    fill_experts(layer.experts, dense)
    return layer


def fill_experts(experts: Experts, dense: ExpertWeights) -> None:
    """Makes each expert, and the shared one if there is one, a copy of a dense FFN of the same sizes.

    Raises:
        ValueError: the tensors do not fit.
    """
    values = {"w1_{}FD": dense.w1_FD, "w2_{}DF": dense.w2_DF}
    if experts.b1_EF is not None:
        values["b1_{}F"] = dense.w1_FD.new_zeros(len(dense.w1_FD)) if dense.b1_F is None else dense.b1_F
        values["b2_{}D"] = dense.w2_DF.new_zeros(len(dense.w2_DF)) if dense.b2_D is None else dense.b2_D
    copies = {name.format("E"): value.expand(experts.num_experts, *value.shape) for name, value in values.items()}
    set_parameters(experts, **copies)
    if experts.shared_weights() is not None:
        set_parameters(experts, **{f"shared_{name.format('')}": value for name, value in values.items()})
