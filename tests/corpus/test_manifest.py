import json
import multiprocessing
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from mole_asr.corpus.manifest import Manifest, Utterance, write_manifest
from mole_asr.errors import MoleError


def utterance(index: int, **changes: Any) -> Utterance:
    values: dict[str, Any] = {
        "id": f"u{index}",
        "audio_path": Path("/audio") / f"{index}.wav",
        "start_s": 0.25,
        "duration_s": 1.5 + index,
        "sampling_rate_hz": 8000,
        "text": f"text à {index}",
        "language": ["it", "en"][index % 2],
        "speaker": "Ada",
        "num_samples": 80000,
    }
    return Utterance(**(values | changes))


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    path = tmp_path / "a.wav"
    samples = np.random.default_rng(0).integers(-9000, 9000, 16000).astype(np.int16)
    soundfile.write(path, samples, 8000)
    return path


def test_round_trip(tmp_path: Path) -> None:
    rows = [utterance(i) for i in range(5)] + [utterance(5, language="", speaker=None, text="", channels=2)]
    assert write_manifest(rows, tmp_path / "cuts.jsonl") == 6
    manifest = Manifest(tmp_path / "cuts.jsonl")
    assert list(manifest) == rows
    assert manifest[-1] == manifest[np.int64(5)] == rows[5]
    np.testing.assert_array_equal(manifest.durations_s, np.array([1.5, 2.5, 3.5, 4.5, 5.5, 6.5], dtype=np.float32))
    assert manifest.languages == ["en", "it"]
    assert manifest.language_ids.tolist() == [1, 0, 1, 0, 1, -1]
    assert manifest.text_lengths.tolist() == [8, 8, 8, 8, 8, 0]
    assert (manifest.durations_s.dtype, manifest.language_ids.dtype, manifest.text_lengths.dtype) == (
        np.float32,
        np.int16,
        np.int32,
    )
    with pytest.raises(IndexError):
        manifest[6]


def test_pickled_and_forked_copies_read_the_same_rows(tmp_path: Path) -> None:
    write_manifest([utterance(i) for i in range(50)], tmp_path / "cuts.jsonl")
    manifest = Manifest(tmp_path / "cuts.jsonl")
    first = manifest[0]
    assert pickle.loads(pickle.dumps(manifest))[0] == first
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(manifest.__getitem__, range(50)) == [manifest[i] for i in range(50)]


def test_what_replaces_a_manifest_does_not_change_its_rows(tmp_path: Path) -> None:
    write_manifest([utterance(0), utterance(1)], tmp_path / "cuts.jsonl")
    manifest = Manifest(tmp_path / "cuts.jsonl")
    sent = pickle.dumps(manifest)
    write_manifest([utterance(1), utterance(0)], tmp_path / "cuts.jsonl")
    assert [row.id for row in manifest] == ["u0", "u1"]
    with pytest.raises(MoleError, match=r"cuts\.jsonl: the manifest has changed"):
        pickle.loads(sent)


def test_blank_lines_do_not_shift_rows(tmp_path: Path) -> None:
    write_manifest([utterance(0), utterance(1)], tmp_path / "cuts.jsonl")
    lines = (tmp_path / "cuts.jsonl").read_text().splitlines()
    (tmp_path / "cuts.jsonl").write_text("\n \n" + lines[0] + "\n\n" + lines[1])
    manifest = Manifest(tmp_path / "cuts.jsonl")
    assert [manifest[0].id, manifest[1].id] == ["u0", "u1"]


def test_an_empty_manifest_is_read(tmp_path: Path) -> None:
    write_manifest([], tmp_path / "cuts.jsonl")
    assert len(Manifest(tmp_path / "cuts.jsonl")) == 0


def test_relative_audio_path_is_taken_from_the_manifest(tmp_path: Path) -> None:
    cut = {
        "id": "a",
        "duration": 1,
        "recording": {"sources": [{"type": "file", "source": "sub/a.wav"}], "sampling_rate": 16000},
    }
    (tmp_path / "cuts.jsonl").write_text(json.dumps(cut))
    row = Manifest(tmp_path / "cuts.jsonl")[0]
    assert row == Utterance("a", tmp_path / "sub" / "a.wav", 0.0, 1.0, 16000, "", "")


def test_lhotse_reads_what_we_write(tmp_path: Path, recording: Path) -> None:
    lhotse = pytest.importorskip("lhotse")
    row = utterance(0, audio_path=recording, duration_s=1.0, num_samples=16000)
    write_manifest([row], tmp_path / "cuts.jsonl")
    cuts = lhotse.CutSet.from_file(tmp_path / "cuts.jsonl")
    lhotse.validate(cuts)
    cut = next(iter(cuts))
    assert (cut.supervisions[0].text, cut.supervisions[0].language, cut.supervisions[0].speaker) == (
        row.text,
        "it",
        "Ada",
    )
    expected_S, _ = soundfile.read(recording, start=2000, frames=8000, dtype="float32")
    np.testing.assert_allclose(cut.load_audio()[0], expected_S, atol=1e-6)


def test_lhotse_reads_all_channels_of_ours(tmp_path: Path) -> None:
    lhotse = pytest.importorskip("lhotse")
    soundfile.write(tmp_path / "b.wav", np.zeros((8000, 2)), 8000)
    row = utterance(0, audio_path=tmp_path / "b.wav", start_s=0.0, duration_s=1.0, num_samples=8000, channels=2)
    write_manifest([row], tmp_path / "cuts.jsonl")
    cuts = lhotse.CutSet.from_file(tmp_path / "cuts.jsonl")
    lhotse.validate(cuts)
    assert next(iter(cuts)).load_audio().shape == (2, 8000)


