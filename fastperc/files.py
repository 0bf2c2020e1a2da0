"""Files: checks before reading and writing, atomic writes, tensors from several formats, and the cache folder."""

from __future__ import annotations

import json
import os
import pickle
import secrets
import stat
import sys
import tempfile
import unicodedata
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from fastperc.errors import InputError


class NotOnlyTensors(InputError):
    """A pickle that holds more than tensors."""


PathLike = str | os.PathLike[str]
Made = TypeVar("Made")
MAX_EXPANDED = 1 << 30  # bytes of a compressed file's content that are read without asking how large the file is


def check_readable(path: PathLike) -> Path:
    """Checks that ``path`` is an ordinary file that can be opened, and returns it as a ``Path``.

    Raises:
        InputError: it is missing, a folder or a device, or cannot be read.
    """
    path = Path(path)
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would block
            raise InputError(f"{path}: is a folder or a device; give an ordinary file")
        with path.open("rb"):
            return path
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def check_writable(path: PathLike) -> Path:
    """Checks that a file can be written at ``path``, and returns it as a ``Path``. Leaves nothing behind.

    Raises:
        InputError: it is a folder or a device, or the system allows no file there.
    """
    path = Path(path)
    target = Path(os.path.realpath(path))
    try:
        with suppress(FileNotFoundError):
            if not stat.S_ISREG(target.stat().st_mode):
                raise InputError(f"{path}: is a folder or a device; give a file name")
        missing = [folder for folder in target.parents if not os.path.lexists(folder)]
        try:
            probe = _temporary_path(target)
            os.close(create(probe))
            probe.unlink()
        finally:
            for folder in missing:
                with suppress(OSError):  # mkdir failed before it, or another process uses it by now
                    folder.rmdir()
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from None
    return path


def file_key(path: PathLike) -> tuple[object, ...]:
    """What tells a file, which may not exist yet, from all others: equal for two paths that lead to one file.

    Links are followed, and upper and lower case are one where the file system takes them for one.
    """
    with suppress(OSError):
        status = os.stat(path)
        return status.st_dev, status.st_ino
    target = Path(os.path.realpath(path))
    folder = next((parent for parent in target.parents if os.path.isdir(parent)), target.parent)
    name = str(target.relative_to(folder))
    if _ignores_case(folder):
        name = unicodedata.normalize("NFC", name).casefold()
    return (*file_key(folder), name) if os.path.exists(folder) else (str(target),)


@lru_cache
def _ignores_case(folder: Path) -> bool:
    """Whether names in ``folder`` that differ in case alone are one file, as far as an existing name tells."""
    with suppress(OSError):
        names = set(os.listdir(folder))
        for name in (*names, f"../{folder.name}"):
            swapped = name.swapcase()
            if swapped != name:
                return swapped not in names and os.path.exists(folder / swapped)
    return False


def check_overwrites(outputs: Iterable[PathLike], inputs: Iterable[PathLike]) -> None:
    """Checks that no output is a file that is read. Sees through links and differences in case.

    Raises:
        InputError: one is.
    """
    read = {file_key(path): path for path in inputs}
    for path in outputs:
        if (key := file_key(path)) in read:
            raise InputError(f"{path}: would overwrite an input ({read[key]}); name another output")


def check_distinct(outputs: Iterable[PathLike]) -> None:
    """Checks that no two outputs are one file, and none the folder of another. Sees through links and differing case.

    Raises:
        InputError: two are.
    """
    names: dict[tuple[object, ...], PathLike] = {}
    folders: dict[Path, PathLike] = {}
    for path in outputs:
        if (key := file_key(path)) in names:
            raise InputError(f"{path}: is the same file as {names[key]}; give each output its own name")
        names[key] = path
        folder = Path(os.path.realpath(path)).parent
        if folder not in folders:
            folders |= dict.fromkeys((folder, *folder.parents), path)
    for path in names.values():
        if (inside := folders.get(Path(os.path.realpath(path)))) is not None:
            raise InputError(f"{path}: is the folder of {inside}; give each output its own name")


@contextmanager
def write_atomically(path: PathLike) -> Iterator[Path]:
    """Yields a temporary path in the folder of ``path``, and renames that file to ``path`` when the block ends.

    If the block raises, the temporary file is removed and ``path`` stays as it was. Creates missing folders and follows
    a link.

    Raises:
        OSError: the system's error, with ``path`` as its file name.
    """
    target = Path(os.path.realpath(path))
    temporary = _temporary_path(target)
    try:
        os.close(create(temporary))
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:  # it may name the temporary file, or none
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None
    finally:
        with suppress(OSError):
            temporary.unlink()


def create(path: Path) -> int:
    """Opens the file ``path`` to read and write, and returns its descriptor.

    Creates it where it is missing, and the folders it needs, which other processes may remove while they are empty.

    Raises:
        OSError: the system allows no file there.
    """
    return _despite_others(lambda: _create(path))


def make_folder(path: Path) -> None:
    """Creates the folder ``path`` where it is missing, and those above it, which other processes may remove meanwhile.

    Raises:
        OSError: the system allows no folder there.
    """
    _despite_others(lambda: path.mkdir(parents=True, exist_ok=True))


