"""What is said where a model on the Hub cannot be had: what went wrong, and what to do about it."""

from __future__ import annotations

import errno
import os
import re
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from executor.patience import BUSY
from moeplan.places import CheckpointError
from moeplan.untrusted_json import show


def refuse_address(reference: str) -> None:
    """Raises CheckpointError where a model is called by the address of its page, with the name that it has."""
    scheme, is_address, rest = reference.partition("://")
    if is_address:
        _, *path = re.split("[?#]", rest)[0].strip("/").split("/")
        name = "/".join(path[:2]) if scheme in ("http", "https") else ""
        raise CheckpointError(
            f"{reference}: is an address: a model on the Hub is named ORG/NAME{f', {name}' * bool(name)}"
        )


def check_endpoint(reference: str) -> None:
    """Raises CheckpointError where the Hub's address cannot be taken apart: huggingface_hub cannot be imported then.

    And where it has a password in it: plans and `moeplan.json` have the addresses of files.
    """
    address = os.environ.get("HF_ENDPOINT", "")
    try:
        parts = urlsplit(address)
        _ = parts.port
    except ValueError as error:
        raise CheckpointError(
            f"{reference}: HF_ENDPOINT is {show(address)}, which is no address ({error}); correct or unset it"
        ) from None
    if parts.username is not None:
        raise CheckpointError(
            f"{reference}: HF_ENDPOINT has a user's name in it: leave that and the password out, and give a token as "
            "HF_TOKEN"
        )


def answer_of(error: Exception) -> Any | None:
    """The Hub's answer, with `status_code` and `headers`, where `error` tells of one.

    Versions of huggingface_hub before 1 tell of it as the cause of an error of their own.
    """
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    told = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else error
    return told.response if isinstance(told, HfHubHTTPError) else None


def is_busy(error: Exception) -> bool:
    """Whether the Hub answered that it may answer later."""
    answer = answer_of(error)
    return answer is not None and answer.status_code in BUSY


def breaks_off(error: Exception) -> bool:
    """Whether the network failed in the middle of a file: HTTP libraries have errors of their own for that, so it is
    what is neither an answer of the Hub nor the fault of this machine."""
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    if isinstance(error, OSError) and error.errno is not None:
        return isinstance(error, (ConnectionError, TimeoutError))
    return not isinstance(error, (HfHubHTTPError, EntryNotFoundError))


def explanation(error: Exception, repository: str, revision: str, *, endpoint: str, cache: Path) -> str:
    """What went wrong at the Hub `endpoint`, and what to do about it: a predicate to the name of a model or file."""
    from huggingface_hub import errors, get_token

    login = "see that HF_TOKEN is of an account that may" if get_token() else "set HF_TOKEN, or run `hf auth login`"
    match error:
        case errors.GatedRepoError():
            return f"is gated: accept its licence at {endpoint}/{repository}, then {login}"
        case errors.RevisionNotFoundError():
            return f"has no revision {show(revision)}{_instead_of_revision(repository, revision, endpoint)}"
        case errors.RepositoryNotFoundError():
            return (
                f"there is no such directory, and no such model on {endpoint}"
                f"{_instead_of_name(repository, endpoint)}; if it is private, {login}"
            )
        case errors.LocalEntryNotFoundError() if isinstance(error.__cause__, Exception):
            return explanation(error.__cause__, repository, revision, endpoint=endpoint, cache=cache)
        case errors.EntryNotFoundError():
            return "is not there"
        case errors.HfHubHTTPError():
            status = error.response.status_code
            if status in (401, 403):
                return f"{endpoint} refuses access (HTTP {status}): {login}"
            busy = ": it is busy, try again later" if status in BUSY else ""
            return f"{endpoint} answers with HTTP {status}{busy}"
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            return f"cannot be stored: the disk of the cache, {cache}, is full"
        case OSError() if error.filename is not None:
            return (
                f"{error.filename} cannot be written: {error.strerror}; give another --transformers-cache, or set "
                "HF_HUB_OFFLINE=1 to take what is there"
            )
        case _:
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            return f"{endpoint} cannot be reached, or breaks off ({show(reason)})"


def _instead_of_name(repository: str, endpoint: str) -> str:
    from huggingface_hub import HfApi

    with suppress(Exception):  # a word of advice is not worth another error
        author = repository.split("/")[0]
        names = [model.id for model in HfApi(endpoint=endpoint).list_models(author=author, limit=500)]
        near = get_close_matches(repository, names, 1)
        return f"; did you mean {near[0]}?" if near else ""
    return ""


def _instead_of_revision(repository: str, revision: str, endpoint: str) -> str:
    from huggingface_hub import HfApi

    with suppress(Exception):
        refs = HfApi(endpoint=endpoint).list_repo_refs(repository)
        names = [ref.name for ref in (*refs.branches, *refs.tags)]
        return f"; it has {', '.join(map(show, get_close_matches(revision, names, 3) or names[:5]))}"
    return ""
