"""Output of the commands: consoles, tables, progress bars, and plain lines if there is no terminal."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import click
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.progress import BarColumn, ProgressColumn, Task, TaskID
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from comkd_cli.edge.visible import visible
from comkd_cli.events import Epoch, Event, Notice, Progress, Report, Stage
from comkd_cli.runtime import ranks

PLAIN_LINE_EVERY_SECONDS = 60  # between progress lines, if there is no terminal for a bar
PLAIN_WIDTH = 200  # characters of a table if there is no terminal; wider tables are not cut
LEAST_TEXT_WIDTH = 16  # characters; a narrower text column is not readable, so the rows are stacked instead
BAR_FROM_WIDTH = 80  # characters of a terminal with room for a progress bar beside the figures
GAP = 2  # characters between the columns of a table
ASCII = {"±": "+/-", "…": "..."}


def encodable(text: str) -> bool:
    """Whether standard output can encode a text."""
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def print_json(document: Any, indent: int | None = 2) -> None:
    """Print a document as JSON; characters that the terminal cannot encode are escaped."""
    text = json.dumps(document, indent=indent, ensure_ascii=False)
    click.echo(text if encodable(text) else json.dumps(document, indent=indent))


class _Console(Console):
    """Writes the control characters of texts as escapes: they may come from the names in a file."""

    def print(self, *objects: Any, **options: Any) -> None:
        """As rich's."""
        super().print(*(visible(each) if isinstance(each, str) else each for each in objects), **options)


def output() -> Console:
    """The console for results: standard output, not wrapped if it is not a terminal."""
    # emoji=False: a class or a file may be named :dog:
    console = _Console(highlight=False, emoji=False, quiet=not ranks.is_main())
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    return console


@dataclass(frozen=True)
class Column:
    """A column of a table."""

    head: str
    kind: Literal["text", "word", "figure"] = "figure"
    """`text` may be folded; a `word` and a right-aligned `figure` are never broken."""


def print_table(
    columns: Sequence[Column], rows: Iterable[Sequence[str | Text]], title: str = "", note: str = ""
) -> None:
    """Print a table to standard output; on a terminal too narrow for its figures, each row is a block of its own.

    rows: plain text, without markup. A row has one cell per column; the first cell names the row.
    """
    console = output()
    if title:
        console.print(_text(title, "italic"))
    heads = [_text(column.head) for column in columns]
    split = [_text(column.head.replace(" ", "\n")) for column in columns]
    cells = [[_text(visible(cell, one_line=True) if isinstance(cell, str) else cell) for cell in row] for row in rows]
    if not console.is_terminal:
        table = _beside(columns, heads, cells)
        console.width = sys.maxsize  # so that its full width can be measured
        console.width = max(PLAIN_WIDTH, console.measure(table).maximum)
        console.print(table)
    elif _least_width(columns, heads, cells) <= console.width:
        console.print(_beside(columns, heads, cells))
    elif _least_width(columns, split, cells) <= console.width:
        console.print(_beside(columns, split, cells))
    else:
        for row in cells:
            console.print(Text(row[0].plain, "bold", overflow="fold"))
            console.print(Padding(_pairs(zip(heads[1:], row[1:], strict=True)), (0, 0, 0, GAP)))
    if note:
        console.print(_text(note, "italic dim"))


def lines(texts: Iterable[str]) -> Text:
    """A cell of a table with a line for each text that is not empty; line breaks within a text are escaped."""
    return _text("\n".join(visible(text, one_line=True) for text in texts if text))


def print_pairs(pairs: Mapping[str, str]) -> None:
    """Print names and their values to standard output, one row each."""
    output().print(_pairs((_text(name, "bold"), _text(value)) for name, value in pairs.items()))


def _least_width(columns: Sequence[Column], heads: Sequence[Text], rows: Sequence[Sequence[Text]]) -> int:
    """The width in characters that a table needs if only its text columns are folded."""
    widths = []
    for position, (column, head) in enumerate(zip(columns, heads, strict=True)):
        widest = max([0, *(line.cell_len for row in rows for line in row[position].split())])
        longest_head = max(line.cell_len for line in head.split())
        widths.append(max(min(widest, LEAST_TEXT_WIDTH) if column.kind == "text" else widest, longest_head))
    return sum(widths) + GAP * (len(widths) - 1)


