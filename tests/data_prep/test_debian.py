import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from mole_asr.data_prep import debian
from mole_asr.errors import MoleError

OTHER_SUM = "0" * 64


Package = Callable[[Mapping[str, bytes]], bytes]


@pytest.fixture
def fake_apt(deb: Package, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """An apt-get that knows no package before `update`; returns its calls."""
    calls: list[list[str]] = []

    def run(command: list[str], cwd: str, **_: object) -> subprocess.CompletedProcess[str]:
        calls.append(command[2:])
        if command[2] == "download":
            if not any(call[0] == "update" for call in calls):
                return subprocess.CompletedProcess(command, 100, "", "noise\nE: Unable to locate package\n")
            Path(cwd, f"{command[3]}_1_all.deb").write_bytes(deb({"a": command[3].encode()}))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(debian.subprocess, "run", run)
    monkeypatch.setattr(debian.shutil, "which", lambda _: "/usr/bin/apt-get")
    return calls


def test_members_are_the_regular_files(deb: Package, tmp_path: Path) -> None:
    content = {"usr/share/a.txt": b"abc", "usr/b": b""}
    path = tmp_path / "x.deb"
    path.write_bytes(deb(content))
    assert dict(debian.members(path)) == content


@pytest.mark.parametrize("cut", [0, 5, 100, 160])
def test_truncated_package_is_named(deb: Package, tmp_path: Path, cut: int) -> None:
    path = tmp_path / "x.deb"
    path.write_bytes(deb({"a": b"abc"})[:cut])
    with pytest.raises(MoleError, match=r"x\.deb"):
        list(debian.members(path))


def test_fetch_updates_private_lists_and_keeps_what_is_there(tmp_path: Path, fake_apt: list[list[str]]) -> None:
    packages = {"a": OTHER_SUM, "b": OTHER_SUM}
    with pytest.warns(UserWarning, match="apt offers a_1_all.deb"), pytest.warns(UserWarning, match="b_1_all.deb"):
        debian.fetch(packages, tmp_path)
    assert [call[0] for call in fake_apt] == ["download", "update", "download", "download"]
    assert all(option.startswith("-o") for option in fake_apt[1][1:])
    fake_apt.clear()
    debian.fetch(packages, tmp_path)  # apt vouched for them: neither fetched again nor refused
    assert not fake_apt
    assert debian.verified(packages, tmp_path) == {name: tmp_path / f"{name}_1_all.deb" for name in packages}
    assert len(list(tmp_path.iterdir())) == 3  # and the sums
    (tmp_path / "a_1_all.deb").unlink()
    with pytest.warns(UserWarning, match="apt offers a_1_all.deb"):
        debian.fetch(packages, tmp_path)
    assert "b" not in [call[1] for call in fake_apt if call[0] == "download"]
    (tmp_path / "a_1_all.deb").write_bytes(b"")
    with pytest.raises(MoleError, match="SHA-256"):
        debian.fetch(packages, tmp_path)


@pytest.mark.filterwarnings("ignore:apt offers")
def test_apt_gets_no_relative_folder(
    tmp_path: Path, fake_apt: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    debian.fetch({"a": OTHER_SUM}, Path("data/packages"))
    options = [word.partition("=") for call in fake_apt for word in call if word.startswith("-oDir")]
    assert options and all(Path(folder).is_absolute() for _, _, folder in options)
    assert (tmp_path / "data" / "packages" / "a_1_all.deb").exists()


def test_without_apt_the_error_says_what_to_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debian.shutil, "which", lambda _: None)
    with pytest.raises(MoleError, match=r"download a, b from https://packages.debian.org/a .* --source"):
        debian.fetch({"a": OTHER_SUM, "b": OTHER_SUM}, tmp_path)
