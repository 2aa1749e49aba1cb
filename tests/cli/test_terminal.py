"""Output on terminals of any width and encoding: figures are whole or absent, and JSON stays JSON."""

import io
import json
import sys

import pytest
from rich.console import Console
from rich.progress import Progress as Bars
from rich.text import Text

from comkd_cli.cli import terminal
from comkd_cli.cli.commands.export import _print_latency, _print_parity
from comkd_cli.cli.terminal import Column, figures_text, print_json, print_pairs, print_table, reporting
from comkd_cli.events import Epoch, Notice, Progress, Stage

COLUMNS = [Column("model", "text"), Column("state", "word"), Column("mean per class %"), Column("tower parameters")]
ROWS = [
    ("student runs/a recipe/eurosat/seed1/student.pt", "ready", "98.61", "304,293,888"),
    ("teacher", "incomplete", "99.44 ± 0.31", "1,327,832"),
]
FIGURES = ("98.61", "304,293,888", "99.44 ± 0.31", "1,327,832", "ready", "incomplete")


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    """The output of a function on a terminal of some width; None: in a pipe."""

    def show(width: int | None, show_it) -> str:  # type: ignore[no-untyped-def]
        if width is not None:
            monkeypatch.setattr(
                terminal,
                "output",
                lambda: Console(highlight=False, width=width, force_terminal=True, color_system=None),
            )
        show_it()
        return capsys.readouterr().out

    return show


@pytest.mark.parametrize("width", [40, 50, 60, 80, 120, None])
def test_no_figure_is_cut_at_any_width(shown, width: int | None) -> None:  # type: ignore[no-untyped-def]
    text = shown(width, lambda: print_table(COLUMNS, ROWS, title="Of all classes", note="a note to it"))
    lines = [line.rstrip() for line in text.splitlines()]
    for figure in FIGURES:
        assert any(figure in line for line in lines), figure
    assert "…" not in text
    assert width is None or max(map(len, lines)) <= width
    packed = "".join("".join(line.split()) for line in lines)
    assert "Ofallclasses" in packed
    assert "anotetoit" in packed


def test_a_wide_terminal_has_a_row_a_line_and_a_narrow_one_a_block_a_row(shown) -> None:  # type: ignore[no-untyped-def]
    wide = shown(120, lambda: print_table(COLUMNS, ROWS)).splitlines()
    assert [len(wide), wide[0].split()[:3]] == [3, ["model", "state", "mean"]]
    narrow = shown(40, lambda: print_table(COLUMNS, ROWS)).splitlines()
    at = narrow.index(next(line for line in narrow if line.startswith("teacher")))
    assert [line.split() for line in narrow[at + 1 :]] == [
        ["state", "incomplete"],
        ["mean", "per", "class", "%", "99.44", "±", "0.31"],
        ["tower", "parameters", "1,327,832"],
    ]


def test_heads_are_folded_before_rows_are_stacked(shown) -> None:  # type: ignore[no-untyped-def]
    lines = shown(56, lambda: print_table(COLUMNS, ROWS)).splitlines()
    assert [lines[0].split(), lines[3].split()[-2:]] == [["mean"], ["%", "parameters"]]
    assert any("304,293,888" in line and "98.61" in line for line in lines)


def test_a_table_wider_than_any_terminal_is_a_row_a_line_in_a_pipe(shown) -> None:  # type: ignore[no-untyped-def]
    columns = [Column("model", "text"), *(Column(f"figure {i}") for i in range(40))]
    lines = shown(None, lambda: print_table(columns, [("m" * 80, *["99.99"] * 40)])).splitlines()
    assert len(lines) == 2
    assert lines[1].split() == ["m" * 80, *["99.99"] * 40]


def test_what_has_no_value_is_left_out_of_a_block(shown) -> None:  # type: ignore[no-untyped-def]
    columns = [Column("model", "text"), Column("base"), Column("new")]
    text = shown(24, lambda: print_table(columns, [("m", "", "12,345,678.00"), ("n", "12,345,678.00", "")]))
    assert text.split() == ["m", "new", "12,345,678.00", "n", "base", "12,345,678.00"]


def test_a_cell_of_several_lines_has_these_and_no_others(shown) -> None:  # type: ignore[no-untyped-def]
    columns = [Column("check", "word"), Column("found", "text")]
    text = shown(
        60, lambda: print_table(columns, [("disk", terminal.lines(["two files", "", "a\nname", "delete it"]))])
    )
    assert [line.split() for line in text.splitlines()[1:]] == [
        ["disk", "two", "files"],
        ["a\\nname"],
        ["delete", "it"],
    ]


def test_markup_in_names_is_text(shown) -> None:  # type: ignore[no-untyped-def]
    text = shown(100, lambda: print_table([Column("a", "text"), Column("b", "text")], [("[red]x[/red]", "[/nothing]")]))
    assert "[red]x[/red]" in text
    assert "[/nothing]" in text


@pytest.mark.parametrize("width", [30, 60])
def test_pairs_fold_their_values_and_lose_nothing(shown, width: int) -> None:  # type: ignore[no-untyped-def]
    value = "image tower 304,293,888 parameters in runs/a/very/long/path/of/a/student/that/fits/nowhere.pt"
    text = shown(width, lambda: print_pairs({"student": value}))
    assert "".join(text.split()).removeprefix("student") == "".join(value.split())
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width


# --- encodings -----------------------------------------------------------------------------------------

DOCUMENT = {"image": "café 🦊.png", "odd": "\udce9.png", "±": [1.5, None]}


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8", "utf-16"])
def test_json_reads_back_whatever_the_terminal_can_encode(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for document in (DOCUMENT, {"name": "Vögel"}, {"name": "fox"}):
        raw = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding, errors="backslashreplace"))
        print_json(document)
        sys.stdout.flush()
        assert json.loads(raw.getvalue().decode(encoding)) == document


