"""The Hub as it is asked for files: one quick question first, and its refusals as one line each.

The client itself retries for half a minute before it says that there is no network. Here a
repository is looked up once; where the Hub does not answer, the cache alone is asked. HF_TOKEN,
HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE work as everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import huggingface_hub.errors as hub_errors
from huggingface_hub import HfApi, constants, hf_hub_download, try_to_load_from_cache

from robustify.errors import HubError

Kind = Literal["model", "dataset"]

SECONDS_TO_ANSWER = 10.0
# httpx.HTTPError or httpx2.HTTPError: the client's two generations stand on different libraries.
_TRANSPORT: type[BaseException] = hub_errors.HfHubHTTPError.__mro__[1]
_MAY_BE_CACHED = (408, 429, 500, 502, 503, 504)
_BY_STATUS = {
    401: "the token is not valid, or it has expired: log in anew with `hf auth login`, or set "
         "HF_TOKEN",
    403: "the token may not do that: take one with permission to write to this namespace, from "
         "https://huggingface.co/settings/tokens",
    409: "something else is being changed there at the same time: run the same command again",
    412: "somebody else committed to it meanwhile: look at what is there, then run the same "
         "command again",
    413: "a file is larger than the Hub takes",
    429: "the Hub has had too many requests: wait a few minutes and run the same command again",
}  # fmt: skip


@dataclass(frozen=True)
class Repository:
    """A repository and the names of its files; or, where the Hub gave no answer (`silence` says
    why), what of it is in the cache."""

    name: str
    repo_id: str
    revision: str | None
    files: frozenset[str] = frozenset()
    silence: Exception | None = None

    def file(self, name: str) -> Path | None:
        """The file in the cache, downloaded if need be; None where the repository has none.

        Raises `HubError`.
        """
        if self.silence is None and name not in self.files:
            return None
        try:
            return Path(
                hf_hub_download(
                    self.repo_id, name, revision=self.revision, local_files_only=bool(self.silence)
                )
            )
        except hub_errors.LocalEntryNotFoundError as error:
            if self.silence is not None:
                return None
            raise HubError(refusal(f"get {name} of {self.name}", error)) from error
        except Exception as error:  # of the transport, of the file system, of the Hub
            raise HubError(refusal(f"get {name} of {self.name}", error)) from error

    def lacks(self, what: str) -> HubError:
        """The error that it does not have `what`, or that nobody can tell."""
        if self.silence is not None:
            return HubError(
                f"could not get {self.name}: it is not in the cache, and {_cause(self.silence)}"
            )
        return HubError(f"could not get {self.name}: it has no {what}; check the name")


def find(name: str, kind: Kind = "model") -> Repository:
    """Look up `[hf-hub:]user/repo[@revision]`; raises `HubError` where the Hub refuses."""
    repo_id, _, revision = name.removeprefix("hf-hub:").removeprefix("hf_hub:").partition("@")
    name = name if kind == "dataset" else f"hf-hub:{repo_id}" + (f"@{revision}" if revision else "")
    ask = HfApi().model_info if kind == "model" else HfApi().dataset_info
    try:
        found = ask(repo_id, revision=revision or None, timeout=SECONDS_TO_ANSWER)
    except Exception as error:  # of the transport, of the Hub, of the name
        if not _may_be_cached(error):
            raise HubError(refusal(f"get {name}", error)) from error
        return Repository(name, repo_id, revision or None, silence=error)
    files = frozenset(sibling.rfilename for sibling in found.siblings or ())
    return Repository(name, repo_id, revision or None, files)


def require_reachable(repo_id: str, file: str) -> None:
    """Raise `HubError` at once where neither the Hub nor the cache can give that file."""
    repository = find(repo_id)
    if repository.silence is not None and not try_to_load_from_cache(repo_id, file):
        raise repository.lacks(file)


def refusal(what: str, error: BaseException) -> str:
    """One line: what could not be done, why, and what to do about it."""
    return f"could not {what}: {_cause(error)}"


def _may_be_cached(error: BaseException) -> bool:
    if isinstance(error, hub_errors.HfHubHTTPError):
        return error.response.status_code in _MAY_BE_CACHED
    return isinstance(error, _TRANSPORT | ConnectionError | TimeoutError)


def _cause(error: BaseException) -> str:
    """The order matters: gated is a kind of missing, and all of these are kinds of HTTP errors."""
    while isinstance(error, RuntimeError) and error.__cause__:  # how the client wraps an upload's
        error = error.__cause__
    causes: list[tuple[type[BaseException], str]] = [
        (hub_errors.GatedRepoError, "access to it must be asked for on its page; then set "
         "HF_TOKEN"),
        (hub_errors.RevisionNotFoundError, "it has no such revision: check what follows the @"),
        (hub_errors.DisabledRepoError, "the Hub has disabled access to it"),
        (hub_errors.HFValidationError, "write it as user/repo or user/repo@revision"),
        (hub_errors.OfflineModeIsEnabled, "HF_HUB_OFFLINE is set: unset it to use the network"),
        (hub_errors.LocalTokenNotFoundError, "no token was found: log in with `hf auth login`, or "
         "set HF_TOKEN"),
        (hub_errors.LocalEntryNotFoundError, "the connection broke: check the network and run the "
         "same command again"),
    ]  # fmt: skip
    for kind, cause in causes:
        if isinstance(error, kind):
            return cause
    if isinstance(error, hub_errors.HfHubHTTPError):
        return _answered(error)
    if isinstance(error, _TRANSPORT | ConnectionError | TimeoutError):
        return (
            f"the connection to {constants.ENDPOINT} failed ({_line(error)}): check the network "
            "and HF_ENDPOINT, then run the same command again"
        )
    return _line(error)


def _answered(error: hub_errors.HfHubHTTPError) -> str:
    status = error.response.status_code
    said = error.response.headers.get("X-Error-Message") or error.server_message or ""
    if isinstance(error, hub_errors.RepositoryNotFoundError):
        return (
            "there is no such repository, or it is private: check the name, or log in with "
            "`hf auth login` or HF_TOKEN"
        )
    words = f" ({' '.join(said.split())})" if said else ""
    if status in _BY_STATUS:
        return f"{_BY_STATUS[status]}{words}"
    if status >= 500:
        return f"the Hub failed with status {status}{words}: wait and run the same command again"
    return f"the Hub answered with status {status}{words}: {_line(error)}"


def _line(error: BaseException) -> str:
    lines = [line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
