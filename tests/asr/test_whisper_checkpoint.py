"""The three formats of one tiny Whisper: transformers and CTranslate2 write and run theirs; OpenAI's is made here."""

import json
import shutil
import struct
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import ctranslate2
import numpy as np
import pytest
import torch
from ctranslate2.converters.transformers import WhisperLoader
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


def build(checkpoint: WhisperCheckpoint) -> tuple[WhisperEncoder, WhisperDecoder]:
    """Our modules with what was read."""
    encoder, decoder = WhisperEncoder(checkpoint.config).eval(), WhisperDecoder(checkpoint.config).eval()
    encoder.load_state_dict(checkpoint.encoder)
    decoder.load_state_dict(checkpoint.decoder)
    return encoder, decoder


def check(checkpoint: WhisperCheckpoint, model: Any, features_BTF: Tensor, atol: float = 1e-4) -> None:
    """Compares the activations of both models."""
    encoder, decoder = build(checkpoint)
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_model": "x"}, r"config\.json: d_model is 'x', no size"),
        ({"max_source_positions": -1}, r"config\.json: max_source_positions is -1, no size"),
        ({"encoder_attention_heads": None}, r"config\.json: encoder_attention_heads is None, no size"),
        ({"decoder_attention_heads": 5}, "5 heads of the decoder do not part its width, 32"),
        ({"d_model": 36}, "is .*, not .* as its sizes say"),
    ],
)
def test_wrong_sizes_are_named(whisper_folder: Path, tmp_path: Path, changes: dict[str, object], message: str) -> None:
    for path in whisper_folder.iterdir():
        shutil.copy(path, tmp_path)
    sizes = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(sizes | changes))
    with pytest.raises(MoleError, match=message):
        load_whisper(tmp_path)


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
    torch.save({"dims": dims | {"n_audio_state": "x"}, "model_state_dict": {}}, tmp_path / "tiny.pt")
    with pytest.raises(MoleError, match=r"tiny\.pt: n_audio_state is 'x', no size"):
        load_whisper(tmp_path / "tiny.pt")


def convert_with_ctranslate2(model: Any, folder: Path, kind: str, output: Path) -> Path:
    """Writes a folder as CTranslate2's own converter does."""
    known = json.loads((folder / "tokenizer.json").read_text())
    names = {number: name for name, number in known["model"]["vocab"].items()}
    names |= {token["id"]: token["content"] for token in known["added_tokens"]}
    loader = WhisperLoader()
    spec = loader.get_model_spec(deepcopy(model))  # whose weights it rounds in place
    spec.register_vocabulary([names.get(number, f"<|{number}|>") for number in range(model.config.vocab_size)])
    loader.set_config(spec.config, model, tokenizer=None)
    spec.validate()
    spec.optimize(quantization=kind)
    output.mkdir()
    spec.save(str(output))
    shutil.copy(folder / "tokenizer.json", output)
    return output


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16", "int16", "int8"])
def test_a_file_that_ctranslate2_wrote(
    whisper_model: Any, whisper_folder: Path, features_BTF: Tensor, kind: str, tmp_path: Path
) -> None:
    folder = convert_with_ctranslate2(whisper_model, whisper_folder, kind, tmp_path / "ct2")
    theirs = ctranslate2.models.Whisper(str(folder), compute_type="float32")
    features = ctranslate2.StorageView.from_array(features_BTF[:1].transpose(1, 2).contiguous().numpy())
    prompt = [263, 264, 269, 271]  # the start, English, transcribe, no times
    free: dict[str, Any] = {"suppress_blank": False, "suppress_tokens": []}
    (heard,) = theirs.generate(features, [prompt], max_length=8, beam_size=1, return_logits_vocab=True, **free)
    logits_UV = torch.tensor(np.stack([np.array(each) for each in heard.logits[0]]))
    checkpoint = load_whisper(folder)
    assert checkpoint.config == CONFIG
    assert all(value.dtype == torch.float32 for value in [*checkpoint.encoder.values(), *checkpoint.decoder.values()])
    encoder, decoder = build(checkpoint)
    tokens_1U = torch.tensor([[*prompt, *heard.sequences_ids[0]]])[:, : len(prompt) + len(logits_UV) - 1]
    with torch.inference_mode():
        memory_1TD, lengths_1 = encoder(features_BTF[:1], torch.tensor([3000]))
        ours_UV = decoder(tokens_1U, memory_1TD, lengths_1)[0, len(prompt) - 1 :]
    # Both compute in float32 with the weights of the file, rounded as they are. Logits go up to 40.
    torch.testing.assert_close(memory_1TD, torch.from_numpy(np.array(theirs.encode(features))), atol=1e-3, rtol=0)
    torch.testing.assert_close(ours_UV, logits_UV, atol=1e-3, rtol=1e-4)


@pytest.fixture
def ctranslate2_folder(whisper_model: Any, whisper_folder: Path, tmp_path: Path) -> Path:
    return convert_with_ctranslate2(whisper_model, whisper_folder, "float32", tmp_path / "ct2")


def cut(whole: bytes) -> bytes:
    return whole[:-200]


def garbage(whole: bytes) -> bytes:
    return whole[:4] + b"\xff" * 100


def empty(whole: bytes) -> bytes:
    return b""


def old(whole: bytes) -> bytes:
    return struct.pack("<I", 5) + whole[4:]


def translator(whole: bytes) -> bytes:
    names = [struct.pack("<H", len(name) + 1) + name + b"\0" for name in (b"WhisperSpec", b"TransformerSpec")]
    assert names[0] in whole
    return whole.replace(*names)


def hollow(whole: bytes) -> bytes:
    return whole.replace(b"encoder/", b"nothing/")


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
def test_bad_ctranslate2_files(ctranslate2_folder: Path, spoil: Callable[[bytes], bytes], message: str) -> None:
    path = ctranslate2_folder / "model.bin"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(MoleError, match=rf"model\.bin: .*{message}") as caught:
        load_whisper(ctranslate2_folder)
    assert "\n" not in str(caught.value)


def test_a_missing_tensor_is_named(ctranslate2_folder: Path) -> None:
    path = ctranslate2_folder / "model.bin"
    path.write_bytes(
        path.read_bytes().replace(b"layer_1/attention/linear_2/weight", b"layer_1/attention/linear_2/nobody")
    )
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
