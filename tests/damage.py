"""Random damage to files, for the tests that try many. Two environment variables say how long, and which files."""

from __future__ import annotations

import os
import random
import struct

SECONDS, SEED = float(os.environ.get("FASTPERC_FUZZ_SECONDS", "1")), int(os.environ.get("FASTPERC_FUZZ_SEED", "0"))
LONGEST = 10.0  # seconds for one file
NUMBERS = (0, 1, 2, 8, 255, 65535, 2**31 - 1, 2**32 - 1)


def damaged(data: bytes, rng: random.Random) -> bytes:
    """A copy of ``data`` with some bytes or numbers replaced, removed or repeated; most of them near the start."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4, 8])):
        if len(data) < 8:
            break
        position = rng.randrange(len(data) if rng.random() < 0.5 else min(len(data), 300))
        way = rng.random()
        if way < 0.5:
            data[position] = rng.choice([0, 1, 2, 3, 4, 8, 16, 127, 128, 255, rng.randrange(256)])
        elif way < 0.75:
            number = struct.pack(rng.choice("<>") + "I", rng.choice([*NUMBERS, rng.randrange(len(data))]))
            data[position : position + 4] = number
        elif way < 0.85:
            del data[position : position + rng.randrange(1, 20)]
        elif way < 0.95:
            data[position:position] = data[position : position + rng.randrange(1, 30)]
        else:
            del data[position:]
    return bytes(data)