def _create(path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)


def _despite_others(attempt: Callable[[], Made], attempts: int = 100) -> Made:
    """What ``attempt`` returns, which fails where another process removes or creates a folder between its two steps."""
    while True:
        try:
            return attempt()
        except (FileNotFoundError, FileExistsError):  # mkdir raises the second where the folder went after it was met
            attempts -= 1
            if not attempts:
                raise


def _temporary_path(path: Path) -> Path:
    # The suffix stays last because writers choose the format by it. The stem is cut so that the name is never too long.
    return path.with_name(f".{path.stem[:40]}.{secrets.token_hex(4)}{path.suffix}")


def read_tensors(path: PathLike) -> tuple[dict[str, Any], dict[str, str]]:
    """Reads a ``.safetensors``, ``.npz`` or PyTorch file: its tensors by name, on the CPU, and its metadata.

    The content decides the format, not the file name. A pickle that holds more than tensors is refused, not executed.

    Raises:
        InputError: the file is missing or damaged, or has another format.
    """
    path = check_readable(path)
    try:
        with path.open("rb") as file:
            head = file.read(9)
        if head[8:] == b"{":
            return _read_safetensors(path)
        return _read_npz(path) if _is_npz(path) else _read_pickle(path), {}
    except InputError:
        raise
    except Exception:  # a damaged file can raise anything in zipfile, zlib, numpy, safetensors or torch
        raise InputError(f"{path}: not a file of tensors (.safetensors, .npz or PyTorch), or damaged") from None


class Header(NamedTuple):
    """What a ``.safetensors`` file says of itself."""

    shapes: dict[str, list[int]]  # of its tensors, by name
    metadata: dict[str, str]


def read_safetensors_header(path: PathLike) -> Header:
    """Reads the header of a ``.safetensors`` file alone, without PyTorch, which takes long to import.

    Raises:
        InputError: the file is missing, damaged, or has another format.
    """
    path = check_readable(path)
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= path.stat().st_size - 8:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(file.read(length))
        metadata = {str(name): str(text) for name, text in header.pop("__metadata__", {}).items()}
        return Header({name: [int(side) for side in entry["shape"]] for name, entry in header.items()}, metadata)
    except OSError:
        raise
    except Exception:  # a damaged header can be anything
        raise InputError(f"{path}: not a .safetensors file, or damaged") from None


def write_tensors(path: PathLike, tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """Writes a ``.safetensors`` file atomically.

    Raises:
        OSError: the system refuses to write it.
    """
    from safetensors.torch import save

    content = save({name: tensor.contiguous() for name, tensor in tensors.items()}, dict(metadata))
    with write_atomically(path) as temporary:
        temporary.write_bytes(content)  # safetensors' save_file gives a file that only its owner can read


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with _utf8_name(path) as name, safe_open(name, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except SafetensorError as error:
        raise InputError(f"{path}: damaged or cut short ({error})") from None


@contextmanager
def _utf8_name(path: Path) -> Iterator[Path]:
    """A name of the file at ``path`` that is UTF-8, as safetensors needs it: its own, or that of a temporary link."""
    try:
        os.fspath(path).encode()
        yield path
    except UnicodeEncodeError:
        with tempfile.TemporaryDirectory() as folder:
            link = Path(folder, "link")
            link.symlink_to(path.absolute())
            yield link


def _is_npz(path: Path) -> bool:
    """Whether the file is an archive of NumPy arrays.

    Raises:
        InputError: it is an archive whose content would take far more memory than the file.
    """
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > max(MAX_EXPANDED, 4 * path.stat().st_size):
            raise InputError(f"{path}: its content is far larger than the file; save it without compression")
        return all(name.endswith(".npy") for name in archive.namelist())


def _read_npz(path: Path) -> dict[str, Any]:
    import numpy as np
    import torch

    with np.load(path, allow_pickle=False) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def _read_pickle(path: Path) -> dict[str, Any]:
    import torch

    try:
        with path.open("rb") as file, warnings.catch_warnings():  # torch.load judges a path by its suffix
            warnings.simplefilter("ignore")  # about the pickle protocol: the file is read or refused anyway
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "global" not in str(error).lower():  # the pickle imports a name, which plain data never does
            raise
        raise NotOnlyTensors(
            f"{path}: holds more than tensors, so opening it could run somebody's code; "
            "save its state_dict() alone and use that"
        ) from None
    # Training scripts wrap the state_dict in a dict of their own.
    for wrapper in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not content or not all(map(torch.is_tensor, content.values())):
        raise InputError(f"{path}: holds no state_dict (a dict of names and tensors)")
    stored = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in content.values()}
    if sum(tensor.nbytes for tensor in content.values()) > 2 * sum(stored.values()):
        raise InputError(f"{path}: its tensors are larger than what the file holds")
    return {str(name): tensor for name, tensor in content.items()}


def cache_folder() -> Path:
    """The cache folder: ``$XDG_CACHE_HOME/fastperc``, or ``fastperc`` in the system's usual cache folder."""
    if os.environ.get("XDG_CACHE_HOME"):
        base = Path(os.environ["XDG_CACHE_HOME"])
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        base = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    return base / "fastperc"
