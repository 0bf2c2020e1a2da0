"""Networks on the Hugging Face Hub: addresses, downloads and uploads, by huggingface_hub."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from fastperc._version import __version__
from fastperc.errors import InputError

SCHEME, SUFFIX, CARD = "hf://", ".safetensors", "README.md"
DEFAULT_ENDPOINT = "https://huggingface.co"
LOG_IN = "log in by `hf auth login`, or set HF_TOKEN"
REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


class Address(NamedTuple):
    """A file on the hub, written ``hf://OWNER/NAME/FILE.safetensors`` or with ``@REVISION`` behind it."""

    repo: str  # OWNER/NAME
    file: str  # its path in the repository
    revision: str | None = None  # a branch, a tag or a commit

    def __str__(self) -> str:
        return f"{SCHEME}{self.repo}/{self.file}" + (f"@{self.revision}" if self.revision else "")

    @classmethod
    def parse(cls, text: str) -> Address:
        """The address that ``text`` writes.

        Raises:
            InputError: it is none, or the file is no ``.safetensors`` file.
        """
        place, at, revision = text.removeprefix(SCHEME).partition("@")
        owner, name, *folders = place.split("/") if place.count("/") > 1 else ("", "", "")
        repo, file = f"{owner}/{name}", "/".join(folders)
        if not REPO.fullmatch(repo) or {"", ".", ".."} & {*folders} or bool(at) != bool(revision):
            raise InputError(f"{text}: not an address like hf://owner/name/file{SUFFIX} or hf://…{SUFFIX}@revision")
        if not file.endswith(SUFFIX):
            raise InputError(f"{text}: only {SUFFIX} files are downloaded, because other formats can run code")
        return cls(repo, file, revision or None)

    def download(self) -> Path:
        """The local copy of the file, which is downloaded if the cache of huggingface_hub lacks it.

        ``HF_ENDPOINT``, ``HF_HUB_OFFLINE``, ``HF_HOME`` and ``HF_TOKEN`` are read from the environment.

        Raises:
            InputError: huggingface_hub is not installed, the hub cannot be reached, there is no such file or no
                access to it, or it is not in the safetensors format.
        """
        library = import_library()
        with in_words(str(self)):
            options = dict(endpoint=endpoint(), library_name="fastperc", library_version=__version__)
            path = Path(library.hf_hub_download(self.repo, self.file, revision=self.revision, **options))
        with path.open("rb") as file:
            if file.read(9)[8:] != b"{":
                raise InputError(f"{self}: not in the safetensors format, despite its name")
        return path


