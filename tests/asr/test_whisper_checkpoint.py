"""The three formats of one tiny Whisper; the writers here follow the formats' own descriptions, not our readers."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mole_asr.asr.pretrained import PretrainedConfig, from_checkpoint
from mole_asr.asr.whisper import WhisperConfig, WhisperEncoder
from mole_asr.asr.whisper_checkpoint import WhisperCheckpoint, load_whisper
from mole_asr.asr.whisper_decoder import WhisperDecoder
from mole_asr.errors import MoleError

CONFIG = WhisperConfig(
    num_mels=80,
    d_model=32,
    d_ff=48,
    encoder_layers=2,
    encoder_heads=4,
    decoder_layers=2,
    decoder_heads=2,
    vocab_size=300,
)
HIDDEN = 4 * 32  # what OpenAI's files always have


@pytest.fixture(scope="module")
def features_BTF() -> Tensor:
    return 0.5 * torch.randn(2, 3000, 80, generator=torch.Generator().manual_seed(3))


def check(checkpoint: WhisperCheckpoint, model: Any, features_BTF: Tensor, atol: float = 1e-4) -> None:
    """Compares the activations of both models."""
    encoder, decoder = WhisperEncoder(checkpoint.config).eval(), WhisperDecoder(checkpoint.config).eval()
    encoder.load_state_dict(checkpoint.encoder)
    decoder.load_state_dict(checkpoint.decoder)
    tokens_BU = torch.arange(14).view(2, 7)
    with torch.inference_mode():
        memory_BTD, lengths_B = encoder(features_BTF, torch.tensor([3000, 3000]))
        logits_BUV = decoder(tokens_BU, memory_BTD, lengths_B)
        expected = model(input_features=features_BTF.transpose(1, 2), decoder_input_ids=tokens_BU)
    torch.testing.assert_close(memory_BTD, expected.encoder_last_hidden_state, atol=atol, rtol=0)
    torch.testing.assert_close(logits_BUV, expected.logits, atol=atol, rtol=0)


@pytest.mark.parametrize("max_shard_size", ["1GB", "100KB"])
def test_hugging_face_folder(
    whisper_model: Any, whisper_folder: Path, features_BTF: Tensor, max_shard_size: str, tmp_path: Path
) -> None:
    whisper_model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    shutil.copy(whisper_folder / "tokenizer.json", tmp_path)
    assert (tmp_path / "model.safetensors").exists() == (max_shard_size == "1GB")
    checkpoint = load_whisper(tmp_path)
    assert checkpoint.config == CONFIG
    assert set(checkpoint.tokenizer.language_ids) == {"en", "de", "fr", "haw"}
    check(checkpoint, whisper_model, features_BTF)


def test_hugging_face_pickle_in_half_precision(
    whisper_model: Any, whisper_folder: Path, features_BTF: Tensor, tmp_path: Path
) -> None:
    state = {name: value.half() for name, value in whisper_model.state_dict().items()}
    torch.save(state, tmp_path / "pytorch_model.bin")
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(whisper_folder / name, tmp_path)
    check(load_whisper(tmp_path), whisper_model, features_BTF, atol=0.02)


def openai_state(model: Any) -> dict[str, Tensor]:
    """Names of the modules of github.com/openai/whisper, model.py."""
    names = {
        "self_attn_layer_norm": "attn_ln",
        "encoder_attn_layer_norm": "cross_attn_ln",
        "final_layer_norm": "mlp_ln",
        "self_attn": "attn",
        "encoder_attn": "cross_attn",
        "q_proj": "query",
        "k_proj": "key",
        "v_proj": "value",
        "out_proj": "out",
        "fc1": "mlp.0",
        "fc2": "mlp.2",
        "layers": "blocks",
        "embed_tokens": "token_embedding",
    }
    state = {}
    for name, value in model.model.state_dict().items():
        if name.endswith("embed_positions.weight"):
            name = name.replace("embed_positions.weight", "positional_embedding")
        name = name.replace("encoder.layer_norm", "encoder.ln_post").replace("decoder.layer_norm", "decoder.ln")
        state[".".join(names.get(word, word) for word in name.split("."))] = value
    return state


def test_openai_file(whisper_folder: Path, features_BTF: Tensor, tmp_path: Path) -> None:
    from transformers import WhisperForConditionalGeneration

    torch.manual_seed(1)
    # OpenAI's files do not tell the width of the feed-forward part.
    model = WhisperForConditionalGeneration.from_pretrained(
        whisper_folder, encoder_ffn_dim=HIDDEN, decoder_ffn_dim=HIDDEN, ignore_mismatched_sizes=True
    ).eval()
    dims = {
        "n_mels": 80,
        "n_vocab": 300,
        "n_audio_ctx": 1500,
        "n_audio_state": 32,
        "n_audio_head": 4,
        "n_audio_layer": 2,
        "n_text_ctx": 448,
        "n_text_state": 32,
        "n_text_head": 2,
        "n_text_layer": 2,
    }
    torch.save({"dims": dims, "model_state_dict": openai_state(model)}, tmp_path / "tiny.pt")
    with pytest.raises(MoleError, match=r"tokenizer\.json: no such file"):
        load_whisper(tmp_path / "tiny.pt")
    shutil.copy(whisper_folder / "tokenizer.json", tmp_path)
    check(load_whisper(tmp_path / "tiny.pt"), model, features_BTF)


def ctranslate2_tensors(model: Any) -> dict[str, np.ndarray]:
    """Fuses and names as CTranslate2's converter does (specs/whisper_spec.py, converters/transformers.py)."""
    state = {name: value.numpy() for name, value in model.model.state_dict().items()}
    tensors: dict[str, np.ndarray] = {}

    def linear(theirs: str, *ours: str) -> None:
        tensors[f"{theirs}/weight"] = np.concatenate([state[f"{name}.weight"] for name in ours])
        zero = np.zeros(32, np.float32)
        tensors[f"{theirs}/bias"] = np.concatenate([state.get(f"{name}.bias", zero) for name in ours])

    def norm(theirs: str, ours: str) -> None:
        tensors[f"{theirs}/gamma"], tensors[f"{theirs}/beta"] = state[f"{ours}.weight"], state[f"{ours}.bias"]

    for side, heads in (("encoder", 4), ("decoder", 2)):
        tensors[f"{side}/num_heads"] = np.array(heads, np.int16)
        tensors[f"{side}/position_encodings/encodings"] = state[f"{side}.embed_positions.weight"]
        norm(f"{side}/layer_norm", f"{side}.layer_norm")
        for layer in range(2):
            ours, theirs = f"{side}.layers.{layer}", f"{side}/layer_{layer}"
            norm(f"{theirs}/self_attention/layer_norm", f"{ours}.self_attn_layer_norm")
            linear(f"{theirs}/self_attention/linear_0", *(f"{ours}.self_attn.{x}_proj" for x in "qkv"))
            linear(f"{theirs}/self_attention/linear_1", f"{ours}.self_attn.out_proj")
            norm(f"{theirs}/ffn/layer_norm", f"{ours}.final_layer_norm")
            linear(f"{theirs}/ffn/linear_0", f"{ours}.fc1")
            linear(f"{theirs}/ffn/linear_1", f"{ours}.fc2")
            if side == "decoder":
                norm(f"{theirs}/attention/layer_norm", f"{ours}.encoder_attn_layer_norm")
                linear(f"{theirs}/attention/linear_0", f"{ours}.encoder_attn.q_proj")
                linear(f"{theirs}/attention/linear_1", *(f"{ours}.encoder_attn.{x}_proj" for x in "kv"))
                linear(f"{theirs}/attention/linear_2", f"{ours}.encoder_attn.out_proj")
    for name in ("conv1", "conv2"):
        linear(f"encoder/{name}", f"encoder.{name}")
    tensors["decoder/embeddings/weight"] = state["decoder.embed_tokens.weight"]
    return tensors


