"""Each kind of model: what is sliced, all slices together are the model, what is saved is what is loaded, and back."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mole_asr.bench.timing import Timing
from mole_asr.convert.dense import dense
from mole_asr.convert.factor import _routed
from mole_asr.convert.host import DrawnRows, Host, draw_rows, open_host
from mole_asr.convert.slicing import Cut, slice_parts
from mole_asr.convert.speed import measure_speed
from mole_asr.errors import MoleError
from mole_asr.moe.experts import feed_forward
from mole_asr.text.vocabulary import load_vocabulary

HUGGING_FACE = ["llama", "llama-bias", "bert", "bert-base", "t5", "t5-gated"]
PARTS = {
    "text": ["blocks.0.feed_forward", "blocks.1.feed_forward"],
    "speech": ["blocks.0.feed_forward_in", "blocks.0.feed_forward_out", "blocks.1.feed_forward_in"],
    "llama": ["model.layers.0.mlp", "model.layers.1.mlp"],
    "llama-bias": ["model.layers.0.mlp", "model.layers.1.mlp"],
    "bert": ["bert.encoder.layer.0.intermediate", "bert.encoder.layer.1.intermediate"],
    "bert-base": ["encoder.layer.0.intermediate", "encoder.layer.1.intermediate"],
    "t5": [f"{s}.block.{n}.layer.{i}.DenseReluDense" for s, i in (("encoder", 1), ("decoder", 2)) for n in (0, 1)],
}
PARTS["t5-gated"] = PARTS["t5"]
RECOGNISERS = ["speech", "whisper", "wav2vec2", "w2v_bert"]
PARTS["wav2vec2"] = ["encoder.blocks.0.feed_forward"]  # the upper block has experts
PARTS["whisper"] = [*PARTS["wav2vec2"], "encoder.blocks.1.feed_forward"]
PARTS["w2v_bert"] = [f"encoder.blocks.{name}" for name in ("0.feed_forward_in", "0.feed_forward", "1.feed_forward_in")]
KINDS = list(PARTS)
ACTIVATIONS = {"text": "swiglu", "speech": "silu", "llama": "swiglu", "llama-bias": "swiglu", "t5": "relu"}
ACTIVATIONS |= {"bert": "gelu", "bert-base": "gelu", "t5-gated": "geglu"}
ACTIVATIONS |= {"whisper": "gelu", "wav2vec2": "gelu", "w2v_bert": "silu"}


@pytest.fixture
def folder_of(
    text_folder: Callable[..., Path],
    speech: Path,
    huggingface_folder: Callable[[str], Path],
    pretrained_folder: Callable[[str], Path],
) -> Callable[[str], Path]:
    def find(kind: str) -> Path:
        if kind in HUGGING_FACE:
            return huggingface_folder(kind)
        if kind in RECOGNISERS[1:]:
            return pretrained_folder(kind)
        return speech / "model" if kind == "speech" else text_folder()

    return find


@pytest.fixture
def data_of(texts: Path, speech: Path) -> Callable[[str], str]:
    return lambda kind: str(speech / "cuts.jsonl" if kind in RECOGNISERS else texts)


def outputs(host: Host, batches: list[Any]) -> list[torch.Tensor]:
    with torch.no_grad():
        return [host.predict(batch).outputs_NV for batch in batches]


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor], atol: float) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=atol, rtol=0)


def slice_all(host: Host, cut: Cut, rows: Any = None) -> None:
    for name, layer in slice_parts(host.parts(), cut, rows).items():
        host.put(name, layer)


@pytest.mark.parametrize("kind", KINDS)
def test_all_slices_together_are_the_model(kind: str, folder_of: Any, data_of: Any) -> None:
    host = open_host(folder_of(kind))
    batches = host.read(data_of(kind), 150, seed=0)
    if kind not in RECOGNISERS:  # whose features are float32
        host.model.double()
    expected = outputs(host, batches)
    assert list(host.parts()) == PARTS[kind]
    assert {part.activation for part in host.parts().values()} == {ACTIVATIONS[kind]}
    slice_all(host, Cut("random", 4, 4, "centroid"))
    assert not host.parts() and list(host.layers()) == PARTS[kind]
    assert_same(outputs(host, batches), expected, 1e-4 if kind in RECOGNISERS else 1e-9)
    for layer in host.layers().values():
        layer.choose_router("centroid", 1)
    assert max(float((a - b).abs().max()) for a, b in zip(outputs(host, batches), expected, strict=True)) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_recorded_rows_are_what_the_parts_compute(kind: str, folder_of: Any, data_of: Any) -> None:
    host = open_host(folder_of(kind))
    batches = host.read(data_of(kind), 150, seed=0)
    rows = host.record(batches)
    given: dict[str, list[torch.Tensor]] = {name: [] for name in PARTS[kind]}
    for name, part in host.parts().items():
        part.listen.register_forward_pre_hook(lambda _, inputs, name=name: given[name].append(inputs[0].flatten(0, -2)))
        x_ND = rows[name]
        torch.testing.assert_close(part.run(x_ND), feed_forward(x_ND, part.weights, part.activation))
        given[name].clear()
    predictions = [host.predict(batch) for batch in batches]
    for name, x_ND in rows.items():
        masks = [found.valid_of(name) for found in predictions]
        valid = [x if mask is None else x[mask] for x, mask in zip(given[name], masks, strict=True)]
        torch.testing.assert_close(x_ND, torch.cat(valid).detach())
        padded = sum(map(len, given[name])) - len(x_ND)
        assert (padded > 0) == (kind in ("text", *RECOGNISERS))
        if padded == 0:
            continue
        # Behind each utterance, Whisper's encoder hears a second of silence, of which the CTC head says nothing.
        silent = sum(50 * len(batch) for batch in batches) if kind == "whisper" else 0
        assert len(x_ND) == silent + sum(len(found.outputs_NV) for found in predictions)


@pytest.mark.parametrize("router", ["mlp", "oracle", "linear"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_is_loaded_and_comes_back_dense(
    kind: str, router: Any, folder_of: Any, data_of: Any, tmp_path: Path
) -> None:
    folder = folder_of(kind)
    host = open_host(folder)
    batches = host.read(data_of(kind), 150, seed=0)
    before, state = outputs(host, batches), {name: t.clone() for name, t in host.model.state_dict().items()}
    slice_all(host, Cut("clusters", 4, 2, router), host.record(batches))
    host.save(tmp_path / "sliced")
    again = open_host(tmp_path / "sliced")
    assert list(again.layers()) == PARTS[kind] and not again.parts() and not again.model.training
    assert_same(outputs(again, batches), outputs(host, batches), 0)
    dense(str(tmp_path / "sliced"), str(tmp_path / "dense"))
    back = open_host(tmp_path / "dense")
    assert_same(outputs(back, batches), before, 0)
    assert back.model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in back.model.state_dict().items())
    if kind in HUGGING_FACE:
        assert json.loads((tmp_path / "dense/config.json").read_text()) == json.loads(
            (folder / "config.json").read_text()
        )
        plain, info = type(back.model).from_pretrained(tmp_path / "dense", output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert all(torch.equal(tensor, state[name]) for name, tensor in plain.state_dict().items())
        with pytest.raises(OSError):  # no one may take the sliced folder for a dense model
            type(back.model).from_pretrained(tmp_path / "sliced")


@pytest.mark.parametrize("kind", KINDS)
def test_relu_is_kept(kind: str, folder_of: Any, data_of: Any, tmp_path: Path) -> None:
    from mole_asr.convert.training import RELU

    host = open_host(folder_of(kind))
    batches = host.read(data_of(kind), 150, seed=0)
    before = outputs(host, batches)
    host.set_activation(RELU)
    relu = outputs(host, batches)
    assert {part.activation for part in host.parts().values()} <= {"relu", "reglu"}
    assert (max(float((a - b).abs().max()) for a, b in zip(relu, before, strict=True)) > 1e-4) == (kind != "t5")
    slice_all(host, Cut("contiguous", 4, 4, "oracle"))
    assert_same(outputs(host, batches), relu, 1e-3)
    host.save(tmp_path / "sliced")
    assert_same(outputs(open_host(tmp_path / "sliced"), batches), outputs(host, batches), 0)
    if kind in RECOGNISERS:
        with pytest.raises(MoleError, match="was adapted to relu"):
            dense(str(tmp_path / "sliced"), str(tmp_path / "dense"))
    else:
        dense(str(tmp_path / "sliced"), str(tmp_path / "dense"))
        assert_same(outputs(open_host(tmp_path / "dense"), batches), relu, 0)


@pytest.mark.parametrize("kind", ["text", "speech", "llama", "bert", "t5"])
def test_quality_is_that_of_a_plain_loop(kind: str, folder_of: Any, data_of: Any) -> None:
    host = open_host(folder_of(kind))
    batches = host.read(data_of(kind), 150, seed=0)
    quality = host.quality(batches)
    nats = sum(float(host.predict(batch).loss.detach()) * host.predict(batch).count().counted for batch in batches)
    counted = sum(host.predict(batch).count().counted for batch in batches)
    assert counted > 0 and -20 < quality.score < 0.9
    if kind == "speech":
        assert quality.figures["cer"] == pytest.approx(100 * (1 - quality.score))
    elif kind == "text":
        shares = sum(float(batch.byte_shares_BS[:, 1:].sum()) for batch in batches)
        assert quality.figures["bits_per_byte"] == pytest.approx(nats / shares / 0.6931472, rel=1e-5)
    else:
        assert quality.figures["loss"] == pytest.approx(nats / counted, rel=1e-5)


@pytest.mark.parametrize("vocabulary", ["bytes", "pieces"])
def test_data_are_drawn_anew_by_the_seed_and_alike_by_the_same(
    vocabulary: str, texts: Path, pieces: Path, text_folder: Callable[..., Path]
) -> None:
    host = open_host(text_folder(vocabulary=pieces if vocabulary == "pieces" else vocabulary))
    first, again, other = (host.read(str(texts), 200, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(a.tokens_BS, b.tokens_BS) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0].tokens_BS, other[0].tokens_BS)
    assert 200 <= sum(int(batch.lengths_B.sum()) for batch in first) < 200 + 16 * 32


def test_an_encoder_of_texts_hides_the_same_tokens_each_time(texts: Path, text_folder: Callable[..., Path]) -> None:
    host = open_host(text_folder(causal=False))
    batches = host.read(str(texts), 200, seed=0)
    assert host.quality(batches) == host.quality(batches)
    batch, read = batches[0], list[torch.Tensor]()
    host.model.get_submodule("embedding").register_forward_pre_hook(lambda _, found: read.append(found[0]))
    counted = host.predict(batch).count().counted
    assert 0 < counted < 0.4 * int(batch.lengths_B.sum())
    # What is asked is hidden, and nothing else.
    hidden_BT = read[0] != batch.tokens_BS[:, 1:]
    assert int((hidden_BT & (batch.targets() >= 0)).sum()) == counted
    assert read[0][hidden_BT].unique().tolist() == [load_vocabulary("bytes").mask]


def test_the_ways_are_timed_by_what_they_are(text_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The dense part, one expert as wide, and the slices: two of them are the same function, and the third is ours."""
    host = open_host(text_folder())
    parts = host.parts()
    layers = slice_parts(parts, Cut("random", 4, 1, "centroid"))
    seen: list[dict[str, torch.Tensor]] = []

    def time_in_turn(functions: dict[str, Any], repeat: int, device: torch.device) -> dict[str, Timing]:
        seen.append({name: function() for name, function in functions.items()})
        return {name: Timing(milliseconds, 0, 0, None) for name, milliseconds in clock.items()}

    clock = {"dense": 3.0, "dense_tiled": 2.0, "sliced": 0.5}
    monkeypatch.setattr("mole_asr.convert.speed.time_in_turn", time_in_turn)
    rows = {name: torch.randn(50, 16) for name in parts}
    speed = measure_speed(parts, layers, rows, num_rows=50)
    assert (speed.dense, speed.dense_tiled, speed.sliced, speed.speed_up) == (6.0, 4.0, 1.0, 4.0)
    for (name, layer), ways in zip(layers.items(), seen, strict=True):
        torch.testing.assert_close(ways["dense"], parts[name].run(rows[name]))
        torch.testing.assert_close(ways["dense_tiled"], ways["dense"])
        torch.testing.assert_close(ways["sliced"], layer(rows[name][None], torch.tensor([50]))[0][0])
        assert (ways["sliced"] - ways["dense"]).abs().max() > 1e-4


