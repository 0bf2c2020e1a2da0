"""A reader of TensorFlow's checkpoints: bundles (``.index`` and ``.data-00000-of-00001``) and single files before 1.0.

It reads tensors alone, and nothing in a file is run. Both kinds are tables of LevelDB's format, with values in protocol
buffers:

    table    blocks, then a footer of 48 bytes: the places of two blocks (varints: offset, size), zeros, ``MAGIC``
    block    entries, then the offsets of some entries and their count (uint32 each); after it its compression
             (one byte) and a checksum (uint32)
    entry    bytes shared with the key before, bytes of the key that are not, bytes of the value (varints), both
    bundle   key: the tensor's name; value: dtype (1), shape (2), file (3), offset (4), size (5), slices (7)
    single   key: "" for a list of the tensors (1), else: a slice (2) with name (1), part (2) and tensor (3)
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastperc.conversion.common import MAX_BYTES, Refused
from fastperc.errors import InputError
from fastperc.files import check_readable

MAGIC = struct.pack("<Q", 0xDB4775248B80FB57)
FOOTER = 48  # bytes
MAX_BLOCK = 1 << 28  # bytes of a block that was compressed
DTYPES = {1: torch.float32, 2: torch.float64, 3: torch.int32, 9: torch.int64, 19: torch.float16}
FIXED = {1: 8, 5: 4}  # bytes of a field by its kind
VALUES = {5: "<f4", 6: "<f8"}  # fields of a tensor with its numbers in a row: float and double
DATA = re.compile(r"(.*)\.data-\d{5}-of-\d{5}")


def find(path: Path) -> Path | None:
    """The table of a checkpoint that ``path`` names: a file of it, its name without a suffix, or its folder.

    Returns ``None`` if it names none.

    Raises:
        InputError: a folder with none or several.
    """
    if path.is_dir():
        tables = sorted(path.glob("*.index"))
        if len(tables) != 1:
            raise InputError(f"{path}: holds {len(tables)} TensorFlow checkpoints (.index); name one file")
        return tables[0]
    if match := DATA.fullmatch(path.name):
        return path.with_name(f"{match[1]}.index")
    if not path.exists():
        index = path.with_name(f"{path.name}.index")
        return index if index.exists() else None
    check_readable(path)
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - len(MAGIC)))
        return path if file.read() == MAGIC else None


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name; ``path`` is its table, see :func:`find`.

    Raises:
        InputError: a file cannot be read.
        Refused: a damaged file, or one that is too large.
    """
    check_readable(path)
    if path.stat().st_size > MAX_BYTES:
        raise Refused("is larger than 1 GiB")
    try:
        entries = [*_entries(path.read_bytes())]
        single = any(not key for key, _ in entries) and path.suffix != ".index"
        return _single(entries) if single else _bundle(path, entries)
    except InputError:  # a file of the bundle that cannot be read
        raise
    except (struct.error, AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError):
        raise Refused("is damaged or cut short") from None


# Tables


