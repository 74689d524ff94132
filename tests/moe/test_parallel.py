"""Experts spread over two processes against one process that has them all.

Each rank is this file run as a program: `python test_parallel.py RANK RANKS FOLDER` (see `main`).
"""

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from mole_asr.moe import Experts, MoELayer, RoutingPlan, TopKRouter
from mole_asr.moe.parallel import parallelize_experts

RANKS = 2
E, D, F, T = 5, 6, 7, 4
SHARE = -(-E // RANKS)
CASES = ["top_k", "rank_without_rows", "rank_without_work", "sentinels", "segments", "layers_share_a_plan"]
PAIRS = [*((name, backend) for name in CASES for backend in ("reference", "auto")), ("segments", "segment")]


def make_batch(lengths: list[int], router: str, low: int = 0, high: int = E + 1) -> dict[str, Any]:
    """Rows of one rank (not a number at padding) and, without a router in the layer, a plan for them."""
    lengths_B = torch.tensor(lengths)
    x_BTD = torch.randn(len(lengths), T, D, dtype=torch.float64)
    x_BTD[torch.arange(T) >= lengths_B[:, None]] = torch.nan
    batch = {"x_BTD": x_BTD, "lengths_B": lengths_B, "dy_BTD": torch.randn(len(lengths), T, D, dtype=torch.float64)}
    if router == "top_k":
        return batch
    units, top_k = (len(lengths), 1) if router == "segment" else (sum(lengths), 2)
    ids = torch.randint(low, high, (units, top_k), dtype=torch.int32)
    gates = torch.randn(units, top_k, dtype=torch.float64).where(ids < E, torch.nan)
    segments = torch.nn.functional.pad(lengths_B.cumsum(0), (1, 0)) if router == "segment" else None
    shared_gates = torch.randn(units, dtype=torch.float64)
    return batch | {"ids": ids, "gates": gates, "shared_gates": shared_gates, "layout": (router, segments)}


def make_layer(backend: str, router: nn.Module | None = None, **kwargs) -> MoELayer:
    return MoELayer(D, F, E, router, shared_expert=True, backend=backend, **kwargs).double()


def make_case(name: str, backend: str) -> dict[str, Any]:
    if name in ("top_k", "rank_without_rows"):
        router = TopKRouter(D, E, 2, shared_expert=True)
        layers = [make_layer(backend, router, activation="swiglu", bias=False)]
        lengths = [[4, 0, 3], [0, 0], [1, 2]] if name == "rank_without_rows" else [[4, 0, 3, 4], [2], [1]]
        return {"layers": layers, "batches": [make_batch(own, "top_k") for own in lengths]}
    if name == "segments":
        return {"layers": [make_layer(backend)], "batches": [make_batch([2, 0, 4], "segment") for _ in range(3)]}
    if name == "rank_without_work":  # only the first rank's experts have rows, and one of those has none
        return {"layers": [make_layer(backend)], "batches": [make_batch([3, 4], "token", 0, 2) for _ in range(3)]}
    if name == "sentinels":
        return {"layers": [make_layer(backend)], "batches": [make_batch([3, 4], "token", e, E + 1) for e in (E, 3, 0)]}
    layers = [make_layer(backend), make_layer(backend)]
    return {"layers": layers, "batches": [make_batch([4, 4, 2], "token") for _ in range(3)]}


def run_case(case: dict[str, Any], mesh: DeviceMesh | None, batches: list[dict[str, Any]]) -> dict[str, Any]:
    """Forward and backward of all layers over each batch.

    Returns:
        "own": outputs, gradients and what was sent of each batch; "parameters": gradients, of all batches, by name.
    """
    layers = nn.ModuleList(case["layers"])
    if mesh is not None:
        parallelize_experts(layers, mesh)
    own = []
    for batch in batches:
        inputs = [batch[name].clone().requires_grad_() for name in ("x_BTD", "gates", "shared_gates") if name in batch]
        plan = None
        if "ids" in batch:
            plan = RoutingPlan(batch["ids"], inputs[1], E, *batch["layout"], inputs[2])
        outputs, plans = zip(*(layer(inputs[0], batch["lengths_B"], plan) for layer in layers), strict=True)
        sum((y_BTD * batch["dy_BTD"]).sum() for y_BTD in outputs).backward()
        tensors = [y_BTD.detach() for y_BTD in outputs] + [tensor.grad for tensor in inputs]
        ids = plans[0].to_token_layout(int(batch["lengths_B"].sum())).expert_ids
        sent = [route.sent for route in plans[0].schedules.values()] if mesh is not None else None
        own.append({"tensors": tensors, "ids": ids, "sent": sent})
    return {"own": own, "parameters": {name: gradient_of(tensor) for name, tensor in layers.named_parameters()}}


def gradient_of(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad


def error_of(model: nn.Module, mesh: DeviceMesh) -> str:
    try:
        parallelize_experts(model, mesh)
    except ValueError as error:
        return str(error)
    return "none"


def main(rank: int, ranks: int, folder: Path) -> None:
    """One rank: all cases on its own batches, and the errors of wrong calls."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", timedelta(seconds=60), rank=rank, world_size=ranks)
    mesh = init_device_mesh("cpu", (ranks,))
    cases = torch.load(folder / "cases.pt", weights_only=False)
    results = {name: run_case(case, mesh, case["batches"][rank : rank + 1]) for name, case in cases.items()}
    spread = Experts(E, D, F)
    results["errors"] = {
        "one dimension, not 2": error_of(Experts(E, D, F), init_device_mesh("cpu", (1, ranks))),
        "1 experts leave a rank": error_of(MoELayer(D, F, 1), mesh),
        "none": error_of(spread, mesh),
        "spread over ranks already": error_of(spread, mesh),
    }
    results["parameters"] = {name: str(tensor.placements) for name, tensor in spread.named_parameters()}
    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def cases() -> dict[tuple[str, str], dict[str, Any]]:
    torch.manual_seed(0)
    return {(name, backend): make_case(name, backend) for name, backend in PAIRS}


@pytest.fixture(scope="module")
def ranks(cases: dict[tuple[str, str], dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each rank found."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.save(cases, folder / "cases.pt")
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(RANKS), str(folder)], env=environment)
        for rank in range(RANKS)
    ]
    try:
        codes = [process.wait(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0] * RANKS
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize(("name", "backend"), PAIRS)
def test_ranks_compute_what_one_process_does(
    cases: dict[tuple[str, str], dict[str, Any]], ranks: list[Any], name: str, backend: str
) -> None:
    case = cases[name, backend]
    alone = run_case(case, None, case["batches"][:RANKS])
    for expected, rank in zip(alone["own"], ranks, strict=True):
        (found,) = rank[name, backend]["own"]
        for mine, their in zip(found["tensors"], expected["tensors"], strict=True):
            torch.testing.assert_close(mine, their, atol=1e-12, rtol=1e-12)
    for parameter, expected in alone["parameters"].items():
        gradients = [rank[name, backend]["parameters"][parameter] for rank in ranks]
        spread = "_E" in parameter
        # Every rank has the whole gradient of an expert, but of router and shared expert only its rows' share.
        for found in gradients if spread else [sum(gradients)]:
            torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_a_row_travels_once_to_each_rank_that_has_experts_for_it(ranks: list[Any], name: str) -> None:
    for rank in ranks:
        (found,) = rank[name, "auto"]["own"]
        assert found["sent"] == [
            [int(((found["ids"] // SHARE == to) & (found["ids"] < E)).any(1).sum()) for to in range(RANKS)]
        ]  # one list: layers that share a plan exchange the sizes once


def test_the_cases_are_what_they_say(ranks: list[Any]) -> None:
    sent = {name: [rank[name, "auto"]["own"][0]["sent"][0] for rank in ranks] for name in CASES}
    assert sent["rank_without_rows"][1] == [0] * RANKS
    assert all(to[1:] == [0] * (RANKS - 1) for to in sent["rank_without_work"])
    assert sent["sentinels"][0] == [0] * RANKS and sum(sent["sentinels"][1]) > 0
    assert len({count for to in sent["top_k"] for count in to}) > 2


def test_experts_are_sharded_and_wrong_calls_are_refused(ranks: list[Any]) -> None:
    for rank in ranks:
        for expected, message in rank["errors"].items():
            assert expected in message
        assert set(rank["parameters"]) == {"w1_EFD", "b1_EF", "w2_EDF", "b2_ED"}
        assert set(rank["parameters"].values()) == {"(Shard(dim=0),)"}


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
