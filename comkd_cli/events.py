"""Events of long work. Flows report them through a callback and never print."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Stage:
    """A new stage begins, such as training the teacher."""

    title: str


@dataclass(frozen=True)
class Progress:
    """Progress within the current stage."""

    label: str
    done: int
    total: int
    figures: Mapping[str, float] = field(default_factory=dict)
    """Losses and other values, by name."""
    unit: str = "images"
    """Of `done` and `total`; empty for a share of the work, which has no unit."""


@dataclass(frozen=True)
class Epoch:
    """An epoch has ended; its averages."""

    number: int
    """From 1."""
    total: int
    images_per_second: float
    figures: Mapping[str, float]
    held_out: bool = False
    """Whether the scores are on images that were held out of the training ones, not on a test split."""
    unit: str = "images"
    """Of `images_per_second`."""


@dataclass(frozen=True)
class Notice:
    """Information for the user that is not an error."""

    text: str


Event = Stage | Progress | Epoch | Notice
Report = Callable[[Event], None]


def once(report: Report, seen: set[str]) -> Report:
    """The same report without the notices whose text is in `seen`; those that pass are added to it.

    Several students or seeds open the same dataset one after another; its notices are shown once.
    """

    def pass_on(event: Event) -> None:
        if isinstance(event, Notice):
            if event.text in seen:
                return
            seen.add(event.text)
        report(event)

    return pass_on


def ignore_event(_event: Event) -> None:
    """A report that shows nothing."""
