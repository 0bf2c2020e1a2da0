"""What the files of a run hold. A run resumes with the same contents, wherever they lie."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from torch import nn

from fastperc.errors import InputError
from fastperc.files import PathLike
from fastperc.models import VGG16Features

DIGITS = 16  # hexadecimal, of a SHA-256


def contents_of(style: PathLike | None, loss: object, folder: PathLike, photos: Iterable[Path]) -> dict[str, str]:
    """What a run is trained on, as texts that are equal if the contents are.

    Args:
        style: the file of the painting, if there is one.
        loss: the loss; a VGG-16 in it counts by its weights, not by the file that they came from.
        folder, photos: the photos in a folder. Their names in it and their sizes count, not their pixels.

    Raises:
        OSError: the painting cannot be read.
    """
    contents = {}
    if style is not None:
        contents["the painting"] = hashlib.sha256(Path(style).read_bytes()).hexdigest()[:DIGITS]
    for module in loss.modules() if isinstance(loss, nn.Module) else ():
        if isinstance(module, VGG16Features):
            contents["VGG-16's weights"] = _hash_of_vgg(module)
    contents["the photos"] = _summary_of_photos(folder, photos)
    return contents


def check_same_contents(saved: Mapping[str, str], given: Mapping[str, str], checkpoint: Path) -> None:
    """Checks that ``given``, of :func:`contents_of`, is what the run in ``checkpoint`` was trained on.

    Raises:
        InputError: something differs; the message lists it.
    """
    shared = [name for name in given if name in saved]
    differences = [f"{name} ({saved[name]} then, {given[name]} now)" for name in shared if saved[name] != given[name]]
    if differences:
        raise InputError(f"{checkpoint}: was trained on other contents: {'; '.join(differences)}")


def _hash_of_vgg(features: VGG16Features) -> str:
    digest = hashlib.sha256()
    for tensor in (features.mean, features.std, *features.convs.parameters()):
        digest.update(tensor.detach().float().contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()[:DIGITS]


def _summary_of_photos(folder: PathLike, photos: Iterable[Path]) -> str:
    digest, count, total = hashlib.sha256(), 0, 0
    for path in photos:
        size = 0
        with suppress(OSError):  # a file that is gone counts as unreadable later
            size = path.stat().st_size
        digest.update(os.fsencode(path.relative_to(folder).as_posix()) + f"\0{size}\n".encode())
        count, total = count + 1, total + size
    return f"{count} photos, {total:,} bytes, {digest.hexdigest()[:DIGITS]}"
