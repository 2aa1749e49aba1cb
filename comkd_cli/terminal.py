"""How commands speak to people: consoles, progress bars, and plain lines where there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import (
    Progress as Bars,
)
from rich.text import Text

from comkd_cli import launch
from comkd_cli.progress import Epoch, Event, Notice, Progress, Report, Stage

PLAIN_LINE_EVERY_SECONDS = 60  # how often long work says where it is, where there is no terminal for a bar


def output() -> Console:
    """The console for results: standard output, never wrapped where it is not a terminal."""
    # emoji=False: a class or a file may be named :dog:
    console = Console(highlight=False, emoji=False, quiet=not launch.is_main())
    if not console.is_terminal:
        console.width = 200
    return console


def messages() -> Console:
    """The console for everything said on the way: standard error, so that output can be piped.

    Of several processes the main one speaks; those that raise an error say so themselves.
    """
    return Console(stderr=True, highlight=False, emoji=False, soft_wrap=True, quiet=not launch.is_main())


def figures_text(figures: Mapping[str, float]) -> str:
    """`loss 0.152  refinement 0.144 (97%)  gate 0.063  test top-1 93.61 %`.

    In brackets stands a term's share of the gradient, where it was measured. Test images that could not be read are
    told where there are some.
    """
    parts = []
    for name, value in figures.items():
        if name.endswith("_gradient_share") or name == "test_images":
            continue
        if name == "test_unreadable":
            if value:
                total = value + figures.get("test_images", 0)
                parts.append(f"{value:.0f} of {total:.0f} test images could not be read")
            continue
        if name.endswith("_percent"):
            parts.append(f"{name.removesuffix('_percent').replace('top1', 'top-1').replace('_', ' ')} {value:.2f} %")
            continue
        share = figures.get(f"{name}_gradient_share")
        parts.append(f"{name} {value:.3g}" + (f" ({share:.0%})" if share is not None else ""))
    return "  ".join(parts)


class _Rate(ProgressColumn):
    """Images, or what else is counted, a second, over the last seconds."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.0f} {task.fields['unit']}/s", style="cyan")


@contextmanager
def reporting(quiet: bool = False) -> Iterator[Report]:
    """A callback for flows that shows their events on standard error while the block lasts.

    On a terminal: one live bar for the work at hand, and a line for each epoch. Elsewhere lines alone.
    """
    console = messages()
    quiet = console.quiet = quiet or console.quiet
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:3.0f}%"),
        _Rate(),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[figures]}"),
    )
    off = quiet or not console.is_terminal
    # rich would put proxies in the place of the standard streams, and forked workers would write through them.
    bars = Bars(*columns, console=console, transient=True, disable=off, redirect_stdout=False, redirect_stderr=False)
    with bars:
        yield _Reporter(console, bars)


class _Reporter:
    """Turns each event into a line or a movement of the bar."""

    def __init__(self, console: Console, bars: Bars) -> None:
        self._console = console
        self._bars = bars
        self._task: TaskID | None = None
        self._label = ""
        self._said_at = time.monotonic()

    def __call__(self, event: Event) -> None:
        if isinstance(event, Progress):
            self._move(event)
            return
        if isinstance(event, Stage):
            self._clear()
            self._console.print(f"[bold]{escape(event.title)}[/bold]")
        elif isinstance(event, Epoch):
            width = len(str(event.total))
            self._console.print(
                f"  epoch {event.number:>{width}}/{event.total}  {figures_text(event.figures)}  "
                f"[dim]{event.images_per_second:.0f} images/s[/dim]"
            )
        elif isinstance(event, Notice):
            self._console.print(f"[yellow]note:[/yellow] {escape(event.text)}")

    def _move(self, event: Progress) -> None:
        if self._task is None or event.label != self._label:
            self._clear()
            self._task = self._bars.add_task(event.label, total=event.total, figures="", unit=event.unit)
            self._label = event.label
        self._bars.update(self._task, completed=event.done, total=event.total, figures=figures_text(event.figures))
        now = time.monotonic()
        if not self._console.is_terminal and now - self._said_at > PLAIN_LINE_EVERY_SECONDS:
            self._said_at = now
            task = self._bars.tasks[self._bars.task_ids.index(self._task)]
            left = "" if task.time_remaining is None else f"  about {task.time_remaining / 60:.0f} min left"
            figures = figures_text(event.figures)
            self._console.print(f"  {event.label}  {task.percentage:.0f} %  {figures}{left}", markup=False)

    def _clear(self) -> None:
        if self._task is not None:
            self._bars.remove_task(self._task)
            self._task = None