def test_we_read_what_lhotse_writes(tmp_path: Path, recording: Path) -> None:
    lhotse = pytest.importorskip("lhotse")
    whole = lhotse.Recording.from_file(recording).to_cut()
    whole.supervisions = [
        lhotse.SupervisionSegment("s1", whole.recording_id, start=1.0, duration=1.0, text="b", language="fr"),
        lhotse.SupervisionSegment("s0", whole.recording_id, start=0.0, duration=1.0, text="a", language="fr"),
    ]
    cuts = lhotse.CutSet.from_cuts([whole]).trim_to_supervisions().to_eager()
    cuts.to_file(tmp_path / "trimmed.jsonl")
    manifest = Manifest(tmp_path / "trimmed.jsonl")
    assert {(row.text, row.start_s, row.duration_s) for row in (manifest[0], manifest[1])} == {
        ("b", 1.0, 1.0),
        ("a", 0.0, 1.0),
    }
    lhotse.CutSet.from_cuts([whole]).to_file(tmp_path / "whole.jsonl")
    assert Manifest(tmp_path / "whole.jsonl")[0].text == "a b"
    assert Manifest(tmp_path / "whole.jsonl")[0].audio_path == recording


def test_a_speaker_may_be_a_number(tmp_path: Path) -> None:
    lines = [json.dumps(_cut(id=f"{n}", supervisions=[{"text": "a", "speaker": n}])) for n in (0, 12, None, "")]
    (tmp_path / "cuts.jsonl").write_text("\n".join(lines))
    assert [utterance.speaker for utterance in Manifest(tmp_path / "cuts.jsonl")] == ["0", "12", None, None]


def test_a_text_of_blanks_is_none(tmp_path: Path) -> None:
    texts = [{"text": " "}, {"text": None}, {"text": "a b "}, {"start": 0.5, "text": "\u00a0c"}]
    lines = [json.dumps(_cut(supervisions=texts)), json.dumps(_cut(id="y", supervisions=texts[:2]))]
    (tmp_path / "cuts.jsonl").write_text("\n".join(lines))
    assert [utterance.text for utterance in Manifest(tmp_path / "cuts.jsonl")] == ["a b c", ""]


def _recording(**changes: Any) -> dict[str, Any]:
    return {"sources": [{"type": "file", "channels": [0], "source": "/a.wav"}], "sampling_rate": 16000} | changes


def _cut(**changes: Any) -> dict[str, Any]:
    return {"id": "x", "duration": 1.0, "recording": _recording()} | changes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not json", "row 1 is no lhotse cut"),
        ("[1]", "row 1 is no lhotse cut"),
        (json.dumps(_cut()) + "\n" + json.dumps(_cut()), "'x' stands twice"),
        (json.dumps({"id": "x"}), "lacks 'recording'"),
        (json.dumps(_cut(type="MixedCut")), "MixedCut"),
        (json.dumps(_cut(duration=0)), "its duration is 0.0 s"),
        (json.dumps(_cut(start=float("nan"))), "its start is nan s"),
        (json.dumps(_cut(id=None)), "its id is None, no text"),
        (json.dumps(_cut(recording=_recording(sampling_rate=None))), "its sampling_rate is None, no number"),
        (json.dumps(_cut(recording=_recording(num_samples="many"))), "its num_samples is 'many', no number"),
        (json.dumps(_cut(recording=_recording(sources=[{"type": "file", "source": 1}]))), "its source is 1, no text"),
        (json.dumps(_cut(start=None)), "its start is None, no number"),
        (json.dumps(_cut(duration="2 s")), "its duration is '2 s', no number"),
        (json.dumps(_cut(recording=None)), "its recording is None, no object"),
        (json.dumps(_cut(supervisions=[{"text": "a", "language": ["en"]}])), r"its language is \['en'\], no text"),
        (json.dumps(_cut(supervisions=[{"text": "a", "speaker": [0]}])), r"its speaker is \[0\], no text"),
        (json.dumps(_cut(supervisions=[{"text": "a\ud83d"}])), r"its text is 'a\\ud83d', no text"),
        (json.dumps(_cut(id="\ud83d")), "its id is "),
        ('{"id":' + "[" * 100_000, "row 1 is no lhotse cut"),
        (
            json.dumps(_cut(recording={"sources": [{"type": "file", "source": "x"}], "sampling_rate": 0})),
            "its sampling rate is 0",
        ),
        (
            json.dumps(_cut(recording={"sources": [{"type": "file", "source": "x"}], "sampling_rate": float("inf")})),
            "row 1 is no lhotse cut",
        ),
        (json.dumps(_cut(recording={"sources": [{"type": "url", "source": "x"}]})), "one file"),
        (
            json.dumps(
                _cut(recording={"sources": [{"type": "file", "channels": [0, 1], "source": "x"}], "sampling_rate": 1})
            ),
            "picks one of 2 channels",
        ),
    ],
)
def test_bad_manifest_is_one_clear_line(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "cuts.jsonl").write_text(content)
    with pytest.raises(MoleError, match=message) as caught:
        Manifest(tmp_path / "cuts.jsonl")
    assert "\n" not in str(caught.value)
    assert "cuts.jsonl" in str(caught.value)


def test_missing_and_compressed_manifests_are_named(tmp_path: Path) -> None:
    with pytest.raises(MoleError, match="cannot be read"):
        Manifest(tmp_path / "none.jsonl")
    with pytest.raises(MoleError, match="gunzip"):
        Manifest(tmp_path / "cuts.jsonl.gz")


def test_writing_a_repeated_id_fails_and_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(MoleError, match="u0"):
        write_manifest([utterance(0), utterance(0)], tmp_path / "cuts.jsonl")
    assert not list(tmp_path.iterdir())
