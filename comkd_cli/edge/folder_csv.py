"""Classifies the images of a folder into a CSV file; a rerun resumes where an interrupted one was.

Needs numpy and Pillow; it becomes a part of every bundle's predict.py.

Beside TABLE.csv lies TABLE.csv.state.json, which says what the rows are made of and how many bytes of the table are
complete. It is replaced after each batch, once the batch's rows are on the disk. A rerun cuts off whatever a killed
run wrote after that, and the batches of a resumed run are those of an undisturbed one, so both tables are the same.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from comkd_cli.edge.image_files import skipped_text, walk_images
from comkd_cli.edge.images import Preprocessing, UnreadableImage, load_prepared
from comkd_cli.edge.manifest import read_manifest
from comkd_cli.edge.threshold import Confidence, read_confidence
from comkd_cli.edge.visible import visible

STATE_FORMAT = "comkd-predictions/1"
BATCH_SIZE = 32
MOST_THREADS = 8
READ_SIZE = 1 << 20
TERMINAL_SECONDS, LOG_SECONDS = 0.2, 60.0  # between two lines of progress
INTERRUPTED = 130  # 128 + SIGINT, as shells report it
NONE_CELLS = {True: "true", False: "false", None: ""}


class CsvProblem(Exception):
    """A table that cannot be written or resumed."""

    def __init__(self, problem: str, *, path: Path, found: str | None = None, remedy: str | None = None) -> None:
        super().__init__(problem)
        self.problem, self.path, self.found, self.remedy = problem, path, found, remedy

    def __str__(self) -> str:
        """`path: problem: found; remedy`, without the fields that are None."""
        text = ": ".join(str(part) for part in (self.path, self.problem, self.found) if part is not None)
        return text if self.remedy is None else f"{text}; {self.remedy}"


class ImageClassifier(Protocol):
    """What is needed of edge.classifier.Classifier."""

    class_names: list[str]
    preprocessing: Preprocessing
    confidence: Confidence

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Logits (batch, classes) of prepared images, float32 (batch, 3, size, size)."""
        ...


@dataclass(frozen=True)
class CsvJob:
    """Which images are classified into which table."""

    folder: Path
    table: Path
    top: int
    """Classes of an image."""
    made_by: Mapping[str, Any]
    """What decides the answers, see `bundle_settings`."""
    fresh: bool = False
    """Replace the table instead of resuming it."""


@dataclass
class CsvSummary:
    """What a table holds."""

    images: int
    unreadable: int
    resumed: int
    """Rows of an earlier run."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Files that are not images, by suffix."""


def bundle_settings(
    bundle: Path, precision: str | None, add_classes: Sequence[str], threshold: bool = True
) -> dict[str, Any]:
    """What decides a bundle's answers. Its manifest has the sha256 of every file. Raises BundleProblem.

    Tables of bundles without a threshold do not name it, as those of older versions.
    """
    manifest = read_manifest(bundle)
    has_threshold = read_confidence(bundle, manifest).threshold is not None
    return {
        "bundle": hashlib.sha256((bundle / "manifest.json").read_bytes()).hexdigest(),
        "precision": precision or next(iter(manifest["precisions"])),
        "added classes": list(add_classes),
        **({"threshold": threshold} if has_threshold else {}),
    }


def write_folder_csv(
    classifier: ImageClassifier, job: CsvJob, report: Callable[[int, int], None] = lambda done, total: None
) -> CsvSummary:
    """Write a row for each image below a folder: its path below it, classes and probabilities, or the error.

    Images that cannot be read have their reason in the last column. A bundle with a threshold has the column
    `none_of_these` before it: true, false, or empty if the threshold is not applied. report: receives the number of
    images done and in all. Raises CsvProblem for a folder without images and for a table that is not of the same images
    and settings, and OSError if the system refuses to read the folder or to write.
    """
    summary = CsvSummary(0, 0, 0)
    paths = _listed(job.folder, summary.skipped)
    summary.images = len(paths)
    top = min(job.top, len(classifier.class_names))
    names = [path.relative_to(job.folder).as_posix() for path in paths]
    made_of = {**job.made_by, "classes of an image": job.top, "images": _digest_of_names(names)}
    with _opened_table(job, made_of, _header(top, classifier.confidence)) as table:
        summary.resumed = table.rows
        report(table.rows, len(paths))
        with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as pool:
            for start in range(table.rows, len(paths), BATCH_SIZE):
                batch = slice(start, start + BATCH_SIZE)
                loaded = list(pool.map(lambda path: _load(path, classifier.preprocessing), paths[batch]))
                table.append(_rows(classifier, names[batch], loaded, top), sum(isinstance(i, str) for i in loaded))
                report(table.rows, len(paths))
        summary.unreadable = table.unreadable
    return summary


