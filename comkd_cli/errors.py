"""The project's errors: what a user can fix. Each becomes one message and an exit code, never a traceback."""

from __future__ import annotations

import copyreg
import difflib
from collections.abc import Iterable, Sequence
from typing import Any


class ComkdError(Exception):
    """Something the user can fix; its text is the problem with the fields that are given.

    problem: what is wrong, without repeating the fields. path: the file or folder. field: of the recipe or document.
    found, allowed: the invalid value, and the valid ones. remedy: what to do, as an imperative.
    """

    exit_code = 1

    def __init__(
        self,
        problem: str,
        *,
        path: object = None,
        field: str | None = None,
        found: object = None,
        allowed: Sequence[object] | str | None = None,
        remedy: str | None = None,
    ) -> None:
        super().__init__(problem)
        self.problem, self.path, self.field, self.remedy = problem, path, field, remedy
        self.found, self.allowed = found, allowed

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle without calling `__init__`, so that errors with required fields can be sent between processes too."""
        return copyreg.__newobj__, (type(self), self.problem), self.__dict__  # type: ignore[attr-defined]

    def __str__(self) -> str:
        """`path: field: problem: found (allowed: a, b); remedy`, without the fields that are not given."""
        parts = [self.path, self.field, self.problem, self.found]
        text = ": ".join(str(part) for part in parts if part is not None)
        if self.allowed is not None:
            allowed = self.allowed if isinstance(self.allowed, str) else ", ".join(map(str, self.allowed))
            text += f" (allowed: {allowed})"
        return text if self.remedy is None else f"{text}; {self.remedy}"


class MisuseError(ComkdError):
    """Invalid command-line arguments."""

    exit_code = 2


class RecipeError(ComkdError):
    """A recipe that could not be read or cannot be run; the message lists every fault."""


class DataError(ComkdError):
    """A folder, class list or image set that cannot be used as it is."""


class ModelError(ComkdError):
    """An architecture or weights that open_clip cannot build, or that do not match each other."""


class CheckpointError(ComkdError):
    """A file that is not a valid checkpoint, or is another run's."""


class TrainingError(ComkdError):
    """A run that cannot continue: out of memory, an unsupported precision, or losses that are NaN."""


class PeerError(TrainingError):
    """Another process of the run that exited, or did not answer in time."""


class BatchTooSmallError(ComkdError):
    """A batch without enough images for a batch statistic."""


class ExportError(ComkdError):
    """A student that cannot be exported, or whose graphs failed the parity check."""


class BundleError(ComkdError):
    """A bundle with a missing, changed or unreadable file."""


class WriteError(ComkdError):
    """A file or folder that could not be written, as on a full disk."""

    def __init__(self, problem: str, *, path: object, remedy: str) -> None:
        super().__init__(problem, path=path, remedy=remedy)


class InUseError(ComkdError):
    """A run, teacher, bundle or dataset that another process is writing."""


class Interrupted(ComkdError):
    """The user or the scheduler stopped the run; its checkpoint is saved."""

    def __init__(self, message: str, exit_code: int = 130) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def did_you_mean(name: str, valid: Iterable[str]) -> str | None:
    """The remedy for a mistyped name: the nearest valid one; None if none is near."""
    close = difflib.get_close_matches(name, list(valid), n=1)
    return f"did you mean {close[0]}?" if close else None


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
