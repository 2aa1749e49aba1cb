"""The project's errors: what a user can mend. Each becomes one message and an exit code, never a traceback."""


class ComkdError(Exception):
    """Something the user can mend. The message names the file, the field and the remedy."""

    exit_code = 1


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

    def __init__(self, path: object, reason: str, remedy: str) -> None:
        super().__init__(f"{path}: can't be written: {reason}; {remedy}")
        self.reason = reason


class Interrupted(ComkdError):
    """The user or the scheduler asked the run to stop; its state is saved."""

    def __init__(self, message: str, exit_code: int = 130) -> None:
        super().__init__(message)
        self.exit_code = exit_code