def _listed(folder: Path, skipped: Counter[str]) -> list[Path]:
    if not folder.is_dir():
        raise CsvProblem("no such folder of images", path=folder)
    paths = list(walk_images(folder, skipped))
    if not paths:
        raise CsvProblem("holds no images", path=folder, found=skipped_text(skipped) or None)
    return paths


def _digest_of_names(names: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for name in names:
        encoded = name.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(4, "big") + encoded)
    return digest.hexdigest()


def _load(path: Path, preprocessing: Preprocessing) -> np.ndarray | str:
    """The model's input of an image, float32 (3, size, size), or why it cannot be read."""
    if path.exists() and not path.is_file():  # opening a pipe waits for ever
        return "is not a regular file"
    try:
        return load_prepared(path, preprocessing)
    except UnreadableImage as error:
        return " ".join(str(error).removeprefix(f"{path}: ").split())


def _header(top: int, confidence: Confidence) -> list[str]:
    more = [name for i in range(2, top + 1) for name in (f"class_{i}", f"probability_{i}")]
    return ["path", "class", "probability", *more, *_none_cell(confidence, "none_of_these"), "error"]


def _none_cell(confidence: Confidence, cell: str) -> list[str]:
    """The cell of the column `none_of_these`; nothing without such a column."""
    return [] if confidence.threshold is None else [cell]


def _rows(
    classifier: ImageClassifier, names: Sequence[str], loaded: Sequence[np.ndarray | str], top: int
) -> list[list[str]]:
    """The rows of a batch. loaded: for each name the input or an error."""
    inputs = [item for item in loaded if not isinstance(item, str)]
    confidence = classifier.confidence
    answers = iter(confidence.probabilities(classifier.logits(np.stack(inputs))) if inputs else ())
    rows = []
    for name, item in zip(names, loaded, strict=True):
        if isinstance(item, str):
            rows.append([name, *[""] * (2 * top), *_none_cell(confidence, ""), item])
            continue
        probabilities = next(answers)
        order = np.argsort(-probabilities, kind="stable")[:top]
        cells = [cell for i in order for cell in (classifier.class_names[i], f"{probabilities[i]:.6f}")]
        none = confidence.is_none(classifier.class_names[order[0]], probabilities[order[0]])
        rows.append([name, *cells, *_none_cell(confidence, NONE_CELLS[none]), ""])
    return rows


