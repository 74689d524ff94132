import io
import tarfile
from collections.abc import Callable, Mapping

import pytest


@pytest.fixture(scope="session")
def deb() -> Callable[[Mapping[str, bytes]], bytes]:
    """Makes a .deb package of name -> content, as deb(5) describes it, with an odd-sized member before the data."""

    def package(content: Mapping[str, bytes]) -> bytes:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:xz", preset=0) as tar:
            for name, data in content.items():
                info = tarfile.TarInfo(f"./{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
            link = tarfile.TarInfo("./usr/share/link")
            link.type, link.linkname = tarfile.SYMTYPE, "../elsewhere"
            tar.addfile(link)
        result = b"!<arch>\n"
        for name, data in {"debian-binary": b"2.0", "data.tar.xz": buffer.getvalue()}.items():
            header = f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n".encode()
            result += header + data + b"\n" * (len(data) % 2)
        return result

    return package