def test_batches_of_speech_do_not_begin_with_the_short_ones(speech: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mole_asr.convert.speech_host._BATCH", 1)
    host = open_host(speech / "model")
    sizes = [
        [int(batch.audio_lengths_B[0]) for batch in host.read(str(speech / "cuts.jsonl"), 10**6, seed)]
        for seed in (0, 0, 1)
    ]
    assert sizes[0] == sizes[1] != sizes[2] and sorted(sizes[0]) == sorted(sizes[2])
    assert all(each != sorted(each) for each in sizes)


def test_rows_are_drawn_from_all_that_come() -> None:
    drawn, rows_ND = [DrawnRows(100), DrawnRows(100)], torch.arange(1000.0)[:, None]
    for each in drawn:
        for batch_ND in rows_ND.split(70):
            each.add(batch_ND)
    found = drawn[0].taken()[:, 0].tolist()
    assert torch.equal(drawn[0].taken(), drawn[1].taken())  # of all parts the same
    assert len(set(found)) == 100 and found == sorted(found)
    assert all(10 < sum(low <= place < low + 250 for place in found) < 40 for low in range(0, 1000, 250))
    assert torch.equal(draw_rows(rows_ND[:90], 100), rows_ND[:90])


def test_so_many_rows_of_each_part_are_recorded(texts: Path, text_folder: Callable[..., Path]) -> None:
    host = open_host(text_folder())
    batches = host.read(str(texts), 300, seed=0)
    every = host.record(batches)
    for name, x_ND in host.record(batches, 50).items():
        assert len(x_ND) == 50 and all((every[name] == row_D).all(-1).any() for row_D in x_ND)


def test_what_a_part_computes_besides_is_noticed(huggingface_folder: Callable[..., Path]) -> None:
    host = open_host(huggingface_folder("bitnet"))  # a norm between the products
    with pytest.raises(MoleError, match=r"layers\.0\.mlp: computes more than two products and an activation"):
        slice_all(host, Cut("contiguous", 4, 2, "centroid"))
    slice_all(open_host(huggingface_folder("llama", torch.bfloat16)), Cut("contiguous", 4, 2, "centroid"))


def test_old_weights_in_the_output_folder_go(huggingface_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = huggingface_folder("llama")
    host, out = open_host(folder), tmp_path / "out"
    host.save(out)
    (out / "model-00001-of-00002.safetensors").touch()
    (out / "notes.safetensors").touch()
    slice_all(host, Cut("contiguous", 4, 2, "centroid"))
    host.save(out)  # sliced over dense
    assert not [*out.glob("model*")] and (out / "notes.safetensors").exists()  # which nobody reads as weights
    assert open_host(out).layers()
    with pytest.raises(OSError):
        type(host.model).from_pretrained(out)
    host.save(tmp_path / "sliced")
    dense(str(tmp_path / "sliced"), str(out))  # dense over sliced
    assert not [*out.glob("sliced.*")] and open_host(out).parts()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_a_save_that_fails_leaves_what_was_there(
    huggingface_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = open_host(huggingface_folder("llama"))
    host.save(tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def full(folder: Path, **_: Any) -> None:
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(host.model, "save_pretrained", full)
    with pytest.raises(OSError, match="no space left"):
        host.save(tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_a_head_that_names_no_tokens_is_refused(huggingface_folder: Callable[..., Path], texts: Path) -> None:
    host = open_host(huggingface_folder("electra"))
    batches = host.read(str(texts), 100, seed=0)
    with pytest.raises(MoleError, match="ElectraForPreTraining: its head names no tokens"):
        host.quality(batches)


def test_too_few_rows_are_not_blamed_on_the_file(huggingface_folder: Callable[..., Path], texts: Path) -> None:
    with pytest.raises(MoleError, match="--rows 30: fewer than a window of 48 tokens"):
        open_host(huggingface_folder("llama")).read(str(texts), 30, seed=0)


def test_a_part_without_a_known_activation_is_named() -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama4.modeling_llama4 import Llama4TextMLP

    from mole_asr.convert.huggingface_host import find_slots

    config = transformers.Llama4TextConfig(hidden_size=8, intermediate_size=16)
    with pytest.raises(MoleError, match="0: slices know no activation like None"):
        find_slots(torch.nn.Sequential(Llama4TextMLP(config)))


def test_folders_that_cannot_be_converted_are_named(tmp_path: Path, huggingface_folder: Callable[[str], Path]) -> None:
    with pytest.raises(MoleError, match=r"config\.json: cannot be read"):
        open_host(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(MoleError, match="neither a model of ours nor"):
        open_host(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "architectures": ["Nothing"]}')
    with pytest.raises(MoleError, match="names no model of transformers"):
        open_host(tmp_path)
    folder = huggingface_folder("bert")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"hidden_act": "gelu_new"}))
    with pytest.raises(MoleError, match="slices know no activation"):
        open_host(folder)
    (folder / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(MoleError, match="cannot read it"):
        open_host(folder)


def test_damaged_slices_are_named(tmp_path: Path, huggingface_folder: Callable[[str], Path]) -> None:
    host = open_host(huggingface_folder("llama"))
    slice_all(host, Cut("contiguous", 4, 2, "centroid"))
    host.save(tmp_path / "sliced")
    described = json.loads((tmp_path / "sliced/sliced.json").read_text())
    described["sliced"]["model.layers.0.mlp"]["slices"] = 5
    (tmp_path / "sliced/sliced.json").write_text(json.dumps(described))
    with pytest.raises(MoleError, match=r"does not fit sliced\.json"):
        open_host(tmp_path / "sliced")
    (tmp_path / "sliced/sliced.json").write_text("{")
    with pytest.raises(MoleError, match=r"sliced\.json: not JSON"):
        open_host(tmp_path / "sliced")
    (tmp_path / "sliced/sliced.safetensors").unlink()
    described["sliced"]["model.layers.0.mlp"]["slices"] = 4
    (tmp_path / "sliced/sliced.json").write_text(json.dumps(described))
    with pytest.raises(MoleError, match=r"sliced\.safetensors: cannot be read"):
        open_host(tmp_path / "sliced")
    values = json.loads((tmp_path / "sliced/config.json").read_text())
    (tmp_path / "sliced/config.json").write_text(json.dumps(values | {"hidden_size": "wide"}))
    with pytest.raises(MoleError, match=r"sliced: transformers cannot read it"):
        open_host(tmp_path / "sliced")


def test_a_missing_transformers_is_named(
    huggingface_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = huggingface_folder("bert")
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(MoleError, match=r"pip install 'mole-asr\[huggingface\]'"):
        open_host(folder)


def test_what_is_heard_again_counts_once(
    pretrained_folder: Callable[[str], Path], speech: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Upper blocks compute anew the utterances whose language the text decoder changes."""
    host = open_host(pretrained_folder("whisper"))
    batches = host.read(str(speech / "cuts.jsonl"), 1000, 0)
    again: list[int] = []

    def opinion(memory_BTD: torch.Tensor, lengths_B: torch.Tensor, languages: list[str]) -> torch.Tensor:
        opinion_BN = torch.zeros(len(lengths_B), 2)
        opinion_BN[1:, 0] = 1e3  # all but the first
        return opinion_BN

    def hear_again(x_BTD: torch.Tensor, *rest: Any) -> Any:
        found = heard(x_BTD, *rest)
        again.append(len(x_BTD))
        return found

    heard = host.model._hear_again
    monkeypatch.setattr(host.model.attention_head, "language_opinion", opinion)
    monkeypatch.setattr(host.model, "_hear_again", hear_again)
    rows = host.record(batches)
    assert again, "the second hearing was not reached"
    monkeypatch.setattr(host.model, "config", replace(host.model.config, second_hearing=0.0))
    for name, once_ND in host.record(batches).items():
        assert torch.equal(rows[name], once_ND)
    monkeypatch.setattr(host.model, "config", replace(host.model.config, second_hearing=0.5))
    layers = slice_parts(host.parts(), Cut("random", 4, 2, "centroid"), rows)
    for name, layer in layers.items():
        host.put(name, layer)
    with _routed(layers) as routed, torch.no_grad():
        found = host.predict(batches[0])
    for name, (x_ND, _) in routed.items():
        assert len(x_ND) == len(found.valid_of(name))
