"""The libraries that talk to the Hub, where they are installed, and their errors as sentences."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

from subspan.errors import SubspanError


def need(library: str) -> Any:
    """Import huggingface_hub or transformers; refuse to go on where it is not installed."""
    try:
        return importlib.import_module(library)
    except ModuleNotFoundError as error:
        if error.name != library:
            raise
        raise SubspanError(
            f"{library} is needed for this and is not installed: pip install 'subspan[hub]'"
        ) from None


@contextlib.contextmanager
def asking(repo: str, revision: str | None = None, base_of: str = "") -> Iterator[None]:
    """Run calls of those libraries, of which any error is said in one sentence.

    ``base_of`` is the file that names the repository as its base, if the user did not.
    """
    try:
        yield
    except SubspanError:
        raise
    except Exception as error:
        text = _say(error, repo, revision)
        if base_of:
            text = (
                f"the base of {base_of} cannot be had, for {text}; if you have the network, give "
                "it to load"
            )
        raise SubspanError(text) from error


def _say(error: BaseException, repo: str, revision: str | None) -> str:
    """Say what went wrong, from the most telling of an error and its causes."""
    errors = need("huggingface_hub.errors")
    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) and cause not in causes:
        causes.append(cause)

    def among(*kinds: str) -> bool:
        known = tuple(getattr(errors, kind) for kind in kinds if hasattr(errors, kind))
        return any(isinstance(each, known) for each in causes)

    status = {getattr(getattr(each, "response", None), "status_code", None) for each in causes}
    network = {"ConnectError", "ConnectTimeout", "ReadTimeout", "ConnectionError", "ProxyError"}
    if among("GatedRepoError"):
        return f"{repo} is gated: ask for access on its page, then log in (`hf auth login`)"
    if among("RevisionNotFoundError"):
        return f"{repo} has no revision {revision or 'main'} on the Hub"
    if among("RemoteEntryNotFoundError"):
        return f"{repo} does not have the files that are wanted of it: {first_line(error)}"
    if among("HFValidationError"):
        return f"{repo!r} cannot be the name of a repository: give USER/NAME"
    if among("LocalTokenNotFoundError") or 401 in status:
        return (
            f"there is no repository {repo} that you may use: see to its name, and log in "
            "(`hf auth login`) or give a token if it is private or yours to write"
        )
    if 403 in status:
        return f"your token may not write to {repo}: give one that has the right to"
    if among("RepositoryNotFoundError"):
        return f"there is no repository {repo} on the Hub"
    unreachable = among("OfflineModeIsEnabled", "LocalEntryNotFoundError")
    if unreachable or any(type(each).__name__ in network for each in causes):
        return (
            f"the Hub cannot be reached for {repo}, and the cache does not have what is needed: "
            "connect, or give files of this machine"
        )
    return f"{repo} cannot be used: {first_line(error)}"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, without its full stop."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