class _Table:
    """An open CSV file and its state."""

    def __init__(self, file: IO[bytes], state_path: Path, made_of: Mapping[str, Any]) -> None:
        self.rows = self.unreadable = 0
        self._file, self._state_path, self._made_of = file, state_path, made_of
        self._digest, self._bytes = hashlib.sha256(), 0

    def start(self, header: Sequence[str]) -> None:
        """Begin an empty table. Its state comes first, so that a run that is killed here can be resumed."""
        self._save_state()
        self._write([header])

    def resume(self, state: Mapping[str, Any], path: Path) -> None:
        """Continue after the rows that an earlier run completed. Raises CsvProblem if they have changed."""
        left = state["bytes"]
        while block := self._file.read(min(READ_SIZE, left)):
            self._digest.update(block)
            left -= len(block)
        if left or self._digest.hexdigest() != state["sha256"]:
            raise CsvProblem("was changed since the run that wrote it", path=path, remedy=RESTART)
        self._file.truncate()
        self.rows, self.unreadable, self._bytes = state["rows"], state["unreadable"], state["bytes"]

    def append(self, rows: Sequence[Sequence[str]], unreadable: int) -> None:
        """Write the rows of a batch. unreadable: the number of them that have an error."""
        self.rows += len(rows)
        self.unreadable += unreadable
        self._write(rows)

    def _write(self, rows: Sequence[Sequence[str]]) -> None:
        text = io.StringIO(newline="")
        csv.writer(text).writerows(rows)  # lines end in CRLF (RFC 4180), so a cell with either is quoted
        content = text.getvalue().encode("utf-8", "backslashreplace")
        self._file.write(content)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._digest.update(content)
        self._bytes += len(content)
        self._save_state()

    def _save_state(self) -> None:
        state = {
            "format": STATE_FORMAT,
            "made_of": self._made_of,
            "rows": self.rows,
            "unreadable": self.unreadable,
            "bytes": self._bytes,
            "sha256": self._digest.hexdigest(),
        }
        unfinished = self._state_path.with_name(f"{self._state_path.name}.new")
        with unfinished.open("w", encoding="utf-8") as file:
            json.dump(state, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(self._state_path)


RESTART = "start again with --fresh, or choose another file"


@contextmanager
def _opened_table(job: CsvJob, made_of: Mapping[str, Any], header: Sequence[str]) -> Iterator[_Table]:
    """The table of a job, with its header and the rows of an interrupted run. Raises CsvProblem."""
    state_path = job.table.with_name(f"{job.table.name}.state.json")
    is_new = job.fresh or not job.table.exists() or job.table.stat().st_size == 0
    state = None if is_new else _read_state(job.table, state_path)
    if state is not None and (changed := [key for key in made_of if state["made_of"].get(key) != made_of[key]]):
        raise CsvProblem(
            "was written with different settings or from different images",
            path=job.table,
            found=", ".join(changed),
            remedy=RESTART,
        )
    if state is None:
        state_path.unlink(missing_ok=True)  # before the table that it describes is emptied
    with job.table.open("wb" if state is None else "r+b") as file:
        table = _Table(file, state_path, made_of)
        if state is None:
            table.start(header)
        else:
            table.resume(state, job.table)
            if not state["bytes"]:
                table.start(header)
        yield table


def _read_state(table: Path, path: Path) -> dict[str, Any]:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        problem = f"already exists and cannot be resumed, because {path.name} is missing or unreadable"
        raise CsvProblem(problem, path=table, remedy=RESTART) from error
    if not isinstance(state, dict) or state.get("format") != STATE_FORMAT or not _is_whole(state):
        raise CsvProblem(f"is not a state of format {STATE_FORMAT}", path=path, remedy=RESTART)
    return state


def _is_whole(state: Mapping[str, Any]) -> bool:
    counts = all(isinstance(state.get(key), int) for key in ("rows", "unreadable", "bytes"))
    return counts and isinstance(state.get("sha256"), str) and isinstance(state.get("made_of"), dict)


# --- the command line of predict.py ----------------------------------------------------------------------


def folder_csv_command(classifier: ImageClassifier, job: CsvJob) -> int:
    """Write a table, with progress on standard error; returns the exit status of predict.py."""
    try:
        summary = write_folder_csv(classifier, job, _ProgressLine())
    except CsvProblem as error:
        print(visible(f"error: {error}"), file=sys.stderr)
        return 1
    except OSError as error:
        print(visible(f"error: {error.filename or job.table}: {error.strerror}"), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted; rerun the same command to resume.", file=sys.stderr)
        return INTERRUPTED
    if skipped := skipped_text(summary.skipped):
        print(f"note: {job.folder}: {skipped}", file=sys.stderr)
    print(f"{job.table}: {summary_text(summary)}")
    return 1 if summary.unreadable == summary.images else 0


def summary_text(summary: CsvSummary) -> str:
    """A table in one line, such as "1,200 images, 400 of them from an earlier run; 2 could not be read"."""
    text = f"{summary.images:,} image{'' if summary.images == 1 else 's'}"
    if summary.resumed:
        text += f", {summary.resumed:,} of them from an earlier run"
    return f"{text}; {summary.unreadable:,} could not be read" if summary.unreadable else text


class _ProgressLine:
    """Says on standard error how far the work is: one line on a terminal, else a line a minute."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._next = time.monotonic() + (0 if self._terminal else LOG_SECONDS)

    def __call__(self, done: int, total: int) -> None:
        last = done == total
        if time.monotonic() < self._next and not (last and self._terminal):
            return
        self._next = time.monotonic() + (TERMINAL_SECONDS if self._terminal else LOG_SECONDS)
        line = f"{done:,} of {total:,} images ({done / total:.0%})"
        start, end = ("\r", "\n" if last else "") if self._terminal else ("", "\n")
        print(f"{start}{line}", end=end, file=sys.stderr, flush=True)
