"""The `convert moefy` verb: a trained model whose feed-forward parts compute some of their neurons (MoEfication)."""

from typing import Literal

from torch import Tensor

from mole_asr.arguments import check_at_least, check_seed
from mole_asr.convert.host import draw_rows, open_host
from mole_asr.convert.report import Conversion, lines_of
from mole_asr.convert.slicing import CUT_ROWS, SHOWN_ROWS, Cut, active_slices, output_error, slice_parts
from mole_asr.convert.speed import measure_speed
from mole_asr.convert.training import check_positive, imitate, relu_adaptation
from mole_asr.errors import MoleError, print_skipped
from mole_asr.files import check_output_folder
from mole_asr.moe.convert.splits import Split


def moefy(
    model: str,
    output: str,
    *,
    slices: int = 16,
    share: float = 0.25,
    split: Split = "clusters",
    router: Literal["mlp", "centroid", "oracle"] = "mlp",
    data: str | None = None,
    test: str | None = None,
    rows: int = 20_000,
    relu_steps: int = 0,
    tune_steps: int = 0,
    lr: float = 1e-3,
    device: str = "cpu",
    seed: int = 0,
) -> Conversion:
    """Cuts the feed-forward parts of a trained model into slices, of which a router chooses some for each token.

    Zhang et al., arXiv 2110.01786. No value of the model changes, unless it is trained too: adapted to ReLU before the
    cut (the fewer neurons fire, the less is lost), or to fewer slices behind it. That all slices together are the dense
    part is checked before any of them is trained or written.

    Args:
        model: folder of a language model or recogniser of ours, or of a Hugging Face model like Llama, BERT or T5.
        output: folder of the new model, which is used as the old one was; that of a Hugging Face model is opened by
            `mole_asr.convert.host.open_host(output).model`.
        slices: into which each feed-forward part is cut.
        share: of the slices that compute a token, 0 to 1.
        split: which neurons make a slice: contiguous, random, clusters, coactivation.
        router: mlp learns from data, centroid compares a token with the mean neuron of a slice, oracle looks at all
            neurons: it is slow, and shows what the best router could do.
        data: what to learn from (router mlp, split coactivation, ReLU adaptation): texts as `mole-asr prepare texts`
            writes them; for a recogniser, a manifest.
        test: other data, to measure how much quality is kept.
        rows: tokens or frames to take of the data.
        relu_steps: steps of training with ReLU in place of GELU, SiLU or the gate's SiLU, before the cut.
        tune_steps: steps of training after the cut, which teach the slices that are chosen to do without the others.
            Not part of MoEfication as published.
        lr: learning rate of these steps.
        device: where to compute and to time, such as "cuda".
        seed: of all that is drawn.

    Returns:
        What became of each part, speed and quality, and which recordings were skipped.

    Raises:
        MoleError: the model or the data cannot be read, or they and the options do not fit together.
    """
    check_output_folder(output, model)
    cut = Cut(split, slices, active_slices(share, slices), router, seed)
    check_at_least(0, relu_steps=relu_steps, tune_steps=tune_steps)
    check_at_least(1, rows=rows)
    check_seed(seed)
    check_positive(lr=lr)
    if data is None and (cut.needs_rows or relu_steps or tune_steps):
        raise MoleError("--data: is missing; the router mlp, the split coactivation and trainings learn from data")
    host = open_host(model, device)
    host.check_uncut(model)
    batches = [] if data is None else host.read(data, rows, seed)
    tests = [] if test is None else host.read(test, rows, seed)
    before = host.quality(tests) if tests else None
    if relu_steps:
        relu_adaptation(host, batches, relu_steps, lr, seed)
    parts = host.parts()
    heard = host.record(batches, CUT_ROWS) if batches else None
    layers = slice_parts(parts, cut, heard)
    shown = host.record(tests, SHOWN_ROWS) if tests else _drawn(heard)
    for name, layer in layers.items():
        host.put(name, layer)
    if tune_steps:
        imitate(host, open_host(model, device), batches, tune_steps, lr, seed)
    errors = {} if shown is None else {name: output_error(parts[name], layers[name], shown[name]) for name in parts}
    speed = measure_speed(parts, layers, shown)
    after = host.quality(tests) if tests else None
    host.save(output)
    print_skipped(host.failures)
    return Conversion([*lines_of(layers, errors, speed, before, after), f"{output}: written"], host.failures)


def _drawn(heard: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
    return None if heard is None else {name: draw_rows(x_ND, SHOWN_ROWS) for name, x_ND in heard.items()}