def endpoint() -> str:
    """The address of the hub: ``HF_ENDPOINT``, or huggingface.co."""
    return (os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")


def import_library() -> Any:
    """The module ``huggingface_hub``, which prints nothing but progress on a terminal.

    Raises:
        InputError: it is not installed.
    """
    try:
        import huggingface_hub
    except ImportError:
        raise InputError("hf:// and `fastperc push` need huggingface_hub; run `pip install 'fastperc[hub]'`") from None
    from fastperc.progress import console

    huggingface_hub.logging.set_verbosity_error()
    if not console.is_terminal:
        huggingface_hub.utils.disable_progress_bars()
    return huggingface_hub


@contextmanager
def in_words(what: str) -> Iterator[None]:
    """Turns the exceptions of huggingface_hub in the block into an InputError of one line about ``what``.

    Of errors of the connection only the kind is named: their text can hold the token.
    """
    from huggingface_hub import errors

    try:
        yield
    except InputError:
        raise
    except errors.GatedRepoError:
        raise InputError(f"{what}: its owner must grant you access; ask for it on its page, then {LOG_IN}") from None
    except errors.RepositoryNotFoundError:
        raise InputError(f"{what}: no such repository, or a private one; check the name, or {LOG_IN}") from None
    except errors.RevisionNotFoundError:
        raise InputError(f"{what}: the repository has no such revision") from None
    except errors.RemoteEntryNotFoundError:
        raise InputError(f"{what}: the repository has no such file") from None
    except errors.HFValidationError:
        raise InputError(f"{what}: not a name that the hub allows") from None
    except errors.HfHubHTTPError as error:
        raise InputError(f"{what}: {endpoint()} answers {_answer(error)}") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        reason = "HF_HUB_OFFLINE is set" if _is_offline() else f"{endpoint()} cannot be reached"
        raise InputError(f"{what}: {reason}, and the cache does not hold it") from None
    except OSError as error:
        if error.errno is None:
            raise InputError(f"{what}: {endpoint()} cannot be used ({type(error).__name__})") from None
        raise  # the disk is full, or the cache cannot be written
    except Exception as error:
        raise InputError(f"{what}: {endpoint()} cannot be reached ({type(error).__name__})") from None


def _answer(error: Any) -> str:
    """The status of the hub's answer, the hub's own words, and what to do."""
    from huggingface_hub import get_token

    status, text = error.response.status_code, " ".join((error.server_message or "").split())
    if token := get_token():
        text = text.replace(token, "…")
    hint = f"; {LOG_IN}" if status in (401, 403) else ""
    return f"{status}{f' ({text})' if text else ''}{hint}"


def _is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


class Upload(NamedTuple):
    """A file to write to the hub."""

    path: Path
    repo: str  # OWNER/NAME
    file: str  # its name in the repository
    card: str  # the README.md of a repository that has none
    private: bool = False  # a repository that is created


def check_repo(name: str) -> str:
    """Checks that ``name`` can be a repository, and returns it.

    Raises:
        InputError: it cannot.
    """
    if not REPO.fullmatch(name):
        raise InputError(f"{name}: not the name of a repository, which is OWNER/NAME")
    return name


def push(upload: Upload, say: Callable[[str], None]) -> str:
    """Writes a file to the hub, in one commit, and returns the address of the commit's page.

    Creates the repository if there is none. A file of the same name is replaced, and stays in the history. A README.md
    that is there stays as it is.

    Args:
        upload: what to write, and where.
        say: is given lines about what will be done, before anything is written.

    Raises:
        InputError: huggingface_hub is not installed, there is no token, the hub cannot be reached, or it refuses.
    """
    library = import_library()
    page = f"{endpoint()}/{upload.repo}"
    if library.get_token() is None:
        raise InputError(f"{page}: writing needs a token; {LOG_IN}")
    api = library.HfApi(endpoint=endpoint(), library_name="fastperc", library_version=__version__)
    with in_words(page):
        before = _repository(api, upload.repo)
        files = set() if before is None else {sibling.rfilename for sibling in before.siblings or ()}
        for line in _what_happens(upload, page, before, files):
            say(line)
        if before is None:
            # None: public, unless the organisation's repositories are private by default.
            api.create_repo(upload.repo, private=upload.private or None)
        additions = [library.CommitOperationAdd(upload.file, str(upload.path))]
        if CARD not in files:
            additions.append(library.CommitOperationAdd(CARD, upload.card.encode()))
        message, parent = f"Upload {upload.file} by fastperc {__version__}", before and before.sha
        return str(api.create_commit(upload.repo, additions, commit_message=message, parent_commit=parent).commit_url)


def _repository(api: Any, repo: str) -> Any:
    """What the hub says of a repository, or None if there is none that the token can see."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return api.model_info(repo)
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        return None


def _what_happens(upload: Upload, page: str, before: Any, files: set[str]) -> Iterator[str]:
    if before is None:
        yield f"creating {page}" + (", private" if upload.private else "")
    else:
        visibility = "private" if before.private else "public"
        yield f"writing to {page}, which is {visibility}" + ("; --private is for new ones" if upload.private else "")
    replaced = "; it replaces the file of that name, which stays in the history" if upload.file in files else ""
    yield f"uploading {upload.file} ({upload.path.stat().st_size / 1e6:.1f} MB){replaced}"
    yield f"keeping {CARD} as it is" if CARD in files else f"writing {CARD}"
