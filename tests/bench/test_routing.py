"""`bench routing` on an untrained model and synthetic noise: the counts are right whatever the model decides."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from mole_asr.asr.checkpoint import save_model
from mole_asr.asr.model import EncoderConfig, MoleModel
from mole_asr.asr.prune import prune
from mole_asr.bench.routing import UNITS, routing
from mole_asr.cli import main
from mole_asr.corpus.manifest import Utterance, write_manifest
from mole_asr.corpus.text_tokenizer import TextTokenizer, train_tokenizer
from mole_asr.errors import MoleError

RATE_HZ = 16000
LANGUAGES = ["de", "en"]
SECONDS = {"de": [0.5, 1.0], "en": [0.7], "xx": [0.4]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in `model`, and four utterances of noise, one of them in a language that the model has not."""
    folder = tmp_path_factory.mktemp("routing")
    rng = np.random.default_rng(0)
    utterances = []
    for language, durations in SECONDS.items():
        for number, seconds in enumerate(durations):
            path = folder / f"{language}{number}.wav"
            samples = round(seconds * RATE_HZ)
            soundfile.write(path, 0.1 * rng.standard_normal(samples).astype(np.float32), RATE_HZ)
            utterance = Utterance(path.stem, path, 0.0, seconds, RATE_HZ, "ab", language, num_samples=samples)
            utterances.append(utterance)
    write_manifest(utterances, folder / "cuts.jsonl")
    train_tokenizer(folder / "cuts.jsonl", folder / "tokenizer", vocab_size=20, byte_fallback=False, model_type="char")
    tokenizer = TextTokenizer(folder / "tokenizer")
    torch.manual_seed(0)
    for name, changes in {"model": {}, "family": {"expert_of": "family"}, "switch": {"mixture": "switch"}}.items():
        config = EncoderConfig(d_model=16, d_ff=24, num_heads=2, kernel_size=3, num_mels=20, **changes)
        save_model(MoleModel(config, LANGUAGES, tokenizer.vocab_size), tokenizer, folder / name)
    return folder


def test_every_frame_of_a_known_language_is_counted_once(folder: Path) -> None:
    found = routing(str(folder / "model"), str(folder / "cuts.jsonl"))
    frames = [sum(-(-(round(s * RATE_HZ) // 160 + 1) // 4) for s in SECONDS[code]) for code in LANGUAGES]
    for unit in UNITS:
        assert found.loads_LE[unit].sum(1).tolist() == frames
        assert 0.5 <= found.reliability[unit] <= 1
    for load_E in found.loads_LE["utterance"][1:]:  # one utterance has one expert
        assert (load_E > 0).sum() == 1
    assert "decided by frame" in str(found) and "purity" in str(found)


def test_the_picture_is_whole_or_not_there(folder: Path, tmp_path: Path) -> None:
    picture = tmp_path / "routing.svg"
    words = ["bench", "routing", str(folder / "model"), str(folder / "cuts.jsonl")]
    assert main([*words, "--output", str(picture)]) == 0
    assert picture.read_text(encoding="utf-8").rstrip().endswith("</svg>")
    with pytest.raises(MoleError, match=r"a\.png: the picture is written as \.svg"):
        routing(str(folder / "model"), str(folder / "cuts.jsonl"), "a.png")


def test_experts_that_languages_share_or_do_not_choose(folder: Path, tmp_path: Path) -> None:
    cuts, picture = str(folder / "cuts.jsonl"), tmp_path / "family.svg"
    found = routing(str(folder / "family"), cuts, str(picture))
    assert found.experts == ["gem"] and all(loads_LE.shape == (2, 1) for loads_LE in found.loads_LE.values())
    assert ">gem<" in picture.read_text(encoding="utf-8")
    with pytest.raises(MoleError, match="no language chooses its experts"):
        routing(str(folder / "switch"), cuts)
    prune(str(folder / "model"), str(tmp_path / "pruned"), languages=["de"])
    with pytest.raises(MoleError, match="was pruned"):
        routing(str(tmp_path / "pruned"), cuts)


def test_a_missing_recording_is_skipped_and_reported(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = Utterance("gone", tmp_path / "gone.wav", 0.0, 1.0, RATE_HZ, "ab", "de", num_samples=RATE_HZ)
    here = Utterance("here", folder / "en0.wav", 0.0, 0.7, RATE_HZ, "ab", "en", num_samples=round(0.7 * RATE_HZ))
    write_manifest([gone, here], tmp_path / "cuts.jsonl")
    found = routing(str(folder / "model"), str(tmp_path / "cuts.jsonl"))
    assert [each.split(":")[0] for each in found.failures] == ["gone"]
    assert "1 skipped:\n  gone: " in capsys.readouterr().err and found.loads_LE["frame"][0].sum() == 0
    write_manifest([gone], tmp_path / "none.jsonl")
    said = r"none\.jsonl: no readable utterance in a language of the model \(de, en\); gone: "
    with pytest.raises(MoleError, match=said):
        routing(str(folder / "model"), str(tmp_path / "none.jsonl"))
