"""Networks that somebody exported: archives of TorchScript, and of ``torch.export`` (``.pt2``).

PyTorch opens a ``.pt2`` archive by reading pickles in it, evaluating text in it, and loading libraries in it. So an
archive is not opened as it lies on disk. What a network needs is checked and copied to a new archive in memory, without
anything that Python would run, and PyTorch opens that.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastperc.errors import InputError
from fastperc.files import MAX_EXPANDED, PathLike, check_readable

Records = dict[str, bytes]  # the files in an archive, without the folder that they all lie in
WRITTEN_ANEW = ("version", ".data/version", ".data/serialization_id", "byteorder")
GRAPH = "models/model.json"  # of the network "model", the name that torch.export.save gives it
COPIED = (  # of a .pt2 archive
    *("archive_format", "archive_version", GRAPH, "data/sample_inputs/model.pt"),
    *("data/weights/model_weights_config.json", "data/constants/model_constants_config.json"),
)
TENSOR_NAME = re.compile(r"(weight|tensor)_\d+")

# What the graph of a .pt2 archive may call.
OPERATOR = re.compile(
    r"torch\.ops\.aten\.(?!from_file\b)\w+\.\w+"
    r"|_operator\.(add|sub|mul|truediv|floordiv|mod|pow|neg|pos|getitem|eq|ne|lt|le|gt|ge|and_|or_|not_)"
    r"|math\.(ceil|floor|trunc|sqrt)|torch\.sym_(int|float|max|min|not|ite|sum)"
)
TEXT = re.compile(r"[\w.,:<>*+ -]{0,500}")  # any other text in it: no bracket, quote or new line that would make code
MAX_EXPRESSION = 4000  # characters
FUNCTIONS = {  # in the formulas of sizes
    *("Integer", "Float", "Rational", "Add", "Mul", "Max", "Min", "Abs", "Mod", "PythonMod", "FloorDiv", "CeilDiv"),
    *("CleanDiv", "ModularIndexing", "Eq", "Ne", "Lt", "Le", "Gt", "Ge", "And", "Or", "Not", "Identity"),
    *("Equality", "Unequality", "LessThan", "GreaterThan", "StrictLessThan", "StrictGreaterThan"),
    *("IntTrueDiv", "FloatTrueDiv", "ToFloat", "TruncToInt", "FloorToInt", "CeilToInt", "RoundToInt"),
}
SIGNS = (  # in the formulas of sizes
    *(ast.UnaryOp, ast.USub, ast.Not, ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod),
    *(ast.Compare, ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.BoolOp, ast.And, ast.Or),
)
# Words in TorchScript's code for operators that read or write files, or talk to other processes.
REFUSED_WORDS = re.compile(r"\b(save|from_file|load_tensor|rpc|_?c10d\w*|symm_mem)\b|\btorch\s*\.\s*classes\b")


class Archive(NamedTuple):
    """A network in an archive: any number of inputs and outputs, until it is tried."""

    path: Path
    call: Callable[[Tensor], Any]
    dtype: torch.dtype  # of the images that it takes
    device: torch.device
    shape: tuple[int | None, ...]  # of its first input as exported, None where it may vary; empty if not known


def kind_of(path: PathLike) -> str | None:
    """``"TorchScript"`` or ``"torch.export"`` by the content of a file, or ``None`` if it is no such archive.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        with zipfile.ZipFile(check_readable(path)) as archive:
            names = {name.partition("/")[2] for name in archive.namelist()}
    except InputError:
        raise
    except Exception:  # whatever zipfile raises for damaged files
        return None
    if "archive_format" in names or "serialized_exported_program.json" in names:
        return "torch.export"
    return "TorchScript" if "constants.pkl" in names and any(name.startswith("code/") for name in names) else None


