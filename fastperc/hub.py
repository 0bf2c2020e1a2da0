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
        from huggingface_hub.utils import disable_progress_bars, logging
    except ImportError:
        raise InputError("hf:// and `fastperc push` need huggingface_hub; run `pip install 'fastperc[hub]'`") from None
    from fastperc.progress import console

    logging.set_verbosity_error()
    if not console.is_terminal:
        disable_progress_bars()
    return huggingface_hub


@contextmanager
def in_words(what: str) -> Iterator[None]:
    """Turns the exceptions of huggingface_hub in the block into an InputError of one line about ``what``.

    Errors of the disk stay as they are.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if (reason := _reason(error)) is None:
            raise
        raise InputError(f"{what}: {reason}") from None


def _reason(error: BaseException) -> str | None:
    """Why the hub could not be used, or None for an error of the disk.

    Of errors of the connection only the kind is named: their text can hold the token.
    """
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return f"its owner must grant you access; ask for it on its page, then {LOG_IN}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"no such repository, or a private one; check the name, or {LOG_IN}"
    if isinstance(error, errors.RevisionNotFoundError):
        return "the repository has no such revision"
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return "the repository has no such file"
    if isinstance(error, errors.HFValidationError):
        return "not a name that the hub allows"
    if isinstance(error, errors.HfHubHTTPError):
        return f"{endpoint()} answers {_answer(error)}"
    if isinstance(error, errors.FileMetadataError):
        return f"{endpoint()} does not answer as a hub does; check HF_ENDPOINT"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        return f"{_reason(error.__cause__)}; the cache does not hold it"
    if isinstance(error, ValueError):  # the hub finds the model card wrong
        return _without_token(str(error))
    if isinstance(error, OSError) and error.errno is not None:
        return None
    return f"{endpoint()} cannot be reached ({type(error).__name__})"


def _answer(error: Any) -> str:
    """The status of the hub's answer, the hub's own words, and what to do."""
    status, text = error.response.status_code, _without_token(error.server_message or "")
    hint = f"; {LOG_IN}" if status in (401, 403) else ""
    return f"{status}{f' ({text})' if text else ''}{hint}"


def _without_token(text: str) -> str:
    """``text`` in one line, without the token, should the hub have repeated it."""
    from huggingface_hub import get_token

    token = get_token()
    return " ".join((text.replace(token, "…") if token else text).split())


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
