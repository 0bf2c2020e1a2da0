"""What a run leaves in its folder, and the lock that keeps a second run out of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fastperc.errors import InputError
from fastperc.files import create, make_folder

CHECKPOINT = "checkpoint.safetensors"  # the network and the optimizer: what --resume reads
MODEL = "model.safetensors"  # the network alone: what the other commands read
LOSSES = "losses.csv"  # one row for each iteration
PREVIEWS = "previews"
LOCK = ".lock"
FIGURE = "figure2.png"  # of the two runs in RESIDUAL and another folder
RESIDUAL = "residual"


def is_output(image: Path) -> bool:
    """Whether ``image`` is a preview of a run, or the figure of ``fastperc figure2``: no photo to train on."""
    folder = image.parent
    if folder.name == PREVIEWS:
        return any((folder.parent / name).exists() for name in (CHECKPOINT, MODEL, LOSSES))
    return image.name == FIGURE and (folder / RESIDUAL / CHECKPOINT).exists()


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keeps other runs out of the folder ``out`` while the block runs; creates the folder.

    The system takes the lock from a process that dies. Where it has no locks, such as on Windows, nothing is locked.
    Folders that are still empty are removed again.

    Raises:
        InputError: another process runs there.
    """
    missing = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        make_folder(out)
        file = _lock(out / LOCK)
        try:
            yield
        finally:
            if file is not None:
                with suppress(OSError):
                    (out / LOCK).unlink()  # before it is closed, which frees the lock
                os.close(file)
    finally:
        for folder in missing:
            with suppress(OSError):  # it is not empty
                folder.rmdir()


def _lock(path: Path) -> int | None:
    """Locks the file ``path`` and returns its descriptor; None where the system cannot lock it."""
    try:
        import fcntl
    except ImportError:
        return None
    while True:
        file = create(path)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file), path.stat()):
                    return file
        except (BlockingIOError, PermissionError):
            os.close(file)
            raise InputError(
                f"{path.parent}: another run is training here; wait for it, or name another folder"
            ) from None
        except OSError:  # a file system without locks
            os.close(file)
            path.unlink(missing_ok=True)
            return None
        os.close(file)  # the run before has removed this file in the meantime: lock its successor