def load(path: PathLike, device: torch.device) -> Archive:
    """Opens an archive of TorchScript or of ``torch.export``, for inference on ``device``.

    Raises:
        InputError: it is another file, is damaged or cut short, was written by a version of PyTorch that this one
            cannot read, or holds what could run somebody's code.
    """
    kind, path = kind_of(path), Path(path)
    if kind is None:
        raise InputError(f"{path}: neither an archive of TorchScript nor of torch.export, or cut short")
    records = read(path)
    prepare, opened = (_script, _open_script) if kind == "TorchScript" else (_export, _open_export)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch's plans for its own formats
            return Archive(path, *opened(written(prepare(records)), device))
    except Refused as refusal:
        raise InputError(f"{path}: {refusal}") from None
    except Exception as error:  # a damaged archive can raise anything in json, zipfile and torch
        raise InputError(
            f"{path}: damaged, or written by a PyTorch that {torch.__version__} cannot read ({first_line(error)})"
        ) from None


class Refused(Exception):
    """Why an archive is not opened."""


def read(path: Path) -> Records:
    """The files in an archive.

    Raises:
        InputError: it is damaged, holds two files of one name, or its content is far larger than the file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if sum(entry.file_size for entry in entries) > max(MAX_EXPANDED, 4 * path.stat().st_size):
                raise InputError(f"{path}: its content is far larger than the file")
            records = {entry.filename.partition("/")[2]: archive.read(entry) for entry in entries}
    except InputError:
        raise
    except Exception:  # zipfile and zlib raise many kinds
        raise InputError(f"{path}: damaged or cut short") from None
    if len(records) != len(entries):
        raise InputError(f"{path}: holds two files of the same name")
    return records


def written(records: Records) -> BytesIO:
    """``records`` as a new archive."""
    content = BytesIO()
    writer = torch._C.PyTorchFileWriter(content)
    for name, data in records.items():
        if name not in WRITTEN_ANEW:
            writer.write_record(name, data, len(data))
    writer.write_end_of_file()
    content.seek(0)
    return content


def first_line(error: BaseException) -> str:
    """What went wrong, in one line: TorchScript's messages end with it, those of Python begin with it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return (lines[-1] if "TorchScript" in str(error) else lines[0])[:200]


# TorchScript


def _script(records: Records) -> Records:
    """The records to open, if no code in them touches files or other processes. PyTorch reads its pickles in C++."""
    for name, data in records.items():
        if name.startswith("code/") and name.endswith(".py") and (word := REFUSED_WORDS.search(data.decode())):
            raise Refused(f"its code names {word[0]!r}, which a network does not need, so it is not opened")
    return records


def _open_script(content: BytesIO, device: torch.device) -> tuple[Any, ...]:
    module = torch.jit.load(content, map_location=device).eval()
    return module, _dtype_of(module), device, ()


def _dtype_of(module: torch.nn.Module) -> torch.dtype:
    tensors = (*module.parameters(), *module.buffers())
    return next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.float32)


# torch.export


def _export(records: Records) -> Records:
    """The records to open, with nothing in them that Python would run."""
    if "serialized_exported_program.json" in records:
        raise Refused("written by torch.export before PyTorch 2.8; export the network again")
    if GRAPH not in records:
        raise Refused("holds no network by the name of 'model', as torch.export.save writes it")
    for kind in ("weights", "constants"):
        _check_tensors(kind, json.loads(records[f"data/{kind}/model_{kind}_config.json"]))
    copied = {name: records[name] for name in COPIED}
    copied |= {name: data for name, data in records.items() if _is_tensor(name)}
    torch.load(BytesIO(copied["data/sample_inputs/model.pt"]), weights_only=True)  # raises if it is more than tensors
    graph = json.loads(copied[GRAPH])
    graph["guards_code"] = []  # text that would be evaluated; the sizes that it checks stand in the graph too
    _check_graph(graph)
    copied[GRAPH] = json.dumps(graph).encode()
    return copied


def _is_tensor(name: str) -> bool:
    folder, _, file = name.rpartition("/")
    return folder in ("data/weights", "data/constants") and TENSOR_NAME.fullmatch(file) is not None


