"""Write files so that nothing half-written ever stands under its final name."""

import fcntl
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mole_asr.errors import MoleError

_UMASK = os.umask(0)  # it cannot be read without being set
os.umask(_UMASK)


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it is renamed to `path`, on error it is removed.

    The temporary name keeps the suffix, because writers (soundfile, matplotlib) choose the format by it.

    Args:
        path: the final name; its folder is created if missing.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Two processes or threads that write the same file must not meet.
    writer = f"{os.getpid()}-{threading.get_ident()}"
    temporary = path.with_name(f".{path.stem}.{writer}.part{path.suffix}")
    try:
        yield temporary
        temporary.chmod(0o666 & ~_UMASK)  # safetensors' files are for their owner alone
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Writes a UTF-8 text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Waits until no other process holds this folder, and holds it: what is read in it and written anew stays whole.

    Args:
        folder: is created if missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)  # which lets it go


def check_output_folder(output: str | Path, model: str | Path) -> None:
    """Refuses, before any work is done, an output folder that the result cannot be written to.

    Args:
        output: folder of the new model.
        model: folder of the old one, which must stay.

    Raises:
        MoleError: it is that of the old model, or a file.
    """
    if Path(output).resolve() == Path(model).resolve():
        raise MoleError(f"output {output}: is the old model; give another folder")
    if Path(output).exists() and not Path(output).is_dir():
        raise MoleError(f"output {output}: is a file; give a folder")
