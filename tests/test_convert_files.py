"""The readers of Torch7's files and of TensorFlow's checkpoints, on good, damaged and hostile files."""

from __future__ import annotations

import random
import struct
import time

import pytest
import torch
from damage import LONGEST, SECONDS, SEED, damaged
from style_nets import DECONVS, EXAMPLE, EXAMPLE_NORMS, PyTorchNet
from tensorflow_files import Lengstrom, bundle, field, shape_message, single, snappy, table, varint
from torch7_files import Johnson, Nn, Writer, saved

from fastperc import InputError, conversion
from fastperc.conversion import tensorflow, torch7
from fastperc.conversion.common import Refused

# Torch7


def test_numbers_texts_and_tables(tmp_path):
    value = {"a": 1.5, "b": True, "c": [1, 2, 3], "d": "text", "e": {2.5: False}, "f": None, "g": float("inf")}
    assert torch7.read(saved(value, tmp_path / "a.t7")) == {
        **value,
        "c": {1: 1, 2: 2, 3: 3},
    }


def test_tensors_share_their_storage(tmp_path):
    flat = torch.arange(24, dtype=torch.float64)
    value = {"flat": flat, "part": flat[4:16].view(3, 4), "turned": flat[:6].view(2, 3).t(), "long": torch.tensor([7])}
    read = torch7.read(saved(value, tmp_path / "a.t7"))
    for name, tensor in value.items():
        assert torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype, name
    assert read["part"].data_ptr() == read["flat"].data_ptr() + 32


def test_what_comes_again_is_the_same_object(tmp_path):
    inner, module = {"x": 1}, Nn("nn.ReLU")
    module.fields["itself"] = module
    read = torch7.read(saved({"a": inner, "b": inner, "c": module, "d": module}, tmp_path / "a.t7"))
    assert read["a"] is read["b"] and read["c"] is read["d"] and read["c"].fields["itself"] is read["c"]


def test_a_file_without_version_numbers(tmp_path):
    writer = Writer()
    writer.numbered(4, "the module")
    writer.text("nn.ReLU")  # where later files have "V 1" before
    writer.write({"inplace": True})
    (tmp_path / "a.t7").write_bytes(b"".join(writer.parts))
    assert torch7.read(tmp_path / "a.t7").name == "nn.ReLU"


def written(*items):
    """A file of packed numbers, given as (kinds, values…), and of texts."""
    writer = Writer()
    for item in items:
        writer.text(item) if isinstance(item, str) else writer.pack(*item)
    return b"".join(writer.parts)


STORAGE = (("ii", 4, 2), "V 1", "torch.FloatStorage", ("q", 4), ("4f", 1, 2, 3, 4))


def tensor_file(sizes, strides, offset, storage=STORAGE):
    n = len(sizes)
    head = (("ii", 4, 1), "V 1", "torch.FloatTensor", ("i", n), (f"{n}q", *sizes), (f"{n}q", *strides), ("q", offset))
    return written(*head, *storage)


