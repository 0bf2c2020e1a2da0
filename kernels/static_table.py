"""What can be said of a compiled kernel's speed without a GPU, and the committed tables: a regression shows there.

A table has the kernels with matrix products, as one version of Triton compiles them: ``benchmarks/static``.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable
from typing import NamedTuple

from fastperc.kernels.configs import KIB, SHARED_MEMORY

WARPS = {80: 64, 86: 48, 89: 48, 90: 64, 100: 64, 120: 48}  # that a multiprocessor runs at a time
MOST_CTAS = {80: 32, 86: 16, 89: 24, 90: 32, 100: 32, 120: 24}
REGISTERS = 64 * KIB  # of a multiprocessor
RESERVED = KIB  # bytes of shared memory that CUDA takes from a multiprocessor for each block
MORE_REGISTERS, LONGER_LOOP = 8, 1.05  # what a kernel may have more than its row, or times as much

_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([\w.]+)([^;]*)", re.MULTILINE)


class StaticRow(NamedTuple):
    """A kernel with matrix products, compiled."""

    kernel: str
    config: str
    arch: int
    registers: int  # a thread
    ctas: int  # blocks that a multiprocessor runs at a time
    loop: float  # instructions for each of the tensor cores', in the loop

    @property
    def name(self) -> str:
        return f"{self.kernel} ({self.config}) on sm_{self.arch}"


def ctas(arch: int, registers: int, shared_bytes: int, num_warps: int) -> int:
    """How many blocks a multiprocessor runs at a time."""
    of_warp = -(-registers * 32 // 256) * 256
    fit = [MOST_CTAS[arch], WARPS[arch] // num_warps, REGISTERS // of_warp // num_warps]
    fit.append((SHARED_MEMORY[arch] + RESERVED) // (shared_bytes + RESERVED))
    return min(fit)


def loop_length(listing: str) -> float:
    """Instructions for each matrix instruction in the innermost loops that have any, in machine code as cuobjdump
    lists it; in all of the code if no loop has any; 0 without a matrix instruction."""
    code = [(int(address, 16), name, rest) for address, name, rest in _INSTRUCTION.findall(listing)]
    products = [address for address, name, _ in code if "MMA" in name.partition(".")[0]]
    loops = []
    for address, name, rest in code:
        target = re.search(r"0x([0-9a-f]+)", rest) if name.startswith("BRA") else None
        if target and int(target[1], 16) < address:
            loops.append((int(target[1], 16), address))
    innermost: list[tuple[int, int]] = []
    for first, last in sorted(loops, key=lambda loop: loop[1] - loop[0]):
        has_products = any(first <= address <= last for address in products)
        if has_products and all(last < start or first > end for start, end in innermost):
            innermost.append((first, last))
    innermost = innermost or [(0, code[-1][0])] if code else []
    in_loops = [address for address, *_ in code if any(first <= address <= last for first, last in innermost)]
    return round(len(in_loops) / len(set(in_loops) & set(products)), 1) if products else 0.0


def as_csv(rows: Iterable[StaticRow]) -> str:
    """The text of a table."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(StaticRow._fields)
    writer.writerows(sorted(rows))
    return text.getvalue()


def from_csv(text: str) -> list[StaticRow]:
    """The rows of a table."""
    reader = csv.DictReader(io.StringIO(text))
    return [
        StaticRow(r["kernel"], r["config"], int(r["arch"]), int(r["registers"]), int(r["ctas"]), float(r["loop"]))
        for r in reader
    ]


def regressions(rows: Iterable[StaticRow], table: Iterable[StaticRow]) -> list[str]:
    """A line for each way in which ``rows`` are worse than the committed ``table``, or are of other kernels."""
    committed = {row[:3]: row for row in table}
    compiled = {row[:3]: row for row in rows}
    found = [f"{committed[key].name}: is in the table, but nothing launches it" for key in committed.keys() - compiled]
    for key, row in compiled.items():
        if (before := committed.get(key)) is None:
            found.append(f"{row.name}: is not in the table")
            continue
        if row.registers > before.registers + MORE_REGISTERS:
            found.append(f"{row.name}: {row.registers} registers, the table has {before.registers}")
        if row.ctas < before.ctas:
            found.append(f"{row.name}: {row.ctas} blocks a multiprocessor, the table has {before.ctas}")
        if row.loop > before.loop * LONGER_LOOP:
            found.append(f"{row.name}: {row.loop} instructions for each product, the table has {before.loop}")
    return sorted(found)
