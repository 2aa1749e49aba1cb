"""The project's errors: what a user can mend. Each becomes one message and an exit code, never a traceback."""

from __future__ import annotations

from collections.abc import Sequence


class ComkdError(Exception):
    """Something the user can mend; its text is the problem with whatever of these fields is given.

    problem: what is wrong, without what the fields say. path: the file or folder. field: of the recipe or document.
    found, allowed: the value that is wrong, and those that are right. remedy: what to do, as an imperative.
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

    def __str__(self) -> str:
        """`path: field: problem: found (allowed: a, b); remedy`, less what is not given."""
        parts = [self.path, self.field, self.problem, self.found]
        text = ": ".join(str(part) for part in parts if part is not None)
        if self.allowed is not None:
            allowed = self.allowed if isinstance(self.allowed, str) else ", ".join(map(str, self.allowed))
            text += f" (allowed: {allowed})"
        return text if self.remedy is None else f"{text}; {self.remedy}"


class MisuseError(ComkdError):
    """A command line that can't be meant."""

    exit_code = 2


class RecipeError(ComkdError):
    """A recipe that can't be read or does not say a runnable thing; the message lists every fault."""


class DataError(ComkdError):
    """A folder, class list or image set that can't be used as it is."""


class ModelError(ComkdError):
    """An architecture or weights that open_clip can't build or that do not fit each other."""


class CheckpointError(ComkdError):
    """A file that is not the checkpoint it should be, or belongs to another run."""


class TrainingError(ComkdError):
    """A run that can't go on: memory, precision, or losses that are no longer numbers."""


class PeerError(TrainingError):
    """Another process of the run that ended, or did not answer in time."""


class BatchTooSmallError(ComkdError):
    """A batch without enough images for a batch statistic."""


class ExportError(ComkdError):
    """A student that can't be exported, or whose graphs do not answer as it does."""


class BundleError(ComkdError):
    """A bundle with a missing, changed or unreadable file."""


class WriteError(ComkdError):
    """A file or folder that the system refuses to write, such as on a full disk."""

    def __init__(self, problem: str, *, path: object, remedy: str) -> None:
        super().__init__(problem, path=path, remedy=remedy)


class Interrupted(ComkdError):
    """The user or the scheduler asked the run to stop; its state is saved."""

    def __init__(self, message: str, exit_code: int = 130) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
