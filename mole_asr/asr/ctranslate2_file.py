"""Reads `model.bin` of CTranslate2 (https://github.com/OpenNMT/CTranslate2), the format of faster-whisper's models.

Binary version 6, little endian: version u32, name of the model's kind, its revision u32, number of tensors u32; each
tensor as name, rank u8, sizes u32, type u8, bytes u32, data; number of aliases u32; each as two names. A string is a
length u16, which counts the zero at its end, and its bytes.
"""

import mmap
import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mole_asr.errors import MoleError

VERSION = 6
# In the order of their numbers in the file; bfloat16 is read as the upper half of a float32.
_TYPES = ("<f4", "i1", "<i2", "<i4", "<f2", "<u2")
_BFLOAT16 = 5


class _Reader:
    """A place in the bytes of a file."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.place = data, 0

    def number(self, code: str) -> int:
        (value,) = struct.unpack_from("<" + code, self.data, self.place)
        self.place += struct.calcsize("<" + code)
        return value

    def string(self) -> str:
        size = self.number("H")
        raw = self.data[self.place : self.place + size]
        self.place += size
        if len(raw) != size or not raw.endswith(b"\0"):
            raise ValueError("a name is cut off")
        return raw[:-1].decode("utf-8")

    def array(self) -> np.ndarray:
        shape = tuple(self.number("I") for _ in range(self.number("B")))
        kind, size = self.number("B"), self.number("I")
        if kind >= len(_TYPES):
            raise ValueError(f"tensor type {kind} is unknown")
        dtype = np.dtype(_TYPES[kind])
        count = int(np.prod(shape))  # 1 for a scalar
        if count * dtype.itemsize != size:
            raise ValueError(f"{size} bytes are no tensor of shape {shape}")
        values = np.frombuffer(self.data, dtype, count, self.place).reshape(shape)
        self.place += size
        if kind == _BFLOAT16:
            return (values.astype(np.uint32) << 16).view(np.float32)
        return values.copy()  # the file is closed soon


def read_ctranslate2(path: Path, kind: str) -> dict[str, Tensor]:
    """Reads and dequantises all tensors.

    Args:
        path: a `model.bin`.
        kind: the kind of model that it must be, such as "WhisperSpec".

    Returns:
        Tensors by CTranslate2's names ("encoder/layer_0/ffn/linear_0/weight"): floats as float32, integers such as
        "encoder/num_heads" as int64. int8 rows (and int16 tensors) are divided by their scales.

    Raises:
        MoleError: the file is missing, cut off, of another version, or another kind of model.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            arrays = _read(_Reader(data), kind, path)
        return _dequantise(arrays)
    except OSError as error:
        raise MoleError(f"{path}: cannot be read ({error.strerror})") from None
    except (struct.error, ValueError, KeyError) as error:
        raise MoleError(f"{path}: not a whole CTranslate2 model ({error}); copy or convert it anew") from None


def _read(reader: _Reader, kind: str, path: Path) -> dict[str, np.ndarray]:
    version = reader.number("I")
    if version != VERSION:
        raise MoleError(f"{path}: CTranslate2 version {version} is not {VERSION}; convert the model with CTranslate2 4")
    found = reader.string()
    if found != kind:
        raise MoleError(f"{path}: a {found}, not a {kind}; give another model")
    reader.number("I")  # revision: the tensors' names and shapes tell
    arrays = {}
    for _ in range(reader.number("I")):
        name = reader.string()
        arrays[name] = reader.array()
    for _ in range(reader.number("I")):
        alias = reader.string()
        arrays[alias] = arrays[reader.string()]
    return arrays


def _dequantise(arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
    tensors = {}
    for name, values in arrays.items():
        if name.endswith(("_scale", "_zero")):
            continue
        scale = arrays.get(f"{name}_scale")
        if f"{name}_zero" in arrays:
            raise ValueError(f"{name} is quantised by groups, which is not supported")
        if scale is not None and values.dtype.kind == "i":
            # One scale a row (int8), or one for all (int16).
            values = values.astype(np.float32) / scale.astype(np.float32).reshape(-1, *[1] * (values.ndim - 1))
        tensors[name] = torch.from_numpy(values.astype(np.int64 if values.dtype.kind == "i" else np.float32))
    return tensors
