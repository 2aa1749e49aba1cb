"""results.json and its tables, in a folder to which every evaluation adds its records."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from comkd_cli.errors import ComkdError
from comkd_cli.events import Notice, Report
from comkd_cli.files import write_text
from comkd_cli.results.records import (
    Results,
    encodable,
    encodable_results,
    from_json,
    merged,
    of_other_images,
    to_json,
)
from comkd_cli.results.tables import to_csv, to_latex, to_markdown

NAME = "results.json"
LOCK_NAME = f".{NAME}.lock"
LOCK_SECONDS = 60.0  # a writer holds the lock for milliseconds


def add_results(folder: Path, fresh: Results, report: Report) -> Results:
    """Add an evaluation's results to those of a folder, and return all of them.

    Concurrent evaluations lose none of each other's results. An unreadable results.json is renamed, with a notice.
    Raises ComkdError if a file could not be written.
    """
    fresh = encodable_results(fresh)
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        kept = _kept(folder / NAME, report)
        results = merged(kept, fresh)
        _write(folder, results)
    if replaced := of_other_images(kept, fresh):
        names = ", ".join(dict.fromkeys(record.dataset for record in replaced))
        records = f"{len(replaced)} record{'s' if len(replaced) > 1 else ''}"
        report(
            Notice(
                f"{folder / NAME}: the new scores replace {records} of the same models on other images of the dataset "
                f"{names}; to keep both, choose another folder with --out"
            )
        )
    return results


def read_results(folder: Path) -> Results:
    """The results of a folder; none if it has no results.json, or one that could not be read."""
    try:
        return from_json((folder / NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return Results(())


def _write(folder: Path, results: Results) -> None:
    write_text(folder / NAME, to_json(results))
    write_text(folder / "results.csv", to_csv(results.records))
    write_text(folder / "results.md", to_markdown(results))
    write_text(folder / "results.tex", to_latex(results))


def forget_model(folder: Path, model: str, report: Report) -> None:
    """Remove the records of a model whose file was replaced from a folder's results. A failure is a notice."""
    if not (folder / NAME).is_file():
        return
    try:
        with _locked(folder):
            kept = _kept(folder / NAME, report)
            records = [record for record in kept.records if record.model != encodable(model)]
            if len(records) < len(kept.records):
                _write(folder, Results(records, kept.missing))
    except (ComkdError, OSError) as error:
        report(Notice(f"{folder / NAME}: still holds the scores of the previous {model} ({error})"))


class ResultFiles:
    """Writes the results of one evaluation to a folder as they arrive.

    A failed write loses nothing: it is retried with the next results, and `problem` is its error.
    """

    def __init__(self, folder: Path, report: Report) -> None:
        self.folder = folder
        self.records_in_all = 0
        self.problem: ComkdError | None = None
        self._report = report
        self._unwritten = Results(())

    def add(self, fresh: Results) -> None:
        """Write results, with those of earlier failed writes."""
        self._unwritten = merged(self._unwritten, fresh)
        try:
            self.records_in_all = len(add_results(self.folder, self._unwritten, self._report).records)
        except ComkdError as error:
            self.problem = error
        except OSError as error:
            problem = f"could not be written: {error.strerror or error}"
            self.problem = ComkdError(problem, path=error.filename or self.folder)
        else:
            self.problem, self._unwritten = None, Results(())


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    lock = FileLock(folder / LOCK_NAME, timeout=LOCK_SECONDS)
    try:
        lock.acquire()
    except Timeout as error:
        raise ComkdError(
            f"another evaluation has held this lock for {LOCK_SECONDS:.0f} s",
            path=lock.lock_file,
            remedy="wait for that evaluation to end, or choose another folder with --out",
        ) from error
    except NotImplementedError:  # a file system without locks: the records are read again just before they are written
        yield
        return
    try:
        yield
    finally:
        lock.release()


def _kept(path: Path, report: Report) -> Results:
    try:
        return from_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return Results(())
    except (OSError, ValueError) as error:  # not a file, not text, not JSON, or not results
        aside = _free_name(path)
        path.replace(aside)
        report(Notice(f"{path}: could not be read as results ({error}); it was renamed to {aside}"))
        return Results(())


def _free_name(path: Path) -> Path:
    """`results.json.bak`, or the first of `results.json.bak2`, ... that does not exist."""
    aside = path.with_name(f"{path.name}.bak")
    number = 2
    while aside.exists():
        aside = path.with_name(f"{path.name}.bak{number}")
        number += 1
    return aside