HOSTILE = {
    "a function": (written(("iii", 6, 4, 4), "code"), "holds Lua functions"),
    "a function in a table": (written(("iiiid", 3, 1, 1, 1, 1.0), ("iii", 8, 2, 4)), "holds Lua functions"),
    "another class": (written(("ii", 4, 1), "V 1", "tds.Hash", ("i", 0)), "holds a tds.Hash, which is no part"),
    "a tensor of bits": (written(("ii", 4, 1), "V 1", "torch.BitTensor"), "holds a torch.BitTensor"),
    "an endless table": (written(("iii", 3, 1, 2**31 - 1)), "damaged or cut short"),
    "a long text": (written(("ii", 2, 2**31 - 1)), "damaged or cut short"),
    "a negative length": (written(("ii", 2, -1)), "damaged or cut short"),
    "a kind that is none": (written(("ii", 9, 1)), "damaged or cut short"),
    "a huge storage": (written(("ii", 4, 1), "V 1", "torch.FloatStorage", ("q", 1 << 60)), "damaged or cut short"),
    "a negative storage": (written(("ii", 4, 1), "V 1", "torch.FloatStorage", ("q", -8)), "damaged or cut short"),
    "beyond the storage": (tensor_file((5,), (1,), 1), "damaged or cut short"),
    "before the storage": (tensor_file((2,), (1,), 0), "damaged or cut short"),
    "a stride of none": (tensor_file((1 << 40,), (0,), 1), "damaged or cut short"),
    "a negative stride": (tensor_file((2,), (-1,), 2), "damaged or cut short"),
    "huge strides": (tensor_file((2, 2), (1 << 62, 1 << 62), 1), "damaged or cut short"),
    "too many dimensions": (written(("ii", 4, 1), "V 1", "torch.FloatTensor", ("i", 1 << 30)), "damaged or cut short"),
    "a storage that is a text": (tensor_file((1,), (1,), 1, (("i", 2), "text")), "damaged or cut short"),
    "nested": (written(*[("iii", 3, i, 1) for i in range(1, 5000)]), "nested too deeply"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_torch_files_that_are_refused(tmp_path, name):
    content, message = HOSTILE[name]
    (tmp_path / "a.t7").write_bytes(content)
    with pytest.raises(Refused, match=message):
        torch7.read(tmp_path / "a.t7")


def test_a_torch_file_in_text_form(refused, here):
    (here / "candy.t7").write_bytes(b"4\n1\n3\nV 1\n13\nnn.Sequential\n")
    refused("convert", "candy.t7", "-o", "out.pt2", says="torch.save('new.t7', torch.load('old.t7', 'ascii'))")


CHANGED = {
    "nn.Linear": (lambda modules: modules.insert(3, Nn("nn.Linear")), "has a layer nn.Linear, which fastperc"),
    "no weight": (lambda modules: modules[1].fields.pop("weight"), "its nn.SpatialConvolution has no tensor weight"),
    "no kernel": (lambda modules: modules[1].fields.pop("kW"), "of a geometry that makes no sense"),
    "wide": (lambda modules: modules[1].fields.update(nOutputPlane=5), "whose weight is not of its geometry"),
    "a huge stride": (lambda modules: modules[1].fields.update(dW=99, dH=99), "larger strides than fastperc converts"),
    "half a pixel": (lambda modules: modules[1].fields.update(padW=0.5), "has 0.5 as padW"),
    "other channels": (lambda modules: modules.pop(4), "whose layers do not fit together"),
    "old norms": (
        lambda modules: modules.__setitem__(2, Nn("nn.SpatialBatchNormalization", running_mean=torch.zeros(4))),
        "has a batch norm without running_var",
    ),
    "a number": (lambda modules: modules.insert(0, 3), "has a Sequential with something else than modules"),
    "not finite": (
        lambda modules: modules[1].fields.update(bias=torch.full((4,), float("nan"))),
        "has a bias with values that are not finite",
    ),
}


@pytest.mark.parametrize("name", CHANGED)
def test_torch_networks_that_are_refused(tmp_path, name):
    change, message = CHANGED[name]
    checkpoint = Johnson().checkpoint()
    change(checkpoint["model"].fields["modules"])
    with pytest.raises(InputError, match=message):
        conversion.read(saved(checkpoint, tmp_path / "candy.t7"))


def test_a_torch_file_without_a_network(tmp_path):
    with pytest.raises(InputError, match="holds no network: neither an nn module nor a table"):
        conversion.read(saved({"opt": {"arch": "c9"}}, tmp_path / "a.t7"))


# TensorFlow


@pytest.mark.parametrize("size", [0, 1, 59, 60, 61, 5000])
def test_snappy(size):
    generator = random.Random(size)
    for data in (bytes(size), generator.randbytes(size), (generator.randbytes(4) * size)[: 3 * size]):
        assert tensorflow._decompressed(snappy(data)) == data


def test_bundles_and_single_files(tmp_path):
    tensors = {f"scope/name_{i}": torch.randn(3, i) for i in range(1, 40)}
    single(tensors, tmp_path / "old.ckpt")
    single(tensors, tmp_path / "plain.ckpt", compress=False)
    tensors |= {"step": torch.tensor(7), "wide": torch.randn(2, dtype=torch.float64), "none": torch.empty(0, 3)}
    bundle(tensors, tmp_path / "new.ckpt")
    for path in (tmp_path / "new.ckpt.index", tmp_path / "old.ckpt", tmp_path / "plain.ckpt"):
        read = tensorflow.read(path)
        assert read.keys() >= {name for name in tensors if "/" in name}
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in read.items())
    assert read.keys() < tensorflow.read(tmp_path / "new.ckpt.index").keys() == tensors.keys()


def index_file(folder, **changes):
    """A bundle of one tensor of six numbers, with other numbers in its entry."""
    numbers = dict(dtype=1, shape=[2, 3], offset=0, size=24) | changes
    entry = field(1, numbers["dtype"]) + field(2, shape_message(numbers["shape"]))
    entry += field(4, numbers["offset"]) + field(5, numbers["size"])
    (folder / "a.index").write_bytes(table({b"": field(1, numbers.get("files", 1)), b"x": entry}))
    (folder / "a.data-00000-of-00001").write_bytes(bytes(24))
    return folder / "a.index"


ENTRIES = {
    "cut short": dict(offset=8),
    "another size": dict(size=20),
    "a huge shape": dict(shape=[1 << 62, 1 << 62], size=0),
    "far away": dict(offset=1 << 62),
    "many files": dict(files=10**6),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_bundles_that_are_refused(tmp_path, name):
    assert tensorflow.read(index_file(tmp_path))["x"].shape == (2, 3)
    with pytest.raises(Refused, match=r"damaged or cut short|is of 1000000 files"):
        tensorflow.read(index_file(tmp_path, **ENTRIES[name]))


def test_a_bundle_without_its_data(refused, here):
    index_file(here)
    (here / "a.data-00000-of-00001").unlink()
    refused("convert", "a.index", "-o", "out.pt2", says="a.data-00000-of-00001: no such file")


def test_a_bomb_of_snappy(tmp_path):
    bomb = varint(1 << 40) + b"\0a" + b"\xfe\1\0" * 1000
    with pytest.raises(ValueError):
        tensorflow._decompressed(bomb)
    with pytest.raises(ValueError):
        tensorflow._decompressed(varint(10) + b"\0a" + b"\xfe\1\0")  # longer than it says


def test_checkpoints_of_other_networks(tmp_path):
    bundle({"dense/kernel": torch.zeros(2)}, tmp_path / "a")
    with pytest.raises(InputError, match="that has the tensors Variable to Variable_47, this 0 of such names"):
        conversion.read(tmp_path / "a")
    tensors = Lengstrom().tensors() | {"Variable_3": torch.zeros(3, 3, 9, 8)}
    bundle(tensors, tmp_path / "b")
    with pytest.raises(InputError, match="whose layers do not fit together"):
        conversion.read(tmp_path / "b")
    bundle(Lengstrom().tensors() | {"Variable_5": torch.zeros(9)}, tmp_path / "c")
    with pytest.raises(InputError, match=r"has a weight of \[9\] where \[8\] belongs"):
        conversion.read(tmp_path / "c")


def test_folders(refused, here):
    refused("convert", ".", "-o", "out.pt2", says=".: holds 0 TensorFlow checkpoints (.index); name one file")
    for name in ("a", "b"):
        bundle(Lengstrom().tensors(), here / name)
    refused("convert", ".", "-o", "out.pt2", says=".: holds 2 TensorFlow checkpoints (.index); name one file")


# Any damage


@pytest.mark.parametrize("kind", ["torch", "bundle", "single", "state_dict"])
def test_damaged_files_are_refused_or_read(tmp_path, kind):
    """For some seconds, files with random damage. Nothing but an ``InputError`` comes of it, quickly."""
    path = tmp_path / "in"
    if kind == "torch":
        saved(Johnson(width=1).checkpoint(), path)
    elif kind == "state_dict":
        torch.save(PyTorchNet(1).state([*EXAMPLE, *DECONVS], EXAMPLE_NORMS), path)
    elif kind == "single":
        single(Lengstrom(1).tensors(), path)
    else:
        bundle(Lengstrom(1).tensors(), path)
        path = tmp_path / "in.index"
    content, generator, end = path.read_bytes(), random.Random(SEED), time.monotonic() + SECONDS
    while time.monotonic() < end:
        path.write_bytes(damaged(content, generator))
        start = time.monotonic()
        try:
            conversion.read(path)
        except InputError as error:
            assert "\n" not in str(error)
        assert time.monotonic() - start < LONGEST


def test_files_cut_short(tmp_path):
    content = saved(Johnson(width=1).checkpoint(), tmp_path / "a.t7").read_bytes()
    for length in [*range(8, 400, 7), *range(400, len(content), len(content) // 50)]:
        (tmp_path / "b.t7").write_bytes(content[:length])
        with pytest.raises(InputError, match="damaged or cut short"):
            conversion.read(tmp_path / "b.t7")


def test_numbers_in_footers(tmp_path):
    magic = struct.pack("<Q", 0xDB4775248B80FB57)
    for footer in (b"", bytes(40), b"\xff" * 40, varint(1 << 60) * 4 + bytes(4)):
        (tmp_path / "a").write_bytes(footer + magic)
        with pytest.raises(InputError, match="damaged or cut short"):
            conversion.read(tmp_path / "a")
