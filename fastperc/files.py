"""Reading tensors from files that may be anything, and writing files that are whole or not there."""

from __future__ import annotations

import os
import pickle
import secrets
import stat
import sys
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fastperc.errors import InputError

PathLike = str | os.PathLike[str]


def check_readable(path: PathLike) -> Path:
    """``path`` as a ``Path``, once it is known to be a file that can be opened."""
    path = Path(path)
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for somebody to write to it
            raise InputError(f"{path}: is a folder or a device, an ordinary file is needed")
        with path.open("rb"):
            return path
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def check_writable(path: PathLike) -> Path:
    """``path`` as a ``Path``, once it is known that a file can be written there; leaves nothing behind.

    Raises:
        InputError: it is a folder or a device, or no file can be made there.
    """
    path = Path(path)
    target = Path(os.path.realpath(path))
    try:
        with suppress(FileNotFoundError):
            if not stat.S_ISREG(target.stat().st_mode):
                raise InputError(f"{path}: is a folder or a device, a file name is needed")
        made = [folder for folder in target.parents if not os.path.lexists(folder)]
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            probe = _beside(target)
            probe.touch()
            probe.unlink()
        finally:
            for folder in made:
                with suppress(OSError):  # not made after all, or in use by now
                    folder.rmdir()
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from None
    return path


@contextmanager
def write_atomically(path: PathLike) -> Iterator[Path]:
    """Yields a temporary path beside ``path``, which becomes ``path`` when the block ends well and vanishes if not.

    Folders are made as needed, and a link is followed.

    Raises:
        OSError: whatever the system refused, with ``path`` as the file's name.
    """
    target = Path(os.path.realpath(path))
    temporary = _beside(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:  # which may name the temporary file, or none
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None
    finally:
        with suppress(OSError):
            temporary.unlink()


def _beside(path: Path) -> Path:
    # The suffix stays last, writers choose the format by it; the stem is cut, or a long name would become too long.
    return path.with_name(f".{path.stem[:40]}.{secrets.token_hex(4)}{path.suffix}")


def read_tensors(path: PathLike) -> tuple[dict[str, Any], dict[str, str]]:
    """The tensors of a ``.safetensors``, ``.npz`` or PyTorch file by name, on the CPU, and its metadata.

    Told apart by content, not by name. A pickle that holds more than tensors is refused, never executed.

    Raises:
        InputError: the file is missing, damaged, or none of these.
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
    except Exception:  # zipfile, zlib, numpy, safetensors and torch raise whatever the damage provokes
        raise InputError(f"{path}: not a file of tensors (.safetensors, .npz or PyTorch), or damaged") from None


def write_tensors(path: PathLike, tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """Writes a ``.safetensors`` file, whole or not at all."""
    from safetensors.torch import save

    content = save({name: tensor.contiguous() for name, tensor in tensors.items()}, dict(metadata))
    with write_atomically(path) as temporary:
        temporary.write_bytes(content)  # save_file would make a file that only its owner may read


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except SafetensorError as error:
        raise InputError(f"{path}: damaged or cut short ({error})") from None


def _is_npz(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return all(name.endswith(".npy") for name in archive.namelist())


def _read_npz(path: Path) -> dict[str, Any]:
    import numpy as np
    import torch

    with np.load(path, allow_pickle=False) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def _read_pickle(path: Path) -> dict[str, Any]:
    import torch

    try:
        with path.open("rb") as file, warnings.catch_warnings():  # a path would be judged by its suffix
            warnings.simplefilter("ignore")  # that a pickle is of another protocol: it will be read or refused
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "global" not in str(error).lower():  # a name to be imported and called, where plain data has none
            raise
        raise InputError(
            f"{path}: holds more than tensors, so opening it could run somebody's code; "
            f"save its state_dict() alone and use that"
        ) from None
    # Training scripts wrap the state_dict in a dict of their own.
    for wrapper in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not content or not all(map(torch.is_tensor, content.values())):
        raise InputError(f"{path}: holds no state_dict (a dict of names and tensors)")
    return {str(name): tensor for name, tensor in content.items()}


def cache_folder() -> Path:
    """The folder for what can be made again: ``$XDG_CACHE_HOME/fastperc``, or where the system keeps such things."""
    if os.environ.get("XDG_CACHE_HOME"):
        base = Path(os.environ["XDG_CACHE_HOME"])
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        base = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    return base / "fastperc"
