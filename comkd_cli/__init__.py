"""comkd: distil a large CLIP model into a small one, prove what it kept, and pack it for devices.

The names below are the Python API, described in docs/python.md. Importing the package loads none of them, and so no
torch: each is imported when it is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from comkd_cli.api.exporting import Bundle, export
    from comkd_cli.api.runs import Distilled, distill
    from comkd_cli.api.scores import evaluate
    from comkd_cli.api.student import LoadedStudent, Prediction, Transform, load_student
    from comkd_cli.errors import ComkdError
    from comkd_cli.events import Epoch, Event, Notice, Progress, Stage
    from comkd_cli.flows.classes import Added
    from comkd_cli.flows.export import ExportOptions
    from comkd_cli.results.records import Missing, Record, Results

__all__ = [
    "Added",
    "Bundle",
    "ComkdError",
    "Distilled",
    "Epoch",
    "Event",
    "ExportOptions",
    "LoadedStudent",
    "Missing",
    "Notice",
    "Prediction",
    "Progress",
    "Record",
    "Results",
    "Stage",
    "Transform",
    "distill",
    "evaluate",
    "export",
    "load_student",
]

_PLACES = {
    "api.exporting": ("Bundle", "export"),
    "api.runs": ("Distilled", "distill"),
    "api.scores": ("evaluate",),
    "api.student": ("LoadedStudent", "Prediction", "Transform", "load_student"),
    "errors": ("ComkdError",),
    "events": ("Epoch", "Event", "Notice", "Progress", "Stage"),
    "flows.classes": ("Added",),
    "flows.export": ("ExportOptions",),
    "results.records": ("Missing", "Record", "Results"),
}

if not TYPE_CHECKING:  # a type checker would accept any name

    def __getattr__(name: str) -> object:
        """Import a name of `__all__` from its module."""
        for place, names in _PLACES.items():
            if name in names:
                found = getattr(import_module(f"{__name__}.{place}"), name)
                globals()[name] = found
                return found
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        """The names of `__all__` beside those that are loaded."""
        return sorted({*globals(), *__all__})