def _entries(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The keys and values of a table."""
    footer = data[-FOOTER:]
    if len(footer) != FOOTER or not footer.endswith(MAGIC):
        raise ValueError
    place = 0
    for _ in range(2):  # of the block that describes others, then of the index
        offset, place = _varint(footer, place)
        size, place = _varint(footer, place)
    total = 0
    for _, handle in _block(data, offset, size):
        start, place = _varint(handle, 0)
        length, _ = _varint(handle, place)
        for entry in _block(data, start, length):
            total += sum(map(len, entry))
            if total > MAX_BYTES:
                raise ValueError
            yield entry


def _block(data: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """The keys and values of a block."""
    if offset + size + 5 > len(data):
        raise ValueError
    content, compression = data[offset : offset + size], data[offset + size]
    if compression == 1:
        content = _decompressed(content)
    elif compression:
        raise ValueError
    (restarts,) = struct.unpack("<I", content[-4:])
    end, place, key = len(content) - 4 * (restarts + 1), 0, b""
    while place < end:
        shared, place = _varint(content, place)
        rest, place = _varint(content, place)
        length, place = _varint(content, place)
        if shared > len(key) or place + rest + length > end:
            raise ValueError
        key = key[:shared] + content[place : place + rest]
        place += rest + length
        yield key, content[place - length : place]


def _decompressed(data: bytes) -> bytes:
    """What Snappy has compressed: literals, and copies of bytes that came before."""
    size, place = _varint(data, 0)
    if size > MAX_BLOCK:
        raise ValueError
    output = bytearray()
    while place < len(data):
        tag, place = data[place], place + 1
        if tag & 3 == 0:  # a literal
            length = tag >> 2
            if length >= 60:
                count = length - 59
                length, place = int.from_bytes(data[place : place + count], "little"), place + count
            output += data[place : place + length + 1]
            place += length + 1
        else:
            if tag & 3 == 1:
                length, distance, count = 4 + (tag >> 2 & 7), tag >> 5 << 8 | data[place], 1
            else:
                length, count = 1 + (tag >> 2), 2 if tag & 3 == 2 else 4
                distance = int.from_bytes(data[place : place + count], "little")
            place += count
            if not 0 < distance <= len(output):
                raise ValueError
            start = len(output) - distance
            pattern = bytes(output[start : start + length])
            output += (pattern * (length // len(pattern) + 1))[:length]
        if len(output) > size:
            raise ValueError
    if len(output) != size:
        raise ValueError
    return bytes(output)


# Protocol buffers


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """A number of 7 bits a byte, the lowest first; and the place behind it."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
    raise ValueError


def _fields(data: bytes) -> dict[int, list[Any]]:
    """The values of a message by the numbers of their fields: integers and bytes."""
    fields: dict[int, list[Any]] = {}
    place = 0
    while place < len(data):
        tag, place = _varint(data, place)
        number, kind = tag >> 3, tag & 7
        value: int | bytes
        if kind == 0:
            value, place = _varint(data, place)
        else:
            length, place = (FIXED[kind], place) if kind in FIXED else _varint(data, place)
            if kind not in (*FIXED, 2) or place + length > len(data):
                raise ValueError
            value, place = data[place : place + length], place + length
        fields.setdefault(number, []).append(value)
    return fields


def _shape(message: bytes) -> list[int]:
    """The sizes of a tensor."""
    sizes = [_fields(dimension).get(1, [0])[0] for dimension in _fields(message).get(2, [])]
    if math.prod(sizes) > MAX_BYTES:
        raise ValueError
    return sizes


# Both kinds of checkpoints


def _bundle(path: Path, entries: list[tuple[bytes, bytes]]) -> dict[str, Tensor]:
    """The tensors of a bundle whose table is ``path``; others than numbers are left out."""
    header = _fields(dict(entries)[b""])
    files, big_endian = header.get(1, [1])[0], header.get(2, [0])[0]
    if files > 100 or big_endian:
        raise Refused(f"is of {files} files" if files > 100 else "was written on a big-endian machine")
    parts = [check_readable(path.with_suffix(f".data-{i:05}-of-{files:05}")) for i in range(files)]
    tensors = {}
    for key, value in entries:
        entry = _fields(value)
        dtype = DTYPES.get(entry.get(1, [0])[0])
        if not key or dtype is None or 7 in entry:
            continue
        shape = _shape(entry.get(2, [b""])[0])
        part, offset, size = parts[entry.get(3, [0])[0]], entry.get(4, [0])[0], entry.get(5, [0])[0]
        if size != math.prod(shape) * dtype.itemsize or offset + size > part.stat().st_size:
            raise ValueError
        with part.open("rb") as file:
            file.seek(offset)
            tensors[key.decode()] = _tensor(file.read(size), dtype, shape)
    return tensors


def _single(entries: list[tuple[bytes, bytes]]) -> dict[str, Tensor]:
    """The tensors of a single file that are stored in one piece, in float32 or float64."""
    table = _fields(_fields(dict(entries)[b""])[1][0])
    shapes = {}
    for message in table.get(1, []):
        tensor = _fields(message)
        shapes[tensor[1][0].decode()] = _shape(tensor.get(2, [b""])[0])
    tensors = {}
    for key, value in entries:
        part = _fields(value).get(2) if key else None
        if not part:
            continue
        fields = _fields(part[0])
        name, content = fields[1][0].decode(), _fields(fields[3][0])
        for field, kind in VALUES.items():
            values = np.frombuffer(b"".join(content.get(field, [])), kind)
            if len(values) and len(values) == math.prod(shapes[name]):
                tensors[name] = torch.from_numpy(values.copy()).view(shapes[name])
    return tensors


def _tensor(data: bytes, dtype: torch.dtype, shape: list[int]) -> Tensor:
    if not data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=dtype).view(shape)
