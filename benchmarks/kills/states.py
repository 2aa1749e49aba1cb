"""What a command left in a folder, in a form that can be compared: paths, permissions and contents.

Contents are bytes, apart from these fields, which hold times:

- metrics.jsonl: `images_per_second`;
- a teacher cache's cost.json, which has measured seconds for messages alone, and is absent where a killed run
  computed all features;
- torchinductor_USER, the cache of torch's compiler, which the exporter loads: left out;
- .ses, onnxruntime's own note of when it was used, in the folder for temporary files: left out;
- a file of 4 bytes with which Python's tempfile tries out that folder, and whose name is 8 random characters: left out;
- in the Hub's cache, what the Hub's client leaves when it is killed: empty files and folders `tmp*` and references
  `*.tmp` of 40 bytes; its parts of downloads are compared;
- image_digests.sqlite: the pages of the database; its rows are compared instead.
"""

from __future__ import annotations

import hashlib
import json
import re
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path

State = Mapping[str, str]
"""By path: the permissions and a digest of the content, or `folder`."""
SHOWN = 8
MEASURED = ("cost.json",)
OF_OTHERS = re.compile(
    r"temporary/(\.ses|[a-z0-9_]{8}|torchinductor_\w+(/.*)?)|hub/.*/refs/\w+\.\w+\.tmp|hub/.*/tmp\w+(-\w+)*(/dummy_file_\w+)?|hub/tmp\w+(/dummy_file_\w+)?"
)


def state_of(root: Path, folders: Sequence[str]) -> State:
    """Everything below some folders of `root`."""
    found = {}
    for path in sorted(path for folder in folders for path in (root / folder).rglob("*")):
        name = path.relative_to(root).as_posix()
        if OF_OTHERS.fullmatch(name):
            continue
        if path.is_symlink():
            found[name] = f"link to {path.readlink()}"
        elif path.is_dir():
            found[name] = "folder"
        elif path.name in MEASURED:
            json.loads(path.read_text())  # whatever it says, it is whole
        else:
            content = CONTENTS.get(path.name, Path.read_bytes)(path)
            found[name] = f"{path.stat().st_mode & 0o777:o} {hashlib.sha256(content).hexdigest()}"
    return found


def differences(found: State, expected: State) -> list[str]:
    """A line for each path that only one has, or that differs; the first few."""
    lines = [f"left behind: {name}" for name in found if name not in expected]
    lines += [f"missing: {name}" for name in expected if name not in found]
    lines += [f"differs: {name}" for name in found if name in expected and found[name] != expected[name]]
    return lines[:SHOWN] + ([f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else [])


def part_of(state: State, name: str) -> State:
    """A file, or a folder and what is below it."""
    return {path: value for path, value in state.items() if path == name or path.startswith(f"{name}/")}


def _metrics(path: Path) -> bytes:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return json.dumps([{**line, "images_per_second": 0} for line in lines]).encode()


def _digests(path: Path) -> bytes:
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        if not connection.execute("SELECT name FROM sqlite_master WHERE name = 'files'").fetchall():
            return b""  # killed before it made the table
        return repr(connection.execute("SELECT * FROM files ORDER BY path").fetchall()).encode()


CONTENTS: Mapping[str, Callable[[Path], bytes]] = {
    "metrics.jsonl": _metrics,
    "image_digests.sqlite": _digests,
}
