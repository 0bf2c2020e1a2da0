"""Writes TensorFlow's checkpoints, and the network of lengstrom/fast-style-transfer in them."""

from __future__ import annotations

import struct

import torch

MAGIC = 0xDB4775248B80FB57


def varint(value):
    data = bytearray()
    while value > 127:
        data.append(value & 127 | 128)
        value >>= 7
    return bytes([*data, value])


def field(number, value):
    """A field of a protocol buffer: a number, or bytes."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def block(entries, restart=16):
    """Entries with the prefixes that their keys share; every so many keys are whole."""
    data, restarts, before = bytearray(), [], b""
    for i, (key, value) in enumerate(entries):
        shared = 0
        if i % restart == 0:
            restarts.append(len(data))
        else:
            while shared < min(len(key), len(before)) and key[shared] == before[shared]:
                shared += 1
        data += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        before = key
    return bytes(data) + struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts))


def snappy(data):
    """``data`` compressed: literals of 100 bytes at most, and copies of what came four bytes earlier."""
    output, place = bytearray(varint(len(data))), 0
    while place < len(data):
        length = 0
        while (
            place >= 4
            and length < 60
            and data[place + length : place + length + 1] == data[place + length - 4 : place + length - 3] != b""
        ):
            length += 1
        if length >= 4:
            kind = 2 if length > 11 else 1
            output += bytes([length - 1 << 2 | 2, 4, 0]) if kind == 2 else bytes([length - 4 << 2 | 1, 4])
            place += length
            continue
        end = place + 1
        while end < len(data) and end - place < 100 and data[end : end + 4] != data[end - 4 : end]:
            end += 1
        literal = data[place:end]
        count = len(literal) - 1
        output += bytes([count << 2]) if count < 60 else bytes([60 << 2, count])
        output += literal
        place = end
    return bytes(output)


def table(entries, compress=False, entries_a_block=5):
    """A table of LevelDB's format."""
    entries, data, handles = sorted(entries.items()), bytearray(), []

    def add(content):
        content = snappy(content) if compress else content
        handle = varint(len(data)) + varint(len(content))
        data.extend(content + bytes([compress]) + struct.pack("<I", 0))
        return handle

    for i in range(0, len(entries), entries_a_block):
        part = entries[i : i + entries_a_block]
        handles.append((part[-1][0], add(block(part))))
    footer = add(block([])) + add(block(handles, 1))
    return bytes(data) + footer.ljust(40, b"\0") + struct.pack("<Q", MAGIC)


def shape_message(shape):
    return b"".join(field(2, field(1, size)) for size in shape)


def bundle(tensors, prefix):
    """``prefix.index`` and ``prefix.data-00000-of-00001``."""
    dtypes = {torch.float32: 1, torch.float64: 2, torch.int64: 9}
    entries, data = {b"": field(1, 1) + field(3, field(1, 1))}, bytearray()
    for name, tensor in sorted(tensors.items()):
        content = tensor.numpy().tobytes()
        entry = field(1, dtypes[tensor.dtype]) + field(2, shape_message(tensor.shape))
        entry += (field(4, len(data)) if data else b"") + field(5, len(content))
        entries[name.encode()] = entry + varint(6 << 3 | 5) + struct.pack("<I", 0)
        data += content
    prefix.with_name(f"{prefix.name}.index").write_bytes(table(entries))
    prefix.with_name(f"{prefix.name}.data-00000-of-00001").write_bytes(data)


def single(tensors, path, compress=True):
    """A file as TensorFlow wrote it before 1.0."""
    listed = b"".join(
        field(1, field(1, name.encode()) + field(2, shape_message(tensor.shape)) + field(3, 1))
        for name, tensor in tensors.items()
    )
    entries = {b"": field(1, listed)}
    for name, tensor in tensors.items():
        extents = b"".join(field(1, b"") for _ in tensor.shape)
        data = field(1, 1) + field(5, tensor.numpy().tobytes())
        entries[b"\0" + name.encode() + b"\0\1"] = field(
            2, field(1, name.encode()) + field(2, extents) + field(3, data)
        )
    path.write_bytes(table(entries, compress))


class Lengstrom:
    """A network of lengstrom's with random weights, and what it computes."""

    def __init__(self, width=4):
        w = width
        channels = [(3, w, 9), (w, 2 * w, 3), (2 * w, 4 * w, 3), *[(4 * w, 4 * w, 3)] * 10]
        channels += [(4 * w, 2 * w, 3), (2 * w, w, 3), (w, 3, 9)]
        generator = torch.Generator().manual_seed(5)
        self.variables = []
        for i, (c_in, c_out, k) in enumerate(channels):
            shape = (k, k, c_out, c_in) if i in (13, 14) else (k, k, c_in, c_out)
            self.variables += [0.1 * torch.randn(shape, generator=generator), 0.1 * torch.randn(c_out)]
            self.variables.append(0.5 + torch.rand(c_out, generator=generator))

    def tensors(self):
        """By TensorFlow's names, beside some of the optimizer's."""
        named = {f"Variable_{i}" if i else "Variable": tensor for i, tensor in enumerate(self.variables)}
        return named | {"Variable/Adam": torch.zeros(2), "beta1_power": torch.tensor(0.9)}

    def picture(self, x):
        """RGB in 0–1 to the same, for sides that are multiples of 4."""
        y, f = 255 * x, torch.nn.functional
        rows = [self.variables[3 * i : 3 * i + 3] for i in range(16)]

        def same(y, weight, stride):
            """A convolution with as few zeros as an output of ceil(size / stride) needs, one more at the end."""
            k, sides = len(weight), []
            for size in (y.shape[3], y.shape[2]):
                total = max((-(-size // stride) - 1) * stride + k - size, 0)
                sides += [total // 2, total - total // 2]
            return f.conv2d(f.pad(y, sides), weight.permute(3, 2, 0, 1), stride=stride)

        def norm(y, i):
            _, shift, scale = (part.view(1, -1, 1, 1) if part.dim() == 1 else part for part in rows[i])
            mean, variance = y.mean((2, 3), keepdim=True), y.var((2, 3), keepdim=True, correction=0)
            return scale * (y - mean) / (variance + 1e-3).sqrt() + shift

        def transposed(y, weight):
            """The gradient of ``same`` by its input, which is how TensorFlow defines it."""
            with torch.enable_grad():
                start = torch.zeros(len(y), weight.shape[2], 2 * y.shape[2], 2 * y.shape[3], requires_grad=True)
                return torch.autograd.grad(same(start, weight, 2), start, y)[0]

        for i, stride in ((0, 1), (1, 2), (2, 2)):
            y = norm(same(y, rows[i][0], stride), i).relu()
        for i in range(3, 13, 2):
            y = y + norm(same(norm(same(y, rows[i][0], 1), i).relu(), rows[i + 1][0], 1), i + 1)
        for i in (13, 14):
            y = norm(transposed(y, rows[i][0]), i).relu()
        return (150 * norm(same(y, rows[15][0], 1), 15).tanh() + 127.5) / 255
