"""Fetch Debian packages without being root, check them, and read files out of them without dpkg."""

import hashlib
import io
import shutil
import subprocess
import tarfile
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

from mole_asr.errors import MoleError
from mole_asr.files import write_text

# Sums of packages that are not the pinned ones, but that apt verified against its signed index when it fetched them.
APT_SUMS = "apt-verified.sha256"


def package_file(package: str, folder: Path) -> Path | None:
    """Returns the .deb file of a package in `folder`, the newest name if there are several, or None."""
    return max(folder.glob(f"{package}_*.deb"), default=None)


def fetch(packages: Mapping[str, str], folder: Path) -> None:
    """Downloads with apt the packages that `folder` lacks. Needs no root.

    Args:
        packages: package name -> the SHA-256 sum (hex) that its file should have.
        folder: where the .deb files go; complete files that are already there are kept.

    Raises:
        MoleError: apt is missing or fails, or a file already there has a wrong sum.
    """
    folder = folder.absolute()  # apt takes relative folders to be below its own
    folder.mkdir(parents=True, exist_ok=True)
    for package in packages:
        if path := package_file(package, folder):
            verify(path, packages[package])
    missing = [package for package in packages if package_file(package, folder) is None]
    if missing and shutil.which("apt-get") is None:
        raise MoleError(f"apt-get is missing; {_by_hand(missing)}")
    with tempfile.TemporaryDirectory(dir=folder, prefix=".apt-") as scratch:
        for package in missing:
            print(f"fetching {package} ...", flush=True)
            path = _apt_download(package, Path(scratch))
            if sha256(path) != packages[package]:
                _accept_from_apt(path, folder)
            path.rename(folder / path.name)


def verified(packages: Mapping[str, str], folder: Path) -> dict[str, Path]:
    """Returns package name -> .deb file in `folder`, each with the SHA-256 sum that it should have.

    Raises:
        MoleError: a package is missing or has a wrong sum.
    """
    found = {package: path for package in packages if (path := package_file(package, folder))}
    if missing := [package for package in packages if package not in found]:
        raise MoleError(f"{folder}: {len(missing)} packages are missing; {_by_hand(missing)}")
    for package, path in found.items():
        verify(path, packages[package])
    return found


def sha256(path: Path) -> str:
    """Returns the SHA-256 sum of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(path: Path, expected: str) -> None:
    """Raises MoleError unless the file has the expected SHA-256 sum, or one that apt vouched for when we fetched it."""
    found = sha256(path)
    sums = path.with_name(APT_SUMS)
    if found != expected and not (sums.exists() and f"{found}  {path.name}" in sums.read_text().splitlines()):
        raise MoleError(f"{path}: its SHA-256 is {found[:12]}..., not {expected[:12]}...; delete it and fetch it again")


def members(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yields (name without the leading "./", content) of every regular file in a .deb package.

    A package is an `ar` archive whose member `data.tar.xz` (or .gz, ...) holds the files (deb(5)).

    Raises:
        MoleError: it is no package that Python can unpack.
    """
    try:
        with tarfile.open(fileobj=io.BytesIO(_data_archive(path.read_bytes())), mode="r:*") as tar:
            for member in tar:
                # Symbolic links may point into other packages, and what they point at here has its own name.
                if not member.issym() and (file := tar.extractfile(member)) is not None:
                    yield member.name.removeprefix("./"), file.read()
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise MoleError(f"{path}: not a Debian package that can be unpacked ({error}); fetch it again") from None


def _data_archive(package: bytes) -> bytes:
    """Returns the `data.tar.*` member of an ar archive: 60-byte headers, contents padded to even offsets."""
    position = 8
    while package.startswith(b"!<arch>\n") and position + 60 <= len(package):
        name, size = package[position : position + 16], int(package[position + 48 : position + 58])
        position += 60
        if name.startswith(b"data.tar"):
            return package[position : position + size]
        position += size + size % 2
    raise ValueError("it holds no data.tar")


def _apt_download(package: str, scratch: Path) -> Path:
    """Downloads one package to `scratch`: with the machine's package lists, or else with private ones kept there."""
    lists, cache = scratch / "lists", scratch / "cache"
    # As root, apt would drop its rights and then be refused its own folder.
    private = [f"-oDir::State::Lists={lists}", f"-oDir::Cache={cache}", "-oAPT::Sandbox::User=root"]
    if lists.exists() or _apt(["download", package], scratch):
        if not lists.exists():
            for folder in (lists, cache / "archives"):
                (folder / "partial").mkdir(parents=True)
            if error := _apt(["update", *private], scratch):
                raise MoleError(f"apt-get update fails: {error}; {_by_hand([package])}")
        if error := _apt(["download", package, *private], scratch):
            raise MoleError(f"apt-get cannot download {package}: {error}; {_by_hand([package])}")
    fetched = package_file(package, scratch)
    if fetched is None:
        raise MoleError(f"apt-get left no file for {package}; {_by_hand([package])}")
    return fetched


def _accept_from_apt(path: Path, folder: Path) -> None:
    """Notes the sum of a package that is not the pinned one, and says so."""
    sums = folder / APT_SUMS
    known = sums.read_text() if sums.exists() else ""
    write_text(sums, f"{known}{sha256(path)}  {path.name}\n")
    warnings.warn(
        f"apt offers {path.name}, not the version that our figures come from; apt has verified it against its signed "
        "index, so it is used, but results may differ",
        stacklevel=3,
    )


def _apt(arguments: list[str], folder: Path) -> str:
    """Runs apt-get in `folder`; returns the last line of its complaint, or nothing when all went well."""
    result = subprocess.run(["apt-get", "-q", *arguments], cwd=folder, capture_output=True, text=True, check=False)
    if result.returncode == 0:
        return ""
    return (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]


def _by_hand(packages: list[str]) -> str:
    names = ", ".join(packages)
    return (
        f"download {names} from https://packages.debian.org/{packages[0]} and so on, and give the folder as --source "
        "(`make demo SOURCE=folder`)"
    )
