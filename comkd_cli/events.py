"""What long work says while it runs. Flows report these events through a callback and never print."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Stage:
    """A new piece of work begins, such as training the teacher."""

    title: str


@dataclass(frozen=True)
class Progress:
    """How far the present piece of work is."""

    label: str
    done: int
    total: int
    figures: Mapping[str, float] = field(default_factory=dict)
    """Losses and the like, by name."""
    unit: str = "images"
    """What `done` and `total` are counted in."""


@dataclass(frozen=True)
class Epoch:
    """An epoch is over; its averages."""

    number: int
    """From 1."""
    total: int
    images_per_second: float
    figures: Mapping[str, float]


@dataclass(frozen=True)
class Notice:
    """Something the user should know that is no error."""

    text: str


Event = Stage | Progress | Epoch | Notice
Report = Callable[[Event], None]


def once(report: Report, told: set[str]) -> Report:
    """The same report without the notices whose text is in `told`; those that pass are added to it.

    For what is said of a dataset that several students or seeds open one after another.
    """

    def pass_on(event: Event) -> None:
        if isinstance(event, Notice):
            if event.text in told:
                return
            told.add(event.text)
        report(event)

    return pass_on


def ignore_event(_event: Event) -> None:
    """A report for work whose user was told already, or that has none."""
