"""Downloads a dataset of the suite from the Hub mirror, and unpacks it without trusting it."""

from __future__ import annotations

import errno
import lzma
import re
import shutil
import zipfile
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from comkd_cli.data.check import Check, check_dataset
from comkd_cli.data.image_files import below_junk
from comkd_cli.errors import DataError, WriteError
from comkd_cli.events import Report, ignore_event
from comkd_cli.files import remove_unfinished, scratch_beside, sha256_of_file, write_error
from comkd_cli.recipe.catalog import CATALOG, Dataset
from comkd_cli.runtime.locks import in_turn_with_others

MIRROR = "zhengli97/prompt_learning_dataset"
REVISION = "ceb3112337fb6e1bf71534e355ca5569b63f19a6"  # pinned: the archives of CATALOG are those of this revision
MOST_BYTES = 100 * 2**30  # of one unpacked dataset; the largest, SUN397, has about 39 GB
MOST_MEMBERS = 2_000_000  # of one archive; SUN397 has 108,754 images
# Errors of a name in the archive, which another folder would not fix.
OF_NAMES = (errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ)

Tick = Callable[[int, int], None]


def fetch_dataset(
    dataset: Dataset,
    data_root: Path,
    tick: Tick = lambda done, total: None,
    most_bytes: int = MOST_BYTES,
    report: Report = ignore_event,
) -> Check:
    """Download, unpack and check a dataset, unless it is ready already.

    A download is resumed if the connection breaks, and is verified by huggingface_hub. If another process is
    fetching the same dataset, it waits for that one. tick: called with the files unpacked and their number. Raises
    DataError.
    """
    with in_turn_with_others(data_root / dataset.folder, report):
        return _fetch(dataset, data_root, tick, most_bytes)


def _fetch(dataset: Dataset, data_root: Path, tick: Tick, most_bytes: int) -> Check:
    folder = data_root / dataset.folder
    if folder.exists():
        found = check_dataset(dataset, data_root)
        if found.state == "ready":
            remove_unfinished(folder)  # of a process that was killed after it had moved the dataset here
            return found
        raise DataError(
            f"is incomplete ({'; '.join(found.problems)})", path=folder, remedy="move it away to download it again"
        )
    if dataset.archive is None:
        raise _no_archive(dataset, folder)
    archive = _download(dataset.archive)
    with scratch_beside(folder) as scratch:
        unpacked = scratch / "new"
        unpacked.mkdir()
        unpack(archive, unpacked, tick, most_bytes)
        _top_folder(unpacked, dataset, archive).replace(folder)
    return check_dataset(dataset, data_root)


def unpack(archive: Path, target: Path, tick: Tick, most_bytes: int) -> None:
    """Unpack a zip file into an empty folder, without the files that systems add (`__MACOSX`, `Thumbs.db`).

    zipfile keeps every member below the folder, makes no links, and never writes more than a member's stated size; the
    sum of these is checked here. Raises DataError for more than `most_bytes` or MOST_MEMBERS and for an archive that is
    damaged, encrypted or has names that cannot be files; WriteError if the disk has no room or cannot be written.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            members = [member for member in opened.infolist() if not below_junk(member.filename)]
            _check_size(archive, members, target, most_bytes)
            for done, member in enumerate(members, start=1):
                opened.extract(member, target)
                tick(done, len(members))
    except OSError as error:
        if error.errno is not None and error.errno not in OF_NAMES:
            raise write_error(target, error) from error
        raise _damaged(archive, error) from error
    except UNREADABLE as error:
        raise _damaged(archive, error) from error


# What zipfile and its decompressors raise; RuntimeError for an encrypted member.
UNREADABLE = (
    *(zipfile.BadZipFile, zipfile.LargeZipFile, EOFError, RuntimeError, ValueError, LookupError),
    *(zlib.error, lzma.LZMAError),
)


def _damaged(archive: Path, error: Exception) -> DataError:
    problem = f"is not a complete zip file ({error})"
    return DataError(problem, path=archive, remedy="delete it and run the command again")


def _check_size(archive: Path, members: Sequence[zipfile.ZipInfo], target: Path, most_bytes: int) -> None:
    """Raise DataError for an archive above the limits, and WriteError if the disk has no room for it."""
    total = sum(member.file_size for member in members)
    if total > most_bytes:
        raise DataError("is too large unpacked", path=archive, found=total, allowed=f"{most_bytes:,} bytes")
    if len(members) > MOST_MEMBERS:
        raise DataError("has too many members", path=archive, found=len(members), allowed=f"{MOST_MEMBERS:,} at most")
    if (free := shutil.disk_usage(target).free) < total:
        raise WriteError(
            f"has no room for the dataset: {total:,} bytes are needed and {free:,} are free",
            path=target.parent,
            remedy="free space there, or choose another --data-root",
        )


def _top_folder(unpacked: Path, dataset: Dataset, archive: Path) -> Path:
    """The folder with the dataset's files, whatever the archive calls it."""
    expected = {part for part in (dataset.split_file, dataset.images.split("/")[0], "variants.txt") if part}
    candidates = [unpacked, *(path for path in unpacked.iterdir() if path.is_dir())]
    candidates += [path for candidate in candidates[1:] for path in candidate.iterdir() if path.is_dir()]
    best = max(candidates, key=lambda path: sum((path / part).exists() for part in expected))
    if not any((best / part).exists() for part in expected):
        raise DataError(f"is not {dataset.name}: contains none of {', '.join(sorted(expected))}", path=archive)
    return best


def _download(name: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        path = Path(hf_hub_download(MIRROR, name, revision=REVISION))
    except Exception as error:  # the Hub's client raises its own, its HTTP library's, and OSError
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"could not be downloaded from {MIRROR}",
            path=name,
            found=first,
            remedy="run the command again, or set HF_ENDPOINT to a mirror of the Hub",
        ) from error
    # The Hub names a large file by the sha256 of its content, and its cache keeps it under that name.
    content = path.resolve()
    if re.fullmatch("[0-9a-f]{64}", content.name) and sha256_of_file(content) != content.name:
        content.unlink()
        raise DataError("the download is damaged: its sha256 differs", path=name, remedy="run the command again")
    _remove_parts_of(content)
    return path


def _remove_parts_of(content: Path) -> None:
    """Remove from the Hub's cache what killed downloads left of a file that is complete now.

    Each download has a file of its own, which no later one continues. Whoever is downloading holds the Hub's lock.
    """
    lock = content.parents[2] / ".locks" / content.parents[1].name / f"{content.name}.lock"
    if not lock.parent.is_dir():
        return
    with suppress(Timeout, OSError), FileLock(lock, timeout=0):
        for part in content.parent.glob(f"{content.name}*.incomplete"):
            part.unlink(missing_ok=True)


def _no_archive(dataset: Dataset, folder: Path) -> DataError:
    mirrored = ", ".join(entry.name for entry in CATALOG.values() if entry.archive)
    lists = "" if dataset.layout == "split" else " with CoOp's classnames.txt beside it"
    return DataError(
        f"{dataset.name} is not on the mirror, which has {mirrored}",
        remedy=f"put it at {folder}{lists}: {dataset.origin}",
    )