def test_names_stay_as_they_are_where_the_terminal_can_show_them(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"name": "Vögel 🦊"})
    assert "Vögel 🦊" in capsys.readouterr().out


def test_signs_that_a_terminal_lacks_have_others(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii", errors="backslashreplace"))
    print_table([Column("model", "text"), Column("top-1")], [("m", "99.44 ± 0.31")])
    sys.stdout.flush()
    assert "99.44 +/- 0.31" in raw.getvalue().decode("ascii")


# --- progress ------------------------------------------------------------------------------------------


def line_of(width: int, label: str = "student 3/20") -> str:
    console = Console(width=width, force_terminal=True, color_system=None, file=io.StringIO())
    bars = Bars(console=console)
    figures = ["loss 0.152", "refinement 0.144 (97%)", "gate 0.063", "test top-1 93.61 %"]
    number = bars.add_task(label, total=1000, completed=430, figures=figures, unit="images")
    rendered = terminal._Line(console).render(bars.tasks[number])
    assert isinstance(rendered, Text)
    return rendered.plain


@pytest.mark.parametrize("width", range(20, 160, 7))
def test_a_progress_line_fits_and_each_figure_is_whole_or_absent(width: int) -> None:
    line = line_of(width)
    assert len(line) < width
    rest = line.removeprefix("student 3/20  43%").strip()
    for figure in ("loss 0.152", "refinement 0.144 (97%)", "gate 0.063", "test top-1 93.61 %"):
        rest = rest.replace(figure, "").strip()
    assert rest == ""


def test_a_wide_terminal_shows_every_figure() -> None:
    assert "test top-1 93.61 %" in line_of(160)
    assert "43%" in line_of(12, "scoring student on oxford_flowers")


def test_the_line_of_an_epoch_calls_held_out_images_so() -> None:
    figures = {
        "loss": 0.2,
        "test_top1_percent": 93.6,
        "test_agreement_percent": 97.0,
        "test_images": 8,
        "test_unreadable": 2,
    }
    assert figures_text(figures, held_out=True) == (
        "loss 0.2  held-out top-1 93.60 %  held-out agreement 97.00 %  2 of 10 held-out images could not be read"
    )
    assert "test top-1 93.60 %" in figures_text(figures)


def test_the_bar_of_a_training_shows_the_scores_of_the_last_epoch_that_was_scored() -> None:
    console = Console(width=160, force_terminal=True, color_system=None, file=io.StringIO())
    bars = Bars(console=console)
    report = terminal._Reporter(console, bars)

    def figures() -> list[str]:
        return list(bars.tasks[-1].fields["figures"])

    report(Stage("Student"))
    report(Progress("student 1/3", 1, 9, {"loss": 0.5}))
    assert figures() == ["loss 0.5"]
    report(Epoch(1, 3, 10.0, {"loss": 0.4, "test_top1_percent": 90.0}, held_out=True))
    report(Progress("scoring", 1, 9))
    assert figures() == []
    report(Progress("student 2/3", 4, 9, {"loss": 0.3}))
    assert figures() == ["held-out top-1 90.00 %", "loss 0.3"]
    report(Epoch(2, 3, 10.0, {"loss": 0.3}, held_out=True))  # was not scored
    report(Progress("student 3/3", 7, 9, {"loss": 0.2}))
    assert figures() == ["held-out top-1 90.00 %", "loss 0.2"]
    report(Stage("Student"))  # of another run
    report(Progress("student 1/3", 1, 9, {"loss": 0.6}))
    assert figures() == ["loss 0.6"]


@pytest.mark.parametrize("width", [40, 60, 80, None])
def test_no_figure_of_an_export_is_cut_at_any_width(shown, width: int | None) -> None:  # type: ignore[no-untyped-def]
    parity = {
        "feature_cosine_min": 0.987654,
        "top1_agreement_percent": 100.0,
        "top1_agreement_interval_percent": (79.6, 100.0),
        "top1_percent": 98.76,
    }
    latency = {
        "name": "PyTorch fp32 eager",
        "threads": 2,
        "seconds": 0.01234,
        "speed_up": 1.23,
        "peak_bytes": 456 * 2**20,
        "memory_share": 0.78,
    }
    manifest = {
        "precisions": {"fp32": {"classifier": "classifier.onnx", "parity": parity}},
        "files": {"classifier.onnx": {"bytes": 370_900}},
        "latency": [latency],
        "batch": None,
    }
    text = shown(width, lambda: (_print_parity(manifest), _print_latency(manifest)))
    for figure in ("1.00", "0.987654", "100.00 %", "79.6 to 100.0 %", "98.76 %", "12.34", "1.23x", "456", "0.78"):
        assert any(figure in line for line in text.splitlines()), figure
    assert "…" not in text


ESCAPE = "\x1b[2Jfox\x07\u202e"
SHOWN = "\\x1b[2Jfox\\x07\\u202e"


def test_names_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.output().print(f"report: {ESCAPE}", markup=False)
    print_table([Column("model", "text"), Column("top-1")], [(f"{ESCAPE}\nforged", "1.00")], title=ESCAPE, note=ESCAPE)
    print_pairs({ESCAPE: ESCAPE})
    with reporting() as report:
        report(Notice(ESCAPE))
        report(Stage(ESCAPE))
    captured = capsys.readouterr()
    for text, times in ((captured.out, 6), (captured.err, 2)):
        assert text.count(SHOWN) == times
        assert all(line.isprintable() for line in text.split("\n"))
    assert f"{SHOWN}\\nforged" in captured.out