def _beside(columns: Sequence[Column], heads: Sequence[Text], rows: Sequence[Sequence[Text]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, GAP, 0, 0))
    for column, head in zip(columns, heads, strict=True):
        justify: Literal["left", "right"] = "right" if column.kind == "figure" else "left"
        table.add_column(head, justify=justify, no_wrap=column.kind != "text", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _pairs(pairs: Iterable[tuple[Text, Text]]) -> Table:
    """Two columns, the second folded; rows without a value are omitted."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, GAP, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in pairs:
        if value.plain:
            table.add_row(name, value)
    return table


def _text(cell: str | Text, style: str = "") -> Text:
    """Text without markup; characters that standard output cannot encode are replaced if ASCII has a substitute."""
    if isinstance(cell, Text):
        return cell
    shown = visible(cell)
    return Text(shown if encodable(shown) else "".join(ASCII.get(character, character) for character in shown), style)


def messages() -> Console:
    """The console for messages and progress: standard error, so that the output can be piped.

    Of several processes only the main one prints; any process prints its own error.
    """
    return _Console(stderr=True, highlight=False, emoji=False, soft_wrap=True, quiet=not ranks.is_main())


def figures_text(figures: Mapping[str, float], held_out: bool = False) -> str:
    """`loss 0.152  refinement 0.144 (97%)  gate 0.063  test top-1 93.61 %`.

    A term's share of the gradient is shown in brackets if it was measured. Test images that could not be read are
    counted if there are any. held_out: the test images are held-out ones, and are called so.
    """
    return "  ".join(_figures(figures, held_out))


def _figures(figures: Mapping[str, float], held_out: bool = False) -> list[str]:
    parts = []
    images = "held-out" if held_out else "test"
    for name, value in figures.items():
        if name.endswith("_gradient_share") or name == "test_images":
            continue
        if name == "test_unreadable":
            if value:
                total = value + figures.get("test_images", 0)
                parts.append(f"{value:.0f} of {total:.0f} {images} images could not be read")
            continue
        if name.endswith("_percent"):
            text = name.removesuffix("_percent").replace("top1", "top-1").replace("_", " ")
            text = f"{images}{text.removeprefix('test')}" if text.startswith("test ") else text
            parts.append(f"{text} {value:.2f} %")
            continue
        share = figures.get(f"{name}_gradient_share")
        parts.append(f"{name} {value:.3g}" + (f" ({share:.0%})" if share is not None else ""))
    return parts


class _Bar(BarColumn):
    """A bar, if the terminal has room for it beside the figures."""

    def __init__(self, console: Console) -> None:
        super().__init__(bar_width=24)
        self._console = console

    def render(self, task: Task) -> Any:
        return super().render(task) if self._console.width >= BAR_FROM_WIDTH else Text("")


class _Line(ProgressColumn):
    """The work, its progress, and as many of its figures as fit on the line.

    A figure that does not fit is omitted, never cut: part of a number would be a wrong number.
    """

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def render(self, task: Task) -> Text:
        room = self._console.width - 1 - (25 if self._console.width >= BAR_FROM_WIDTH else 0)
        share = f"{task.percentage:3.0f}%"
        label = task.description
        if len(label) + 1 + len(share) > room:
            label = label[: max(0, room - len(share) - 4)] + "..."
        line = Text(f"{label} {share}")
        speed = task.finished_speed or task.speed
        left = task.time_remaining
        parts = [
            "" if left is None else str(timedelta(seconds=math.ceil(left))),
            "" if speed is None or not task.fields["unit"] else f"{speed:.0f} {task.fields['unit']}/s",
            *task.fields["figures"],
        ]
        for part in filter(None, parts):
            if len(line) + 1 + len(part) <= room:
                line.append(f" {part}", "dim")
        return line


@contextmanager
def starting() -> Iterator[None]:
    """Show on a terminal that the program is starting: importing torch takes seconds."""
    console = messages()
    with console.status("starting", spinner="dots" if console.encoding.startswith("utf") else "line"):
        yield


@contextmanager
def reporting(quiet: bool = False) -> Iterator[Report]:
    """A callback for flows that shows their events on standard error within the block.

    On a terminal: one live bar for the current work, and a line per epoch. Elsewhere only lines.
    """
    console = messages()
    quiet = console.quiet = quiet or console.quiet
    off = quiet or not console.is_terminal
    # rich would replace the standard streams, and forked workers would write through its proxies.
    bars = Bars(
        _Bar(console),
        _Line(console),
        console=console,
        transient=True,
        disable=off,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    with bars:
        yield _Reporter(console, bars)


class _Reporter:
    """Prints a line for an event, or moves the bar."""

    def __init__(self, console: Console, bars: Bars) -> None:
        self._console = console
        self._bars = bars
        self._task: TaskID | None = None
        self._label = ""
        self._scores: list[str] = []
        """Of the last epoch of this stage that was scored."""
        self._printed_at = time.monotonic()

    def __call__(self, event: Event) -> None:
        if isinstance(event, Progress):
            self._move(event)
            return
        if isinstance(event, Stage):
            self._clear()
            self._scores = []
            self._console.print(f"[bold]{escape(event.title)}[/bold]")
        elif isinstance(event, Epoch):
            percentages = {name: value for name, value in event.figures.items() if name.endswith("_percent")}
            self._scores = _figures(percentages, event.held_out) or self._scores
            width = len(str(event.total))
            self._console.print(
                f"  epoch {event.number:>{width}}/{event.total}  {figures_text(event.figures, event.held_out)}  "
                f"[dim]{event.images_per_second:.0f} {event.unit}/s[/dim]",
                soft_wrap=not self._console.is_terminal,  # rich wraps between words, a terminal within them
            )
        elif isinstance(event, Notice):
            self._console.print(f"[yellow]note:[/yellow] {escape(event.text)}")

    def _move(self, event: Progress) -> None:
        if self._task is None or event.label != self._label:
            self._clear()
            self._task = self._bars.add_task(
                visible(event.label, one_line=True), total=event.total, figures=(), unit=event.unit
            )
            self._label = event.label
        # Scores come first, since the line holds as many figures as fit. Only training has figures of its own.
        figures = [*self._scores, *_figures(event.figures)] if event.figures else []
        self._bars.update(self._task, completed=event.done, total=event.total, figures=figures)
        now = time.monotonic()
        if not self._console.is_terminal and now - self._printed_at > PLAIN_LINE_EVERY_SECONDS:
            self._printed_at = now
            task = self._bars.tasks[self._bars.task_ids.index(self._task)]
            left = "" if task.time_remaining is None else f"  about {task.time_remaining / 60:.0f} min left"
            self._console.print(f"  {event.label}  {task.percentage:.0f} %  {'  '.join(figures)}{left}", markup=False)

    def _clear(self) -> None:
        if self._task is not None:
            self._bars.remove_task(self._task)
            self._task = None
