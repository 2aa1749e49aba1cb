"""Bundles on the Hugging Face Hub: uploaded, downloaded, and read from its cache. No torch."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from comkd_cli.bundles.problems import bundle_errors
from comkd_cli.bundles.target import check_target, new_bundle
from comkd_cli.edge.manifest import read_manifest, verified_bytes
from comkd_cli.edge.self_test import REFERENCE_FOLDER
from comkd_cli.errors import BundleError, ComkdError, MisuseError, first_line
from comkd_cli.events import Notice, Progress, Report

PREFIX = "hf:"
MANIFEST, CARD = "manifest.json", "README.md"
NAME = r"[\w.-]+/[\w.-]+"
LOGIN = "log in with `hf auth login`, or set HF_TOKEN"
Tick = Callable[[int, int], None]


@dataclass(frozen=True)
class HubBundle:
    """A repository of the Hub, and a revision of it."""

    repository: str
    """OWNER/NAME."""
    revision: str | None = None
    """A branch, tag or commit; None: the main branch."""

    @classmethod
    def parse(cls, text: str) -> HubBundle:
        """OWNER/NAME or OWNER/NAME@REVISION, with or without `hf:` in front. Raises MisuseError."""
        found = re.fullmatch(rf"(?:{PREFIX})?({NAME})(?:@(\S+))?", text)
        if found is None:
            raise MisuseError(
                "is not a repository of the Hub", found=repr(text), allowed="OWNER/NAME, OWNER/NAME@REVISION"
            )
        return cls(found[1], found[2])


@dataclass(frozen=True)
class Upload:
    """A file that is uploaded."""

    name: str
    """In the bundle and in the repository."""
    path: Path
    size: int
    """Bytes."""


def files_to_push(bundle: Path) -> list[Upload]:
    """The files of a bundle: those that its manifest lists, and the manifest. Nothing else in the folder is uploaded.

    Raises BundleError for a folder that is not a bundle, and for files that are missing or are not those that were
    exported; reference/ may be missing.
    """
    with bundle_errors():
        manifest = read_manifest(bundle)
        names = [name for name in _names(bundle, manifest) if not _was_removed(bundle, name)]
        for name in names:
            if name != CARD:  # a card may be edited
                verified_bytes(bundle, manifest, name)
    paths = [(name, bundle / name) for name in (*names, MANIFEST)]
    return [Upload(name, path, path.stat().st_size) for name, path in paths]


def push(files: list[Upload], repository: str, public: bool, report: Report) -> str:
    """Upload files to a repository, which is created if it does not exist; returns the address of the commit.

    public: the visibility of the repository. Raises MisuseError if it exists with another one, ComkdError if the
    Hub refuses.
    """
    api = HfApi()
    with _refusals(repository, LOGIN):
        try:
            exists_public = not api.repo_info(repository).private
        except RepositoryNotFoundError:
            api.create_repo(repository, private=not public, exist_ok=True)
        else:
            if exists_public != public:
                found, remedy = ("public", "add --public") if exists_public else ("private", "leave --public out")
                raise MisuseError(f"the repository is {found}", path=repository, remedy=f"{remedy}, or choose another")
        report(Notice(f"uploading {len(files)} files to {repository}"))
        additions = [CommitOperationAdd(file.name, str(file.path)) for file in files]
        commit = api.create_commit(repository, additions, commit_message="Bundle exported by comkd")
    return str(commit.commit_url)


def pull(source: HubBundle, out: Path, force: bool, report: Report) -> None:
    """Download a bundle into a folder, which appears whole or not at all; nothing of it is executed.

    Each file must be the one that was exported; a card that was edited on the Hub is a notice. Raises BundleError,
    ExportError if `out` exists without `force`, ComkdError if the Hub refuses.
    """
    check_target(out, force)
    folder = cached_bundle(source, lambda done, total: report(Progress("downloading", done, total, unit="files")))
    with bundle_errors(), new_bundle(out, force) as target:
        manifest = read_manifest(folder)
        for name in (*_names(folder, manifest), MANIFEST):
            if _was_removed(folder, name):
                continue
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, target / name)
            if name not in (CARD, MANIFEST):
                verified_bytes(target, manifest, name)
        try:
            verified_bytes(target, manifest, CARD)
        except Exception:  # BundleProblem, for a card that was edited or has no entry
            report(Notice(f"{CARD} was edited after the export"))


def cached_bundle(source: HubBundle, tick: Tick = lambda done, total: None) -> Path:
    """The folder of a bundle in the Hub's cache, downloaded if it is not there.

    tick: called with the files downloaded and their number. Raises BundleError for a repository without a bundle,
    ComkdError if the Hub refuses.
    """
    with _refusals(source.repository, "for a private repository " + LOGIN):
        try:
            folder = Path(hf_hub_download(source.repository, MANIFEST, revision=source.revision)).parent
        except EntryNotFoundError as error:
            raise BundleError("holds no bundle: it has no manifest.json", path=source.repository) from error
        with bundle_errors():
            names = _names(folder, read_manifest(folder))
        for done, name in enumerate(names, start=1):
            try:
                # Of the manifest's own commit, whatever is pushed in the meantime.
                hf_hub_download(source.repository, name, revision=folder.name)
            except EntryNotFoundError as error:
                if not _is_reference(name):
                    raise BundleError("is missing", path=f"{source.repository}/{name}") from error
            tick(done, len(names))
    return folder


def _names(folder: Path, manifest: dict[str, Any]) -> list[str]:
    """The names of a bundle's files. Raises BundleError for one that would leave the folder."""
    names = list(manifest["files"]) if isinstance(manifest["files"], dict) else []
    for name in names:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name or not path.parts:
            raise BundleError("is not a file name", path=folder / MANIFEST, field="files", found=repr(name))
    return names


def _is_reference(name: str) -> bool:
    return PurePosixPath(name).parts[0] == REFERENCE_FOLDER


def _was_removed(folder: Path, name: str) -> bool:
    """Whether a file of reference/ is not there, which docs/bundle.md allows."""
    return _is_reference(name) and not (folder / name).exists()


@contextmanager
def _refusals(repository: str, remedy: str) -> Iterator[None]:
    """Within the block, errors of the Hub and of its connection become a ComkdError."""
    try:
        yield
    except ComkdError:
        raise
    except RepositoryNotFoundError as error:
        raise ComkdError("no such repository, or it is private", path=repository, remedy=remedy) from error
    except RevisionNotFoundError as error:
        raise ComkdError(
            "has no such revision", path=repository, remedy="specify a branch, a tag or a commit"
        ) from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        remedy = remedy if status in (401, 403) else "run the command again"
        raise ComkdError("the Hub refused", path=repository, found=first_line(error), remedy=remedy) from error
    except Exception as error:  # of the HTTP library, of the cache, or that the Hub is offline
        raise ComkdError(
            "the Hub could not be used", path=repository, found=first_line(error), remedy="check the connection"
        ) from error
