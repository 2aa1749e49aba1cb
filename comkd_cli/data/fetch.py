"""Bring a data set of the suite from the Hub mirror, and unpack it without trusting it."""

from __future__ import annotations

import re
import stat
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from comkd_cli.data.check import Check, check_dataset
from comkd_cli.data.image_files import below_junk
from comkd_cli.errors import DataError
from comkd_cli.files import sha256_of_file
from comkd_cli.recipe.catalog import CATALOG, Dataset

MIRROR = "zhengli97/prompt_learning_dataset"
REVISION = "ceb3112337fb6e1bf71534e355ca5569b63f19a6"  # the one whose files this project has a list of
MOST_BYTES = 100 * 2**30  # of one unpacked data set; the largest, SUN397, has about 39 GB

Tick = Callable[[int, int], None]


def fetch_dataset(
    dataset: Dataset, data_root: Path, tick: Tick = lambda done, total: None, most_bytes: int = MOST_BYTES
) -> Check:
    """Download, unpack and check a data set; one that is ready already is left as it is.

    The download goes on where an interrupted one stopped, and is verified by huggingface_hub. tick: called
    with the files unpacked and their number. Raises DataError.
    """
    folder = data_root / dataset.folder
    if folder.exists():
        found = check_dataset(dataset, data_root)
        if found.state == "ready":
            return found
        raise DataError(
            f"{folder}: is there and incomplete ({'; '.join(found.problems)}); move it away to fetch it anew"
        )
    if dataset.archive is None:
        raise DataError(_by_hand(dataset, folder))
    archive = _download(dataset.archive)
    data_root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{dataset.folder}.", dir=data_root) as name:
        unpacked = Path(name)
        unpack(archive, unpacked, tick, most_bytes)
        _top_folder(unpacked, dataset, archive).replace(folder)
    return check_dataset(dataset, data_root)


def unpack(archive: Path, target: Path, tick: Tick, most_bytes: int) -> None:
    """Unpack a zip file into an empty folder, refusing what reaches beyond it.

    Refused with DataError: absolute paths, `..`, links and other special files, and more than `most_bytes`
    in all, by what the archive says and by what comes out.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            members = opened.infolist()
            if sum(member.file_size for member in members) > most_bytes:
                raise DataError(f"{archive.name}: would unpack to more than {most_bytes:,} bytes")
            left = most_bytes
            for done, member in enumerate(members, start=1):
                left -= _unpack_member(opened, member, target, left)
                tick(done, len(members))
    except (zipfile.BadZipFile, zipfile.LargeZipFile, EOFError, NotImplementedError) as error:
        raise DataError(f"{archive}: is not a whole zip file ({error}); remove it and fetch again") from error


def _unpack_member(opened: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path, most_bytes: int) -> int:
    """One file or folder; returns its bytes. What a system left in the archive is skipped."""
    name = PurePosixPath(member.filename.replace("\\", "/"))
    kind = stat.S_IFMT(member.external_attr >> 16)
    if name.is_absolute() or ".." in name.parts or (name.parts and ":" in name.parts[0]):
        raise DataError(f"{opened.filename}: {member.filename!r} lies outside the data set; nothing was kept")
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise DataError(f"{opened.filename}: {member.filename!r} is a link or special file; nothing was kept")
    if below_junk(str(name)):
        return 0
    path = target / name
    if member.is_dir():
        path.mkdir(parents=True, exist_ok=True)
        return 0
    path.parent.mkdir(parents=True, exist_ok=True)
    written = 0
    with opened.open(member) as source, path.open("wb") as out:
        while block := source.read(1 << 20):
            written += len(block)
            if written > most_bytes:  # the archive's own sizes need not be true
                raise DataError(f"{opened.filename}: unpacks to more than it says; nothing was kept")
            out.write(block)
    return written


def _top_folder(unpacked: Path, dataset: Dataset, archive: Path) -> Path:
    """The folder that holds what the data set's folder must hold, whatever the archive calls it."""
    expected = {part for part in (dataset.split_file, dataset.images.split("/")[0], "variants.txt") if part}
    candidates = [unpacked, *(path for path in unpacked.iterdir() if path.is_dir())]
    candidates += [path for candidate in candidates[1:] for path in candidate.iterdir() if path.is_dir()]
    best = max(candidates, key=lambda path: sum((path / part).exists() for part in expected))
    if not any((best / part).exists() for part in expected):
        raise DataError(f"{archive.name}: holds none of {', '.join(sorted(expected))}; it is not {dataset.name}")
    return best


def _download(name: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        path = Path(hf_hub_download(MIRROR, name, revision=REVISION))
    except Exception as error:  # the Hub's client raises its own, its HTTP library's, and OSError
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"{name}: can't be fetched from {MIRROR} ({first}); what came is kept, try again, or set HF_ENDPOINT"
        ) from error
    # The Hub names a large file by the sha256 of its content, and its cache keeps it under that name.
    content = path.resolve()
    if re.fullmatch("[0-9a-f]{64}", content.name) and sha256_of_file(content) != content.name:
        content.unlink()
        raise DataError(f"{name}: what came is not what the Hub announced (its sha256 differs); fetch again")
    return path


def _by_hand(dataset: Dataset, folder: Path) -> str:
    mirrored = ", ".join(entry.name for entry in CATALOG.values() if entry.archive)
    lists = "" if dataset.layout == "split" else " with CoOp's classnames.txt beside it"
    return f"{dataset.name}: no mirror has it; put it at {folder}{lists}: {dataset.origin}. The mirror has {mirrored}"
