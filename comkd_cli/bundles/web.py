"""The bundle's web page: names what pictures show in a browser, from the files of the bundle alone.

The page itself is in web_page/. It runs the bundle's graph with onnxruntime-web, of which a copy goes into the
bundle too: two files, brought by npm once and kept in the user's cache.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import os
import shutil
import subprocess
import tarfile
import tempfile
import zlib
from pathlib import Path

from comkd_cli.errors import ExportError, WriteError
from comkd_cli.files import atomic_folder

PAGE = Path(__file__).with_name("web_page")
PAGE_FILES = ("index.html", "style.css", "prepare.js", "classify.js")
LICENCE = "LICENSE.onnxruntime"  # the npm package has no licence file of its own
RUNTIME_FOLDER = "ort"
# The backend for WebAssembly with one thread, its JavaScript in one module, and nothing for GPUs.
RUNTIME_FILES = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")
VERSION = "1.30.0"
INTEGRITY = "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
MOST_BYTES = 2**26  # of one unpacked file; the largest has 14 MB

OTHERWISE = "or give the folder of the unpacked package with --web-runtime"
REMEDY = f"check npm's registry, {OTHERWISE}"


def add_web_page(folder: Path, runtime: Path | None = None) -> None:
    """Add to a bundle the page and what it needs of onnxruntime-web: index.html, its parts, and ort/.

    runtime: the folder of an unpacked onnxruntime-web package, or its dist/; None takes the user's cache, which
    npm fills the first time. Raises ExportError, with the remedy, where the runtime can't be had; nothing is
    added then.
    """
    source = _fetched_runtime() if runtime is None else _given_runtime(runtime)
    for name in PAGE_FILES:
        shutil.copyfile(PAGE / name, folder / name)
    target = folder / RUNTIME_FOLDER
    target.mkdir(exist_ok=True)
    for name in RUNTIME_FILES:
        shutil.copyfile(source / name, target / name)
    shutil.copyfile(PAGE / LICENCE, target / "LICENSE")


def _given_runtime(runtime: Path) -> Path:
    """Where the files of an unpacked package are."""
    for folder in (runtime / "dist", runtime):
        if _is_complete(folder):
            return folder
    raise ExportError(
        f"{runtime}: has no {' and '.join(RUNTIME_FILES)}, neither in it nor in its dist; "
        f"unpack onnxruntime-web {VERSION} there"
    )


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in RUNTIME_FILES)


def _fetched_runtime() -> Path:
    """The user's copy of the pinned version, fetched if it is not there yet."""
    folder = _cache_folder() / f"onnxruntime-web-{VERSION}"
    if _is_complete(folder):
        return folder
    with tempfile.TemporaryDirectory() as name:
        package = _packed_by_npm(Path(name))
        _check_integrity(package)
        try:
            with atomic_folder(folder) as unfinished:
                _unpack(package, unfinished)
        except WriteError as error:
            raise ExportError(
                f"onnxruntime-web {error.problem}",
                path=folder,
                remedy=f"set XDG_CACHE_HOME to a folder that can be written, {OTHERWISE}",
            ) from error
    return folder


def _cache_folder() -> Path:
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (named if named.is_absolute() else Path.home() / ".cache") / "comkd"


def _packed_by_npm(folder: Path) -> Path:
    """The package's tarball, which npm writes into the folder from the registry that the user has set."""
    npm = shutil.which("npm")
    if npm is None:
        raise ExportError(
            f"the web page needs onnxruntime-web, and npm, which fetches it, is not there; install Node.js, {OTHERWISE}"
        )
    # The tarball's name is npm's to choose; it is the only file in a folder of its own.
    command = [npm, "pack", f"onnxruntime-web@{VERSION}", "--ignore-scripts", "--loglevel=error"]
    finished = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace", check=False)
    packages = list(folder.glob("*.tgz"))
    if finished.returncode or len(packages) != 1:
        raise ExportError(
            f"npm can't fetch onnxruntime-web {VERSION}: {_reason(finished.stderr)}; check the network and "
            f"npm's registry, {OTHERWISE}"
        )
    return packages[0]


def _reason(said: str) -> str:
    """The line of npm's message that says what went wrong: the first that is neither a bare code nor a path."""
    lines = [line.removeprefix("npm error").removeprefix("npm ERR!").strip() for line in said.splitlines()]
    telling = [line for line in lines if line and line.split()[0] not in ("code", "errno", "syscall", "path")]
    return telling[0] if telling else "it wrote no package and no reason"


def _check_integrity(package: Path) -> None:
    digest = base64.b64encode(hashlib.sha512(package.read_bytes()).digest()).decode("ascii")
    if f"sha512-{digest}" != INTEGRITY:
        raise ExportError(
            f"npm brought an onnxruntime-web {VERSION} that is not the published one (its sha512 differs); {REMEDY}"
        )


def _unpack(package: Path, folder: Path) -> None:
    """Take the runtime's files out of the tarball, and nothing else of it, whatever it holds."""
    wanted = {f"package/dist/{name}": name for name in RUNTIME_FILES}
    try:
        with tarfile.open(package, "r:gz") as archive:
            for member in archive:
                name = wanted.get(member.name)
                if name is None:
                    continue
                content = archive.extractfile(member) if member.isreg() and member.size <= MOST_BYTES else None
                if content is None:
                    raise ExportError(f"{package.name}: {member.name} is no regular file of a likely size; {REMEDY}")
                with content, (folder / name).open("wb") as target:
                    shutil.copyfileobj(content, target)
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ExportError(f"{package.name}: can't be unpacked: {error}; {REMEDY}") from error
    if not _is_complete(folder):
        raise ExportError(f"{package.name}: lacks {' or '.join(RUNTIME_FILES)}; {REMEDY}")
