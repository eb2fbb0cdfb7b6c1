"""Push: a run folder, checked and with its model card, to the Hub in one commit.

What leaves the machine is listed before it does, and is of the kinds in `ALLOWED`: no pickle, no
checkpoint, no log. A new repository is private unless told otherwise.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from robustify import __version__, models, report
from robustify.card import card
from robustify.classifier import Classifier
from robustify.errors import HubError, ModelError, RunFolderError, UsageError
from robustify.remote import refusal
from robustify.weights import CLASSIFIER_FOLDER

ALLOWED = frozenset({".safetensors", ".json", ".yaml", ".yml", ".md", ".html", ".png", ".jpg",
                     ".jpeg", ".webp", ".gif", ".svg"})  # fmt: skip
CARD_FILE = "README.md"
_HEAD = 1 << 20  # bytes of a file that are searched: all but the tensors themselves

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Upload:
    """What a push of `folder` would send: file name -> bytes, `left` what stays here, and the text
    of the model card; `own_card` where the folder's README.md is sent instead of a new one."""

    folder: Path
    repo_id: str
    files: dict[str, int]
    left: tuple[str, ...]
    card: str
    own_card: bool


@dataclass(frozen=True)
class Pushed:
    """What a push did. `changed` is False where the Hub had all of it already."""

    address: str
    commit: str
    changed: bool
    private: bool
    files: dict[str, int]


def push(
    folder: str | Path,
    repo_id: str,
    *,
    public: bool = False,
    revision: str | None = None,
) -> Pushed:
    """Upload a folder that `distill` or `attach` left to `user/repo` on the Hub, in one commit.

    The repository is created if there is none, private unless `public`; `revision` names a branch,
    created if there is none. The token is HF_TOKEN or that of `hf auth login`. Pushing the same
    folder again changes nothing. Raises as `prepare` and `send`.
    """
    return send(prepare(folder, repo_id), public=public, revision=revision)


def prepare(folder: str | Path, repo_id: str) -> Upload:
    """Check the folder and write its model card, without a word to the Hub.

    Raises `ModelError` for weights that do not load or are not those of the report,
    `RunFolderError` for a folder without a valid report, `UsageError` for a name that is no
    repository's.
    """
    folder = Path(folder)
    _require_repository(repo_id)
    if not folder.is_dir():
        raise RunFolderError(f"expected a folder that distill or attach left, got {folder}")
    classifier, content = models.load(folder), report.read(folder)
    _require_same(classifier, content["model"], folder)
    files, left = _sorted_out(folder)
    _warn_of_local_paths(folder, files)
    own_card = CARD_FILE in files
    text = (folder / CARD_FILE).read_text() if own_card else card(classifier, content, repo_id)
    files = {**files, CARD_FILE: len(text.encode())}
    return Upload(folder, repo_id, dict(sorted(files.items())), left, text, own_card)


def send(upload: Upload, *, public: bool = False, revision: str | None = None) -> Pushed:
    """Create the repository and the branch as needed, and commit what the Hub does not have yet.

    Raises `HubError` where the Hub refuses or cannot be reached, `UsageError` for a repository that
    everybody can read where `public` was not asked for.
    """
    api, repo_id = HfApi(library_name="robustify", library_version=__version__), upload.repo_id
    with _refusals(f"push to {repo_id}"):
        api.whoami()
        address = str(api.create_repo(repo_id, private=not public, exist_ok=True))
        before = api.model_info(repo_id)
        if not before.private and not public:
            raise UsageError(
                f"expected --public, because everybody can read {repo_id}; say so, or name another "
                "repository"
            )
        if revision:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
            address += f"/tree/{revision}"
            before = api.model_info(repo_id, revision=revision)
        commit = api.create_commit(
            repo_id,
            operations=_operations(upload),
            commit_message=f"Upload by robustify {__version__}",
            revision=revision,
            parent_commit=before.sha,
        )
    return Pushed(address, commit.oid, commit.oid != before.sha, bool(before.private), upload.files)


def described(upload: Upload, pushed: Pushed | None = None) -> dict[str, Any]:
    """Both as plain values, for `--json`."""
    plan = {"repository": upload.repo_id, "files": upload.files, "left": list(upload.left)}
    return {**plan, "card": upload.card} if pushed is None else {**plan, **asdict(pushed)}


def _require_repository(repo_id: str) -> None:
    try:
        if repo_id.count("/") != 1:
            raise HFValidationError("it has no slash, or more than one")
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UsageError(
            f"expected a repository as user/name, got {repo_id!r}: {' '.join(str(error).split())}"
        ) from None


def _operations(upload: Upload) -> list[CommitOperationAdd]:
    return [
        CommitOperationAdd(
            name, upload.card.encode() if name == CARD_FILE else str(upload.folder / name)
        )
        for name in upload.files
    ]


def _sorted_out(folder: Path) -> tuple[dict[str, int], tuple[str, ...]]:
    """The files that are sent, with their sizes in bytes, and the names of what is not."""
    files: dict[str, int] = {}
    left: list[str] = []
    for path in sorted(folder.iterdir()):
        if path.name == CLASSIFIER_FOLDER and path.is_dir():
            inside, left_inside = _sorted_out(path)
            files |= {f"{path.name}/{name}": size for name, size in inside.items()}
            left += [f"{path.name}/{name}" for name in left_inside]
        elif path.is_file() and not path.is_symlink() and _may_leave(path):
            files[path.name] = path.stat().st_size
        elif not path.name.startswith("."):
            left.append(f"{path.name}/" if path.is_dir() else path.name)
    return files, tuple(left)


def _warn_of_local_paths(folder: Path, files: Iterable[str]) -> None:
    """Say which files tell where things lie on this machine: data sets and students by path do."""
    home = f"{Path.home()}/".encode()
    named = []
    for name in files:
        with open(folder / name, "rb") as file:
            if home in file.read(_HEAD):
                named.append(name)
    if named:
        log.warning("%s: paths under %s are in it and go along", ", ".join(named), Path.home())


def _may_leave(path: Path) -> bool:
    return path.suffix in ALLOWED and not path.name.startswith(".")


def _require_same(classifier: Classifier, reported: dict[str, Any], folder: Path) -> None:
    """Raise `ModelError` where the report is one of other weights."""
    own = {"architecture": classifier.architecture, "weights_hash": models.weights_hash(classifier)}
    for key, value in own.items():
        if reported.get(key, value) != value:
            raise ModelError(
                f"expected report.json in {folder} to be about the weights beside it, but its "
                f"{key} is {reported[key]}, not {value}; run robustify evaluate {folder} "
                f"--out {folder}"
            )


@contextmanager
def _refusals(what: str) -> Iterator[None]:
    """Whatever the client raises inside, as a `HubError` of one line."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:  # of the transport, of the Hub, of the metadata's validation
        raise HubError(refusal(what, error)) from error