def quantise(tensors: dict[str, np.ndarray], kind: str) -> dict[str, np.ndarray]:
    """As `_quantize` of CTranslate2's specs/model_spec.py; a bfloat16 array is given as uint16."""
    result = {}
    for name, value in tensors.items():
        if value.dtype != np.float32 or kind == "float32":
            result[name] = value
        elif kind == "float16":
            result[name] = value.astype(np.float16)
        elif kind == "bfloat16":
            result[name] = torch.from_numpy(value).bfloat16().view(torch.uint16).numpy()
        elif not name.endswith("/weight"):
            result[name] = value
        elif kind == "int16":
            result[f"{name}_scale"] = np.float32(1024 / np.abs(value).max())
            result[name] = np.rint(value * result[f"{name}_scale"]).astype(np.int16)
        else:
            rows = value.reshape(len(value), -1)
            scale = 127 / np.abs(rows).max(1)
            result[name], result[f"{name}_scale"] = (
                np.rint(rows * scale[:, None]).reshape(value.shape).astype("i1"),
                scale,
            )
    return result


def write_ctranslate2(path: Path, tensors: dict[str, np.ndarray], version: int = 6, kind: str = "WhisperSpec") -> None:
    """As `_serialize` of CTranslate2's specs/model_spec.py."""
    types = ["float32", "int8", "int16", "int32", "float16", "uint16"]

    def string(text: str) -> bytes:
        return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"

    with path.open("wb") as file:
        file.write(struct.pack("<I", version) + string(kind) + struct.pack("<II", 3, len(tensors)))
        for name, value in sorted(tensors.items()):
            value = np.asarray(value)
            file.write(string(name) + struct.pack(f"<B{value.ndim}I", value.ndim, *value.shape))
            file.write(struct.pack("<BI", types.index(str(value.dtype)), value.nbytes) + value.tobytes())
        file.write(struct.pack("<I", 1) + string("decoder/projection/weight") + string("decoder/embeddings/weight"))


