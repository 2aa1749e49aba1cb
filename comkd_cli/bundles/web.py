"""The bundle's web page, which classifies images in a browser.

The page itself is in web_page/. It runs the bundle's graph with onnxruntime-web, two files of which are copied into the
bundle. npm fetches them once; they are kept in the user's cache.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import os
import shutil
import subprocess
import tarfile
import zlib
from pathlib import Path

from comkd_cli.errors import ExportError, WriteError
from comkd_cli.files import atomic_folder, temporary_folder

PAGE = Path(__file__).with_name("web_page")
PAGE_FILES = ("index.html", "style.css", "prepare.js", "classify.js")
LICENCE = "LICENSE.onnxruntime"  # the npm package has no licence file of its own
RUNTIME_FOLDER = "ort"
# The backend for WebAssembly with one thread, its JavaScript in one module, and nothing for GPUs.
RUNTIME_FILES = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")
VERSION = "1.30.0"
INTEGRITY = "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="

OTHERWISE = "or specify the folder of the unpacked package with --web-runtime"
REMEDY = f"check npm's registry, {OTHERWISE}"


def add_web_page(folder: Path, runtime: Path | None = None) -> None:
    """Add the page to a bundle: index.html, its scripts and style, and ort/, the files of onnxruntime-web.

    runtime: the folder of an unpacked onnxruntime-web package, or its dist/; None uses the user's cache, which npm
    fills the first time. Raises ExportError, and adds nothing, if the runtime is not available.
    """
    source = _fetched_runtime() if runtime is None else _given_runtime(runtime)
    for name in PAGE_FILES:
        shutil.copyfile(PAGE / name, folder / name)
    target = folder / RUNTIME_FOLDER
    target.mkdir(exist_ok=True)
    for name in RUNTIME_FILES:
        shutil.copyfile(source / name, target / name)
    shutil.copyfile(PAGE / LICENCE, target / "LICENSE")


def check_runtime(runtime: Path | None) -> None:
    """Raises ExportError if the folder that the user specified does not contain the runtime; None is not checked."""
    if runtime is not None:
        _given_runtime(runtime)


def _given_runtime(runtime: Path) -> Path:
    """The folder of an unpacked package that holds the runtime's files."""
    for folder in (runtime / "dist", runtime):
        if _is_complete(folder):
            return folder
    raise ExportError(
        f"does not contain {' and '.join(RUNTIME_FILES)}, directly or in its dist",
        path=runtime,
        remedy=f"unpack onnxruntime-web {VERSION} there",
    )


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in RUNTIME_FILES)


def _fetched_runtime() -> Path:
    """The cached copy of the pinned version, fetched if it is missing."""
    folder = _cache_folder() / f"onnxruntime-web-{VERSION}"
    if _is_complete(folder):
        return folder
    with temporary_folder() as temporary:
        package = _packed_by_npm(temporary)
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
    configured = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (configured if configured.is_absolute() else Path.home() / ".cache") / "comkd"


def _packed_by_npm(folder: Path) -> Path:
    """The package's tarball, which npm writes into the folder, from the registry that the user has configured."""
    npm = shutil.which("npm")
    if npm is None:
        raise ExportError(
            "npm, which fetches onnxruntime-web for the web page, is not installed",
            remedy=f"install Node.js, {OTHERWISE}",
        )
    # npm chooses the name of the tarball.
    command = [npm, "pack", f"onnxruntime-web@{VERSION}", "--ignore-scripts", "--loglevel=error"]
    finished = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace", check=False)
    packages = list(folder.glob("*.tgz"))
    if finished.returncode or len(packages) != 1:
        raise ExportError(
            f"npm could not fetch onnxruntime-web {VERSION}: {_reason(finished.stderr)}",
            remedy=f"check the network and npm's registry, {OTHERWISE}",
        )
    return packages[0]


def _reason(message: str) -> str:
    """The first line of npm's message that is neither a bare code nor a path."""
    lines = [line.removeprefix("npm error").removeprefix("npm ERR!").strip() for line in message.splitlines()]
    reasons = [line for line in lines if line and line.split()[0] not in ("code", "errno", "syscall", "path")]
    return reasons[0] if reasons else "it wrote no package and no reason"


def _check_integrity(package: Path) -> None:
    digest = base64.b64encode(hashlib.sha512(package.read_bytes()).digest()).decode("ascii")
    if f"sha512-{digest}" != INTEGRITY:
        raise ExportError(
            f"the onnxruntime-web {VERSION} that npm fetched is not the published one: its sha512 differs",
            remedy=REMEDY,
        )


def _unpack(package: Path, folder: Path) -> None:
    """Extract the runtime's files, which are regular files, and nothing else from the tarball."""
    wanted = {f"package/dist/{name}": name for name in RUNTIME_FILES}
    try:
        with tarfile.open(package, "r:gz") as archive:
            for member in archive:
                if member.name in wanted and member.isreg():
                    archive.extract(member.replace(name=wanted[member.name], deep=False), folder, filter="data")
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ExportError(f"could not be unpacked: {error}", path=package.name, remedy=REMEDY) from error
    if not _is_complete(folder):
        raise ExportError(f"has no {' or no '.join(RUNTIME_FILES)}", path=package.name, remedy=REMEDY)
