"""Networks as ``.onnx`` files and as archives of ``torch.export`` (``.pt2``), checked before they are kept."""

from __future__ import annotations

import copy
import io
import json
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from fastperc import archives
from fastperc._version import __version__
from fastperc.errors import InputError
from fastperc.exporting.network import Adapted, Images, exportable
from fastperc.files import PathLike, write_atomically
from fastperc.presets import MINIMUM_SIDE

OPSET = 18  # of ONNX: the first that PyTorch's exporter writes without converting
SUFFIXES = (".onnx", ".pt2")
LEVELS, HALF_LEVELS = 1.0, 3.0  # of 255: how far a picture may be from PyTorch's in float32, and in float16
MAX_SIDE = 1 << 15  # of an image whose size may vary
ANY = Images()  # float images of any size
LARGE = 1 << 18  # pixels of an image of which one is checked, not two
CHECKED = ((1, 64, 48), (2, 97, 130), (1, MINIMUM_SIDE, 33))  # images, height, width
NEEDED = "onnx", "onnxscript", "onnxruntime"
HINT = "pip install 'fastperc[onnx]'"


class Written(NamedTuple):
    """What was written and checked."""

    input: str  # the images that the network takes, and the pictures that it gives, in words
    output: str
    levels: float  # the largest difference from PyTorch, of 255 levels
    sizes: tuple[tuple[int, int, int], ...]  # images, height and width of each check


def report(path: Path, written: Written) -> list[str]:
    """What was written, in lines for the user."""
    onnx = path.suffix.lower() == ".onnx"
    kind = f"ONNX, opset {OPSET}" if onnx else f"an archive of torch.export, PyTorch {torch.__version__}"
    sizes = ", ".join(f"{count}×{width}×{height}" for count, height, width in written.sizes)
    return [
        f"wrote {path}: {kind}, {path.stat().st_size / 1e6:.1f} MB",
        f"  image    {written.input}",
        f"  picture  {written.output}",
        f"  checked  {'in ONNX Runtime ' if onnx else ''}against PyTorch on images of {sizes}: "
        f"at most {written.levels:.2g} levels of 255 apart",
    ]


def why_not_onnx() -> str | None:
    """Why no ``.onnx`` file can be written here, or None."""
    from importlib.util import find_spec

    missing = [name for name in NEEDED if find_spec(name) is None]
    return f"needs {' and '.join(missing)}: {HINT}" if missing else None


def check_format(path: PathLike) -> Path:
    """``path``, whose suffix names a format that can be written here.

    Raises:
        InputError: another suffix, or packages that ONNX needs are not installed.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"{path}: the name must end in {' or '.join(SUFFIXES)}, which chooses the format")
    if path.suffix.lower() == ".onnx" and (reason := why_not_onnx()):
        raise InputError(f"{path}: an .onnx file {reason}")
    return path


def write(net: nn.Module, path: PathLike, images: Images = ANY, properties: Mapping[str, str] | None = None) -> Written:
    """Writes ``net`` to ``path``, atomically, after a check against PyTorch at several sizes.

    Args:
        net: from RGB in 0–1 [N, 3, H, W] to the same, a whole number of times as large.
        path: of the file; its suffix, ``.onnx`` or ``.pt2``, is the format.
        images: the images that the file's network takes.
        properties: names and texts to store in the file, beside those of its input, its output and its dtype.

    Raises:
        InputError: another suffix, or packages that ONNX needs are not installed.
        RuntimeError: the file's network paints another picture than ``net``. Nothing is written.
        OSError: the system refuses to write the file.
    """
    path = check_format(path)
    suffix = path.suffix.lower()
    net = copy.deepcopy(net).to("cpu").eval()
    with torch.no_grad():
        scale = net(torch.rand(1, 3, 32, 32)).shape[-1] // 32
        described = images.described(), images.described(scale)
        properties = {
            "fastperc": __version__,
            **(properties or {}),
            "input": described[0],
            "output": described[1],
            "computes in": "float16, instance norms in float32" if images.half else "float32",
        }
        module = exportable(net, images)
        content = (_onnx if suffix == ".onnx" else _archive)(module, images, properties, scale)
        with write_atomically(path) as temporary:
            temporary.write_bytes(content)
            call = (_open_onnx if suffix == ".onnx" else _open_archive)(temporary)
            levels, sizes = _check(path, call, Adapted(net, images._replace(half=False)), images)
    return Written(*described, levels, sizes)


Call = Callable[[Tensor], Tensor]


def _onnx(module: nn.Module, images: Images, properties: Mapping[str, str], scale: int) -> bytes:
    """The bytes of an ``.onnx`` file."""
    import onnx

    with _quiet():
        program = torch.onnx.export(
            module,
            (images.example(),),
            dynamo=True,
            dynamic_shapes=(_dimensions(images),),
            opset_version=OPSET,
            verbose=False,
            input_names=["image"],
            output_names=["picture"],
        )
    assert program is not None
    model = program.model_proto
    _name_sizes(model.graph.output[0], images, scale)
    del model.metadata_props[:]
    for name, text in properties.items():
        model.metadata_props.add(key=name, value=text)
    model.producer_name, model.producer_version = "fastperc", __version__
    model.doc_string = f"{properties.get('name', 'a network')}: {properties['input']} to {properties['output']}"
    graph = model.graph
    for part in (graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        del part.metadata_props[:]  # PyTorch's notes, with the names of its source files
        part.doc_string = ""
    content = model.SerializeToString()
    onnx.checker.check_model(content, full_check=True)
    return content


def _open_onnx(path: Path) -> Call:
    """A function that runs the network of an ``.onnx`` file in ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"image": x.numpy()})[0])