@pytest.fixture
def ctranslate2_folder(whisper_model: Any, whisper_folder: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "ct2"
    folder.mkdir()
    shutil.copy(whisper_folder / "tokenizer.json", folder)
    write_ctranslate2(folder / "model.bin", ctranslate2_tensors(whisper_model))
    return folder


# Weights are up to about 0.5; the tolerance is what rounding them by 5e-4, 4e-3 (twice) and 2e-3 does to activations.
@pytest.mark.parametrize(
    ("kind", "atol"), [("float32", 1e-4), ("float16", 0.02), ("bfloat16", 0.15), ("int16", 0.05), ("int8", 0.3)]
)
def test_ctranslate2_folder(
    whisper_model: Any, ctranslate2_folder: Path, features_BTF: Tensor, kind: str, atol: float
) -> None:
    write_ctranslate2(ctranslate2_folder / "model.bin", quantise(ctranslate2_tensors(whisper_model), kind))
    checkpoint = load_whisper(ctranslate2_folder)
    assert checkpoint.config == CONFIG
    assert all(value.dtype == torch.float32 for value in [*checkpoint.encoder.values(), *checkpoint.decoder.values()])
    check(checkpoint, whisper_model, features_BTF, atol)


def test_int8_rows_come_back_exactly(whisper_model: Any, ctranslate2_folder: Path) -> None:
    tensors = quantise(ctranslate2_tensors(whisper_model), "int8")
    write_ctranslate2(ctranslate2_folder / "model.bin", tensors)
    name = "encoder/layer_1/ffn/linear_0/weight"
    expected = tensors[name] / tensors[f"{name}_scale"][:, None]
    found = load_whisper(ctranslate2_folder).encoder["blocks.1.feed_forward.w1.weight"]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)


def cut(folder: Path) -> None:
    path = folder / "model.bin"
    path.write_bytes(path.read_bytes()[:-200])


def garbage(folder: Path) -> None:
    (folder / "model.bin").write_bytes(struct.pack("<I", 6) + b"\xff" * 100)


def old(folder: Path) -> None:
    write_ctranslate2(folder / "model.bin", {}, version=5)


def translator(folder: Path) -> None:
    write_ctranslate2(
        folder / "model.bin", {"decoder/embeddings/weight": np.zeros(3, np.float32)}, kind="TransformerSpec"
    )


def empty(folder: Path) -> None:
    (folder / "model.bin").write_bytes(b"")