def _check_tensors(kind: str, config: Any) -> None:
    """Raises unless all weights or constants are stored as bare numbers."""
    for name, tensor in config["config"].items():
        if tensor["use_pickle"] or not TENSOR_NAME.fullmatch(tensor["path_name"]) or not TEXT.fullmatch(name):
            raise Refused(f"{name[:80]!r} of its {kind} is a pickle, which could run somebody's code")


def _check_graph(graph: Any) -> None:
    """Raises unless a graph calls PyTorch's operators alone, and its text is names; drops what describes its nodes."""
    for key, value in _items(graph):
        if key == "target" and not OPERATOR.fullmatch(value):
            raise Refused(f"calls {value[:80]!r}; only PyTorch's own operators are run")
        if key == "expr_str":
            _check_formula(value)
        elif key in ("in_spec", "out_spec") or (key == "context" and isinstance(value, str)):
            _check_graph(json.loads(value))
        elif isinstance(value, str) and not TEXT.fullmatch(value):
            raise Refused(f"holds {value[:80]!r}, which could be code")


def _items(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """All strings in JSON, each with the key that it stands under, and the keys themselves. Empties ``metadata``."""
    if isinstance(value, dict):
        if isinstance(value.get("metadata"), dict):
            value["metadata"] = {}
        if "__enum__" in value:
            raise Refused("names a Python class, which would be imported")
        for name, item in value.items():
            yield "", name
            yield from _items(item, name)
    elif isinstance(value, list):
        for item in value:
            yield from _items(item, key)
    elif isinstance(value, str):
        yield key, value


def _check_formula(text: str) -> None:
    """Raises unless ``text``, which PyTorch evaluates, is a formula of sizes and nothing else."""
    try:
        tree = ast.parse(text, mode="eval") if len(text) <= MAX_EXPRESSION else None
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        tree = None
    if tree is None or not _is_formula(tree.body):
        raise Refused(f"holds the size {text[:80]!r}, which is not a formula that torch.export writes")


def _is_formula(node: ast.AST) -> bool:
    """Whether ``node`` is a number, a symbol, or a known function of such; powers have small exponents."""
    if isinstance(node, (ast.operator, ast.unaryop, ast.cmpop, ast.boolop)):
        return isinstance(node, SIGNS)
    if isinstance(node, ast.Constant):
        return isinstance(node.value, (bool, int, float)) and abs(node.value) < 2**63
    if isinstance(node, ast.Name):
        return re.fullmatch(r"[a-z]\d+|true|false|oo|int_oo", node.id) is not None
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        name, keywords = node.func.id, node.keywords
        if name == "Symbol":
            flags = all(isinstance(keyword.value, ast.Constant) and keyword.value.value is True for keyword in keywords)
            (symbol,) = node.args
            return flags and isinstance(symbol, ast.Constant) and re.fullmatch(r"\w+", str(symbol.value)) is not None
        if name == "Pow":
            base, exponent = node.args
            return _is_formula(base) and ast.unparse(exponent) in (
                "2",
                "3",
                "-1",
                *map("Integer({})".format, (2, 3, -1)),
            )
        return name in FUNCTIONS and not keywords and all(map(_is_formula, node.args))
    return isinstance(node, SIGNS) and all(map(_is_formula, ast.iter_child_nodes(node)))


def _open_export(content: BytesIO, device: torch.device) -> tuple[Any, ...]:
    from torch.export.passes import move_to_device_pass

    program = torch.export.load(content)
    if device.type != "cpu":
        program = move_to_device_pass(program, str(device))
    inputs = [node for node in program.graph.nodes if node.name in program.graph_signature.user_inputs]
    if len(inputs) != 1 or not isinstance(inputs[0].meta.get("val"), Tensor):
        raise Refused(f"takes {len(inputs)} inputs, not one image")
    image = inputs[0].meta["val"]
    shape = tuple(size if isinstance(size, int) else None for size in image.shape)
    return program.module(), image.dtype, device, shape
