from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
from safetensors import SafetensorError

from mole_asr.errors import MoleError
from mole_asr.files import atomic_path, check_output_folder, write_text


def test_two_threads_may_write_the_same_file(tmp_path: Path) -> None:
    together = Barrier(2)

    def write(text: str) -> None:
        with atomic_path(tmp_path / "a.txt") as temporary:
            temporary.write_text(text)
            together.wait(timeout=10)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, ["one", "two"]))
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() in ("one", "two")


def test_a_name_may_be_as_long_as_names_can_be(tmp_path: Path) -> None:
    name = "あ" * 83 + ".txt"  # 253 bytes
    write_text(tmp_path / name, "x")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_others_may_read_what_a_library_made_private(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    with atomic_path(tmp_path / "a.safetensors") as temporary:
        temporary.touch(mode=0o600)
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_what_fails_leaves_the_old_file(tmp_path: Path) -> None:
    write_text(tmp_path / "deep" / "a.txt", "old")
    with pytest.raises(ZeroDivisionError), atomic_path(tmp_path / "deep" / "a.txt") as temporary:
        temporary.write_text("new")
        raise ZeroDivisionError
    assert [path.read_text() for path in (tmp_path / "deep").iterdir()] == ["old"]


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(MoleError, match=r"/folder\.json: is a folder; give the name of a file"):
        write_text(tmp_path / "folder.json", "")
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for output in (tmp_path / "file", tmp_path / "file" / "a" / "b", tmp_path / "link"):
        with pytest.raises(MoleError, match=r"output .*/(file|link): is a file; give a folder"):
            check_output_folder(output, tmp_path / "model")
    check_output_folder(tmp_path / "new" / "a", tmp_path / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.json", "link"]


def test_a_full_disk_gives_one_line(tmp_path: Path) -> None:
    said = pytest.raises(MoleError, match=r"a\.safetensors: cannot be written \(.*No space left")
    with said, atomic_path(tmp_path / "a.safetensors"):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert not any(tmp_path.iterdir())
