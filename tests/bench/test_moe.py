"""`bench moe` on tiny sizes: every row is whole, and what computes something else gets no time."""

import json
from pathlib import Path

import pytest
import torch

from mole_asr.bench import variants
from mole_asr.bench.cases import Case, make_dense, make_problem
from mole_asr.bench.check import errors, reference, row_error
from mole_asr.bench.measure import measure_case
from mole_asr.bench.table import table
from mole_asr.bench.timing import Ceilings, Timing, quiet, time_in_turn
from mole_asr.cli import main

CPU = torch.device("cpu")
KEYS = {
    *("backend", "device", "dtype", "d_model", "d_ff", "experts", "top_k", "rows", "skew", "pass", "milliseconds"),
    *("ratio_dense", "ratio_grouped_mm", "error"),
}


def make_case(kind: str = "token", **kwargs) -> Case:
    sizes = {"d_model": 16, "d_ff": 24, "experts": 4, "top_k": 1 if kind == "language" else 2, "rows": 50}
    return Case(
        **{"kind": kind, "dtype": "float32", "skew": "even", "activation": "silu", "bias": True, **sizes, **kwargs}
    )


@pytest.fixture(autouse=True)
def one_thread():
    with quiet():
        yield


def test_the_verb_writes_whole_rows_and_prints_a_table_a_case(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output = tmp_path / "moe.json"
    sizes = "--d-model 16 --rows 60 --experts 1,3,4 --neurons 16 --repeat 1 --skew even skewed"
    assert main(["bench", "moe", *sizes.split(), "--output", str(output)]) == 0
    rows = json.loads(output.read_text())
    assert all(set(row) >= KEYS for row in rows)
    assert {row["kind"] for row in rows} == {"token", "language", "slices"}
    assert {row["backend"] for row in rows} >= {"dense", "dense_tiled", "cpu_tiled", "segment", "grouped_mm"}
    assert {row["pass"] for row in rows} == {"forward", "forward+backward"}
    assert {(row["experts"], row["skew"]) for row in rows if row["kind"] == "token"} == {
        (experts, skew) for experts in (3, 4) for skew in ("even", "skewed")
    }
    for row in rows:
        assert row["milliseconds"] > 0 and row["ratio_dense"] > 0 and row["refusal"] is None
        assert 0 < row["error"] < (1e-3 if row["dtype"] == "float32" else 3e-2)
        assert row["backend"] != "grouped_mm" or row["ratio_grouped_mm"] == 1
    text = capsys.readouterr().out
    assert text.count("cpu_tiled") == sum(row["backend"] == "cpu_tiled" for row in rows)
    assert "slices: 4 experts 16 -> 16 -> 16" in text


@pytest.mark.parametrize("wrong", ["row", "scale", "nan", "gradient", "exception"])
def test_what_disagrees_with_the_reference_gets_no_time(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = variants._dispatch

    def dispatch(backend, problem):
        y_ND = right(backend, problem)
        if backend != "cpu_tiled":
            return y_ND
        if wrong == "exception":
            raise RuntimeError("no such kernel")
        if wrong == "gradient":
            return y_ND.detach() + 0.99 * (y_ND - y_ND.detach())
        factor = torch.ones(len(y_ND), 1)
        factor[7 if wrong == "row" else ...] = {"row": 0.9, "scale": 1 + 1e-4, "nan": torch.nan}[wrong]
        return y_ND * factor

    monkeypatch.setattr(variants, "_dispatch", dispatch)
    rows = measure_case(make_case(), ["forward", "forward+backward"], variants.BACKENDS, 1, CPU)
    for row in rows:
        wrong_here = row["backend"] == "cpu_tiled" and (wrong != "gradient" or row["pass"] == "forward+backward")
        assert (row["milliseconds"] is None) == (row["ratio_dense"] is None) == (row["refusal"] is not None)
        assert (row["refusal"] is not None) == wrong_here
    refused = [row["refusal"] for row in rows if row["refusal"]]
    assert all("disagrees" in why if wrong != "exception" else why == "fails: no such kernel" for why in refused)
    assert table(rows).count("refused") == len(refused)


def test_a_refused_backend_is_a_failure_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variants, "_dispatch", lambda backend, problem: 2 * problem.x_ND)
    sizes = "--kinds token --dtype float32 --d-model 16 --rows 20 --repeat 1 --passes forward --backends cpu_tiled"
    assert main(["bench", "moe", *sizes.split()]) == 1


def test_options_without_meaning_are_refused(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    for words, message in (
        ("--kinds sentence", "--kinds sentence: give token, language, slices"),
        ("--dtype float8", "--dtype float8: give float32, bfloat16"),
        ("--passes backward", "--passes backward: give forward, forward+backward"),
        ("--backends fast", "--backends fast: give reference, cpu_tiled"),
        ("--output table.txt", "give such a name"),
        ("--d-model 0", "sizes must be 1 or more"),
        ("--d-ff 0", "sizes must be 1 or more"),
        ("--repeat 0", "--repeat 0: must be at least 1"),
        ("--kinds token --experts 4 --top-k 9", "--top-k: is above all --experts"),
        ("--kinds slices --d-ff 64 --neurons 32", "--neurons 32: of 64 neurons a quarter must be a slice"),
    ):
        assert main(["bench", "moe", *words.split()]) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("activation", ["silu", "swiglu"])
def test_transformers_computes_the_same(activation: str) -> None:
    pytest.importorskip("transformers", reason="transformers is missing: pip install mole-asr[dev]")
    problem = make_problem(make_case(activation=activation, bias=activation == "silu"), CPU)
    expected = reference(problem, "forward+backward")
    assert max(errors(variants._transformers, problem, expected, "forward+backward")) < 1e-5


def test_problems_are_the_same_each_time_and_skewed_as_asked() -> None:
    for kind in ("token", "language", "slices"):
        case = make_case(kind, rows=3500, skew="skewed", experts=8)
        one, two = make_problem(case, CPU), make_problem(case, CPU)
        assert torch.equal(one.x_ND, two.x_ND) and torch.equal(one.plan.expert_ids, two.plan.expert_ids)
        assert one.plan.layout == ("segment" if kind == "language" else "token")
    counts = torch.bincount(make_problem(make_case(rows=3500, skew="skewed", experts=8), CPU).plan.expert_ids[:, 0])
    assert counts[0] > 2 * counts[1] > 2 * counts[3]
    even = torch.bincount(make_problem(make_case(rows=3500, experts=8), CPU).plan.expert_ids.flatten())
    assert even.min() > 0.8 * even.max()


def test_dense_layers_have_the_active_flops_of_the_case() -> None:
    for kind, times in (("token", 1), ("language", 1), ("slices", 2)):
        case = make_case(kind, activation="relu", bias=False)
        dense = make_dense(case, CPU)
        weights = sum(parameter.numel() for parameter in dense.experts.parameters())
        assert 2 * weights * len(dense.x_ND) == case.dense().flops == times * case.flops


def test_gates_of_every_kind_count_as_work_and_the_shared_expert_as_memory() -> None:
    flops = {name: make_case(activation=name).flops for name in ("relu", "swiglu", "reglu", "geglu")}
    assert flops["swiglu"] == flops["reglu"] == flops["geglu"] == 1.5 * flops["relu"]
    language = make_case("language", activation="relu", bias=False)
    weights = sum(parameter.numel() for parameter in make_problem(language, CPU).experts.parameters())
    rows, pairs = language.rows * language.d_model, 2 * language.rows * language.d_model
    hidden = 2 * language.pairs * language.d_ff
    assert language.bytes_moved(backward=False) == 4 * (weights + hidden + rows + pairs + pairs + rows)


def test_memory_traffic_counts_each_tensor_once() -> None:
    case = make_case(top_k=1, dtype="bfloat16")
    # x, y; the activation written and read; all weights.
    assert case.bytes_moved(backward=False) == 2 * (2 * 50 * 16 + 2 * 50 * 24 + 4 * 2 * 16 * 24)
    assert case.bytes_moved(backward=True) > 2.5 * case.bytes_moved(backward=False)
    assert Ceilings(1e12, 1e9).roofline_ms(1e9, 5e6) == 5


def test_backends_that_compute_none_of_the_cases_are_named(capsys: pytest.CaptureFixture) -> None:
    sizes = "--d-model 16 --rows 60 --experts 3 --dtype float32 --passes forward --repeat 1 --kinds token"
    assert main(["bench", "moe", *sizes.split(), "--backends", "segment", "reference"]) == 0
    assert "none of these cases on this device: segment\n" in capsys.readouterr().out


def test_slices_that_do_not_divide_the_layer_are_refused(capsys: pytest.CaptureFixture) -> None:
    assert main(["bench", "moe", "--kinds", "slices", "--d-model", "16", "--neurons", "3"]) == 1
    assert "--neurons 3: 64 neurons are no whole number of such slices" in capsys.readouterr().err


def test_functions_are_timed_in_turn() -> None:
    calls: list[str] = []
    times = time_in_turn({name: (lambda name=name: calls.append(name)) for name in "ab"}, 3, CPU)
    assert "".join(calls) == "abababab" and set(times) == {"a", "b"}
    assert all(isinstance(one, Timing) and 0 <= one.low <= one.milliseconds <= one.high for one in times.values())


def test_one_wrong_row_is_as_large_an_error_as_it_is_wrong() -> None:
    expected = torch.randn(10000, 8, dtype=torch.float64)
    found = expected.clone()
    found[123] = 0
    assert row_error(found, expected) == pytest.approx(float(expected[123].norm()) / 8**0.5, rel=0.05)
    assert row_error(expected, expected) == 0
    assert row_error(found / 0, expected) == float("inf")
