"""A reader of Torch7's binary serialisation (``.t7``): numbers, strings, tables, tensors, storages and modules.

It reads data alone: Lua functions in a file are refused, and nothing in it is run. The format, in little-endian:

    object   kind (int32), then by kind
      0      nil
      1      number: float64
      2      string: length (int32), bytes
      5      boolean: int32
      3      table: index (int32); unless that index came before, the count (int32) and as many keys and values
      4      torch object: index (int32); unless it came before, "V 1" and the class's name (strings), and by class
               tensor   dimensions (int32), sizes, strides and offset from 1 (int64 each), the storage (object)
               storage  count (int64), the values
               others   a table of the fields (object)
"""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastperc.conversion.common import MAX_BYTES, Refused, shown

NIL, NUMBER, STRING, TABLE, TORCH, BOOLEAN = range(6)
FUNCTIONS = (6, 7, 8)
STARTS = tuple(struct.pack("<ii", kind, 1) for kind in (TABLE, TORCH))  # of a file
ASCII_STARTS = tuple(f"{kind}\n1\n".encode() for kind in (TABLE, TORCH))
MAX_DEPTH, MAX_DIMENSIONS, MAX_NAME, MAX_OBJECTS = 100, 8, 200, 5_000_000
CLASS = re.compile(r"torch\.(Cuda)?(\w*?)(Tensor|Storage)")
DTYPES = {
    **{"Float": torch.float32, "Double": torch.float64, "Half": torch.float16, "Long": torch.int64},
    **{"Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8},
}
FIELDS = re.compile(r"(nn|cudnn|inn)\.\w+")  # classes that are stored as a table of their fields


class Module:
    """A torch object other than a tensor: the name of its class, such as ``nn.Sequential``, and its fields."""

    def __init__(self, name: str) -> None:
        self.name, self.fields = name, dict[Any, Any]()

    def number(self, field: str, default: float | None = None) -> float:
        """The number in a field; ``default`` stands for a field that is missing.

        Raises:
            Refused: it holds no number.
        """
        value = self.fields.get(field, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise Refused(f"its {self.name} has no number {field}")
        return value

    def integer(self, field: str, default: int | None = None) -> int:
        """The small whole number in a field, as :meth:`number`."""
        value = self.number(field, default)
        if not abs(value) < 1 << 16 or value != round(value):
            raise Refused(f"its {self.name} has {value} as {field}")
        return int(value)

    def tensor(self, field: str) -> Tensor:
        """The tensor in a field, in float32.

        Raises:
            Refused: it holds no tensor.
        """
        value = self.fields.get(field)
        if not isinstance(value, Tensor):
            raise Refused(f"its {self.name} has no tensor {field}")
        return value.float()

    def list(self, field: str) -> list[Any]:
        """The values in a field that is a table with the keys 1, 2, …"""
        table = self.fields.get(field)
        if not isinstance(table, dict) or [*sorted(table, key=str)] != sorted(range(1, len(table) + 1), key=str):
            raise Refused(f"its {self.name} has no list {field}")
        return [table[i] for i in range(1, len(table) + 1)]


def read(path: Path) -> Any:
    """The object in a file: ``None``, numbers, texts, booleans, dicts, tensors and :class:`Module`.

    Raises:
        Refused: a damaged file, one that is too large, or one with more than data.
    """
    if path.stat().st_size > MAX_BYTES:
        raise Refused("is larger than 1 GiB")
    try:
        return _Reader(path.read_bytes()).object(0)
    except (struct.error, ValueError, OverflowError, TypeError):
        raise Refused("is damaged or cut short") from None


class _Reader:
    """The content of a file and the place in it."""

    def __init__(self, data: bytes) -> None:
        self.data, self.place, self.count, self.objects = data, 0, 0, dict[int, Any]()

    def object(self, depth: int) -> Any:
        """The object at the place, which moves on behind it."""
        self.count += 1
        if depth > MAX_DEPTH or self.count > MAX_OBJECTS:
            raise Refused("is nested too deeply" if depth > MAX_DEPTH else "holds too many values")
        (kind,) = self._unpack("i")
        if kind == NIL:
            return None
        if kind == NUMBER:
            (number,) = self._unpack("d")
            return int(number) if number == number and abs(number) < 2**53 and number == int(number) else number
        if kind == STRING:
            return self._text()
        if kind == BOOLEAN:
            return self._unpack("i") == (1,)
        if kind in FUNCTIONS:
            raise Refused("holds Lua functions, which are code; save its weights and tables alone")
        if kind not in (TABLE, TORCH):
            raise ValueError
        (index,) = self._unpack("i")
        if index in self.objects:
            return self.objects[index]
        return self._table(index, depth) if kind == TABLE else self._torch(index, depth)

    def _table(self, index: int, depth: int) -> dict[Any, Any]:
        table = self.objects[index] = dict[Any, Any]()
        (count,) = self._unpack("i")
        if not 0 <= count <= len(self.data):
            raise ValueError
        for _ in range(count):
            key = self.object(depth + 1)
            value = self.object(depth + 1)
            if isinstance(key, (int, float, str)):  # other keys name nothing that a network needs
                table[key] = value
        return table

    def _torch(self, index: int, depth: int) -> Any:
        name = self._text(MAX_NAME)
        if re.fullmatch(r"V -?\d+", name):
            name = self._text(MAX_NAME)
        if match := CLASS.fullmatch(name):
            dtype = DTYPES.get(match[2] or "Float" if match[1] else match[2])
            if dtype is None:
                raise Refused(f"holds a {shown(name)}, which is not read")
            read = self._tensor if match[3] == "Tensor" else self._storage
            value = self.objects[index] = read(dtype, depth)
            return value
        if not FIELDS.fullmatch(name):
            raise Refused(f"holds a {shown(name)}, which is no part of a network")
        module = self.objects[index] = Module(name)
        fields = self.object(depth + 1)
        if not isinstance(fields, dict):
            raise ValueError
        module.fields = fields
        return module

    def _tensor(self, dtype: torch.dtype, depth: int) -> Tensor:
        (dimensions,) = self._unpack("i")
        if not 0 <= dimensions <= MAX_DIMENSIONS:
            raise ValueError
        sizes, strides = self._unpack(f"{dimensions}q"), self._unpack(f"{dimensions}q")
        (offset,) = self._unpack("q")
        storage = self.object(depth + 1)
        if not dimensions or storage is None or 0 in sizes:
            return torch.empty(0, dtype=dtype)
        if not isinstance(storage, Tensor) or storage.dtype != dtype or min(sizes) < 1 or min(strides) < 0:
            raise ValueError
        last, count = offset - 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides)), 1
        for size in sizes:
            count *= size
        if offset < 1 or last >= len(storage) or count > len(storage):
            raise ValueError
        return storage.as_strided(sizes, strides, offset - 1)

    def _storage(self, dtype: torch.dtype, depth: int) -> Tensor:
        (count,) = self._unpack("q")
        if not 0 <= count <= (len(self.data) - self.place) // dtype.itemsize:
            raise ValueError
        start, self.place = self.place, self.place + count * dtype.itemsize
        if not count:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(bytearray(self.data[start : self.place]), dtype=dtype)

    def _text(self, longest: int = MAX_BYTES) -> str:
        (length,) = self._unpack("i")
        if not 0 <= length <= min(longest, len(self.data) - self.place):
            raise ValueError
        start, self.place = self.place, self.place + length
        return self.data[start : self.place].decode("utf-8", "replace")

    def _unpack(self, kinds: str) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{kinds}", self.data, self.place)
        self.place += struct.calcsize(f"<{kinds}")
        return values