def hollow(folder: Path) -> None:
    write_ctranslate2(folder / "model.bin", {"decoder/embeddings/weight": np.zeros((3, 2), np.float32)})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (cut, "not a whole CTranslate2 model"),
        (garbage, "not a whole CTranslate2 model"),
        (empty, "not a whole CTranslate2 model"),
        (old, "version 5 is not 6"),
        (translator, "a TransformerSpec, not a WhisperSpec"),
        (hollow, "not a whole Whisper model"),
    ],
)
def test_bad_ctranslate2_files(ctranslate2_folder: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(ctranslate2_folder)
    with pytest.raises(MoleError, match=rf"model\.bin: .*{message}") as caught:
        load_whisper(ctranslate2_folder)
    assert "\n" not in str(caught.value)


def test_a_missing_tensor_is_named(whisper_model: Any, ctranslate2_folder: Path) -> None:
    tensors = ctranslate2_tensors(whisper_model)
    del tensors["decoder/layer_1/attention/linear_2/weight"]
    write_ctranslate2(ctranslate2_folder / "model.bin", tensors)
    with pytest.raises(MoleError, match=r"tensor decoder\.layer_1\.attention\.linear_2\.weight is missing"):
        load_whisper(ctranslate2_folder)


def write_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "wav2vec2"}, r"config\.json: model_type 'wav2vec2'"),
        ({"activation_function": "relu"}, r"config\.json: only GELU"),
        ({"scale_embedding": True}, r"config\.json: only GELU"),
        ({"vocab_size": 301}, r"decoder embedding\.weight is \(300, 32\), not \(301, 32\)"),
        ({"encoder_layers": 3}, r"tensor encoder\.layers\.2\..* is missing"),
    ],
)
def test_bad_hugging_face_configs(whisper_folder: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(whisper_folder, folder)
    write_config(folder, **changes)
    with pytest.raises(MoleError, match=message):
        load_whisper(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("how", ["missing", "broken"])
def test_missing_and_broken_files_are_named(whisper_folder: Path, tmp_path: Path, name: str, how: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(whisper_folder, folder)
    if how == "missing":
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(b"{")
    with pytest.raises(MoleError, match=name.replace(".", r"\.")) as caught:
        load_whisper(folder)
    assert "\n" not in str(caught.value)


def test_a_pickle_does_not_run_code(whisper_folder: Path, tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "run",))

    shutil.copy(whisper_folder / "tokenizer.json", tmp_path)
    torch.save({"dims": Harmful()}, tmp_path / "bad.pt")
    with pytest.raises(MoleError, match=r"bad\.pt: cannot be read as weights"):
        load_whisper(tmp_path / "bad.pt")
    assert not (tmp_path / "run").exists()


def test_what_is_neither_a_path_nor_a_hub_id(tmp_path: Path) -> None:
    with pytest.raises(MoleError, match="no such model"):
        load_whisper(tmp_path / "nothing")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], list[str]]:
    """Puts a folder in the hub's place; returns the list of files asked for."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    def serve(folder: Path) -> list[str]:
        asked: list[str] = []

        def download(repo_id: str, filename: str) -> str:
            assert repo_id == "owner/tiny"
            asked.append(filename)
            if not (folder / filename).exists():
                raise EntryNotFoundError(filename)
            return str(folder / filename)

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
        return asked

    return serve


def test_a_model_of_the_hub(
    hub: Callable[[Path], list[str]], whisper_model: Any, whisper_folder: Path, features_BTF: Tensor, tmp_path: Path
) -> None:
    asked = hub(whisper_folder)
    check(load_whisper("owner/tiny"), whisper_model, features_BTF)
    assert asked == ["config.json", "tokenizer.json", "model.safetensors"]
    whisper_model.save_pretrained(tmp_path, max_shard_size="100KB")
    shutil.copy(whisper_folder / "tokenizer.json", tmp_path)
    asked = hub(tmp_path)
    check(load_whisper("owner/tiny"), whisper_model, features_BTF)
    shards = {path.name for path in tmp_path.glob("model-*.safetensors")}
    assert len(shards) > 1 and shards <= set(asked)


def test_a_ctranslate2_model_of_the_hub(hub: Callable[[Path], list[str]], ctranslate2_folder: Path) -> None:
    (ctranslate2_folder / "config.json").write_text('{"alignment_heads": [[0, 1]], "suppress_ids": []}')
    hub(ctranslate2_folder)
    config = PretrainedConfig(checkpoint="owner/tiny", num_mole_blocks=1, language_tokenizer_block=1)
    model = from_checkpoint(config, ["de", "en"], 10)
    wanted = load_whisper(ctranslate2_folder).encoder["blocks.0.attention.output.weight"]
    assert model.attention_head is not None
    assert torch.equal(model.state_dict()["encoder.blocks.0.attention.output.weight"], wanted)


def test_a_hub_that_does_not_answer(hub: Callable[[Path], list[str]], whisper_folder: Path, tmp_path: Path) -> None:
    hub(tmp_path)
    with pytest.raises(MoleError, match="owner/tiny: no such folder, and the hub does not give it"):
        load_whisper("owner/tiny")
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(whisper_folder / name, tmp_path)
    with pytest.raises(MoleError, match="owner/tiny: the hub has no weights for it"):
        load_whisper("owner/tiny")