def _archive(module: nn.Module, images: Images, properties: Mapping[str, str], scale: int) -> bytes:
    """The bytes of a ``.pt2`` archive."""
    content = io.BytesIO()
    with _quiet():
        program: ExportedProgram = torch.export.export(
            module, (images.example(),), dynamic_shapes=(_dimensions(images),)
        )
        torch.export.save(program, content, extra_files={"fastperc.json": json.dumps(dict(properties), indent=1)})
    return content.getvalue()


def _open_archive(path: Path) -> Call:
    """A function that runs the network of a ``.pt2`` archive."""
    return archives.load(path, torch.device("cpu")).call


def _dimensions(images: Images) -> dict[int, Any]:
    """The dimensions of the images that vary: how many, and their height and width unless ``size`` is fixed."""
    batch = Dim("N", min=1, max=1 << 16)
    if images.size:
        return {0: batch}
    first = 1 if images.kind == "uint8" else 2
    height, width = (Dim(name, min=MINIMUM_SIDE, max=MAX_SIDE) for name in ("H", "W"))
    return {0: batch, first: height, first + 1: width}


def _name_sizes(output: Any, images: Images, scale: int) -> None:
    """Names the sizes of an ONNX graph's output by those of its input."""
    times = f"{scale}*" if scale > 1 else ""
    height, width = images.size or (None, None)
    sides: list[Any] = [scale * height, scale * width] if height and width else [f"{times}H", f"{times}W"]
    sizes = ["N", *sides, 3] if images.kind == "uint8" else ["N", 3, *sides]
    for dimension, size in zip(output.type.tensor_type.shape.dim, sizes):
        if isinstance(size, int):
            dimension.dim_value = size
        else:
            dimension.dim_param = size


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps PyTorch's exporters from writing notes about themselves."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _check(
    path: Path, call: Call, expected: nn.Module, images: Images
) -> tuple[float, tuple[tuple[int, int, int], ...]]:
    """The largest difference between ``call`` and ``expected``, in levels, over images of several sizes."""
    sizes: tuple[tuple[int, int, int], ...] = CHECKED
    if images.size:
        counts = (1,) if math.prod(images.size) > LARGE else (1, 2)
        sizes = tuple((count, *images.size) for count in counts)
    allowed, largest = HALF_LEVELS if images.half else LEVELS, 0.0
    for seed, size in enumerate(sizes):
        x = images.example(*size, seed=seed)
        actual, wanted = call(x), expected(x)
        if actual.shape != wanted.shape:
            raise RuntimeError(f"{path}: gives {list(actual.shape)} for {list(x.shape)}, not {list(wanted.shape)}")
        top = 255 if images.kind == "uint8" else 1
        pictures = [picture.float().clamp(0, top) for picture in (actual, wanted)]  # NaN stays NaN
        difference = (pictures[0] - pictures[1]).abs().max().item() * 255 / top
        if not difference <= allowed:
            raise RuntimeError(
                f"{path}: its picture is {difference:.3g} levels of 255 away from PyTorch's, more than {allowed:g}; "
                "not written" + (" (try without --fp16)" if images.half else "")
            )
        largest = max(largest, difference)
    return largest, sizes
