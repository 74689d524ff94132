"""Write files so that nothing half-written ever stands under its final name, and refuse what cannot be written."""

import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from zlib import crc32

from safetensors import SafetensorError

from mole_asr.errors import MoleError

_UMASK = os.umask(0o077)  # it cannot be read without being set
os.umask(_UMASK)


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it is renamed to `path`, on error it is removed.

    The temporary name keeps the suffix, because writers (soundfile, matplotlib) choose the format by it.

    Args:
        path: the final name; its folder is created if missing.

    Raises:
        MoleError: it is a folder, or the disk is full.
    """
    path = Path(path)
    if path.is_dir():
        raise MoleError(f"{path}: is a folder; give the name of a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    # Two processes or threads that write the same file must not meet.
    writer = f"{os.getpid()}-{threading.get_ident()}"
    # Short, as the file's own name may be as long as names can be.
    temporary = path.with_name(f".{crc32(os.fsencode(path.name)):08x}.{writer}.part{path.suffix}")
    try:
        yield temporary
        if stat.S_IMODE(temporary.stat().st_mode) == 0o600:  # safetensors' files are for their owner alone
            temporary.chmod(0o666 & ~_UMASK)
        os.replace(temporary, path)
    except SafetensorError as error:  # it makes no OSError of a full disk
        raise MoleError(f"{path}: cannot be written ({error})") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Writes a UTF-8 text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Waits until no other process holds this file, and holds it, so that it can be read and written anew.

    What is locked is an empty file `.NAME.lock` beside it, which stays.

    Args:
        path: of the file, which need not be there yet.
    """
    import fcntl  # only where there is something to lock: Windows has no such module

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)  # closing lets it go
        yield


def check_output_folder(output: str | Path, model: str | Path) -> None:
    """Refuses, before any work is done, an output folder that the result cannot be written to.

    Args:
        output: folder of the new model.
        model: folder of the old one, which must stay.

    Raises:
        MoleError: it is that of the old model, or cannot be made.
    """
    if Path(output).resolve() == Path(model).resolve():
        raise MoleError(f"output {output}: is the old model; give another folder")
    check_folder(output)


def check_folder(output: str | Path) -> None:
    """Refuses an output folder that cannot be made.

    Raises:
        MoleError: it is a file, or in one.
    """
    chain = (Path(output), *Path(output).absolute().parents)
    there = next(each for each in chain if each.exists() or each.is_symlink())
    if not there.is_dir():
        raise MoleError(f"output {there}: is a file; give a folder")


def check_is_no_pipe(path: str | Path) -> None:
    """Refuses a file that can be read but once.

    Raises:
        MoleError: it is a pipe (`<(...)`, /dev/stdin) or a device.
    """
    path = Path(path)
    if path.is_fifo() or path.is_char_device() or path.is_socket():
        raise MoleError(f"{path}: is a pipe or a device, and has to be read more than once; write it to a file first")


def is_unicode(text: str) -> bool:
    """Whether a text can be written: JSON, command lines and names of files may hold half a surrogate pair.

    Python makes one of each byte of a name that is not UTF-8.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
