"""results.csv, results.md and results.tex, from the records and the published figures."""

from __future__ import annotations

import csv
import io
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TypeVar

from tabulate import tabulate

from comkd_cli.edge.visible import visible
from comkd_cli.recipe.catalog import CATALOG
from comkd_cli.results.published import BASE_TO_NOVEL, CROSS_DATASET, DOMAIN_GENERALIZATION, Halves
from comkd_cli.results.records import Record, Results

K = TypeVar("K")
ELEVEN = tuple(name for name, dataset in CATALOG.items() if dataset.layout != "imagenet-variant")
VARIANTS = tuple(name for name, dataset in CATALOG.items() if dataset.layout == "imagenet-variant")
TRANSDUCTIVE = (
    "Students of ComKD and PromptKD learn on the unlabelled training images of all classes, new ones included "
    "(transductive); published PromptKD rows were selected on test."
)

ONE_ANSWER_PERCENT = 90.0
"""From this share of one class in a teacher's answers on, an agreement with it says little."""
NAMES = ("model", "data", "prompts", "method", "note")  # the columns without figures
MARKDOWN_SPECIAL = re.compile(r"[\\|<*`\[\]]")  # underscores within words have no meaning in Markdown


@dataclass(frozen=True)
class Table:
    """A title, column heads, and rows of cells; the first column names the model or dataset."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    def is_figures(self, head: str) -> bool:
        """Whether a column holds figures, which are aligned right."""
        return head not in NAMES


def harmonic_mean(base: float, new: float) -> float:
    """2bn / (b + n); 0 if both are 0."""
    return 2 * base * new / (base + new) if base + new else 0.0


def to_csv(records: Sequence[Record]) -> str:
    """A line per record, a column per field; None is empty."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, [field.name for field in fields(Record)], lineterminator="\n")
    writer.writeheader()
    for record in records:
        writer.writerow({name: _csv(value) for name, value in asdict(record).items()})
    return stream.getvalue()


def _csv(value: object) -> object:
    """A cell: a lone carriage return in a name would end the line for some readers."""
    return "" if value is None else _one_line(value) if isinstance(value, str) else value


def to_markdown(results: Results) -> str:
    """Every table, and the list of what could not be scored."""
    parts = ["# Results\n"]
    parts += map(table_as_markdown, tables(results.records))
    if results.missing:
        entries = (f"{entry.dataset}: {entry.line}".split("\n") for entry in results.missing)
        lines = "\n".join("- " + "\n  ".join(map(markdown_text, texts)) for texts in entries)
        parts.append(f"## Not scored\n\n{lines}\n")
    return "\n".join(parts)


def table_as_markdown(table: Table) -> str:
    """A table below its title, with its note."""
    note = f"\n{table.note}\n" if table.note else ""
    return f"## {table.title}\n\n{_tabulated(table, 'pipe', markdown_text)}\n{note}"


def to_latex(results: Results) -> str:
    """Every table as a LaTeX tabular with booktabs rules."""
    parts = []
    for table in tables(results.records):
        # tabulate escapes what LaTeX would interpret.
        tabular = _tabulated(table, "latex_booktabs", _one_line).replace("±", r"$\pm$")
        parts.append(f"% {table.title}\n{tabular}\n")
    return "\n".join(parts)


def _tabulated(table: Table, style: str, escape: Callable[[str], str]) -> str:
    rows = [list(map(escape, row)) for row in table.rows]
    alignment = ["left", *["right"] * (len(table.heads) - 1)]
    text: str = tabulate(rows, list(map(escape, table.heads)), style, disable_numparse=True, colalign=alignment)
    return text


def _one_line(cell: str) -> str:
    return " ".join(visible(cell).split())


def markdown_text(cell: str) -> str:
    """A text of any origin as one line that Markdown and HTML show as it is."""
    return MARKDOWN_SPECIAL.sub(r"\\\g<0>", _one_line(cell))


def tables(records: Sequence[Record]) -> list[Table]:
    """The tables for which there are records. A table holds a single selection protocol."""
    found = []
    for selection in dict.fromkeys(record.selection for record in records):
        own = [record for record in records if record.selection == selection]
        mark = "" if selection == "last" else ", selected on test"
        makers = (
            _zero_shot(own),
            _base_to_novel(own),
            _by_dataset(own, "cross-dataset", ELEVEN[1:], CROSS_DATASET),
            _by_dataset(own, "domain-generalization", VARIANTS, DOMAIN_GENERALIZATION),
            _few_shot(own),
        )
        found += [Table(t.title + mark, t.heads, t.rows, t.note) for t in makers if t is not None]
    return found


def _zero_shot(records: Sequence[Record]) -> Table | None:
    own = [record for record in records if record.protocol == "zero-shot"]
    if not own:
        return None
    heads = ("model", "data", "prompts", "images", "top-1 %", "mean per class %", "agreement %", "tower parameters")
    rows = tuple(
        (
            f"{record.role} {record.model}",
            record.dataset,
            "ensemble" if record.method == "clip-ensemble" else "single",
            f"{record.images:,}" + ("" if record.images_from == "test" else f" {record.images_from}"),
            _cell(record.top1_percent),
            _cell(record.mean_per_class_percent),
            _agreement(record),
            f"{record.image_tower_parameters:,}",
        )
        for record in own
    )
    return Table("Zero-shot, all classes", heads, rows)


def _agreement(record: Record) -> str:
    """The agreement; beside one with a teacher that hardly varies, the share of its most frequent answer."""
    share = record.teacher_top_answer_percent
    varies = share is None or share < ONE_ANSWER_PERCENT
    return _cell(record.agreement_percent) + ("" if varies else f" (teacher: {share:.0f} % one class)")


def _base_to_novel(records: Sequence[Record]) -> Table | None:
    own = [record for record in records if record.protocol == "base-to-novel"]
    if not own:
        return None
    rows: list[tuple[str, ...]] = []
    for name, models in _by_model(own).items():
        datasets = _group(models, lambda record: record.dataset)
        means: list[tuple[float, float]] = []
        for dataset, scores in datasets.items():
            base, new = (_scores(scores, half) for half in ("base", "new"))
            if base and new:
                means.append((statistics.fmean(base), statistics.fmean(new)))
                harmonic = f"{harmonic_mean(*means[-1]):.2f}"
            else:
                harmonic = ""
            rows.append((name, dataset, _spread(base), _spread(new), harmonic))
        if set(datasets) >= set(ELEVEN) and len(means) == len(datasets):
            # The published rule: the harmonic mean of the mean base and the mean new.
            average = [statistics.fmean(column) for column in zip(*means, strict=True)]
            rows.append((name, "average of 11", *(f"{x:.2f}" for x in (*average, harmonic_mean(*average)))))
    scored = {record.dataset for record in own}
    for name, published in BASE_TO_NOVEL.items():
        rows += [
            (name, dataset, *_published(halves))
            for dataset, halves in published.items()
            if dataset in scored or (dataset == "average" and scored >= set(ELEVEN))
        ]
    heads = ("model", "data", "base", "new", "harmonic mean")
    return Table("Base to novel, top-1 %, mean ± spread over seeds", heads, tuple(rows), TRANSDUCTIVE)


def _by_dataset(
    records: Sequence[Record], protocol: str, columns: Sequence[str], published: Mapping[str, Mapping[str, float]]
) -> Table | None:
    """A row per model, a column per dataset, and the average if no dataset is missing."""
    own = [record for record in records if record.protocol == protocol]
    if not own:
        return None
    rows = []
    for name, models in _by_model(own).items():
        by_dataset = {d: _scores(scores, "all") for d, scores in _group(models, lambda record: record.dataset).items()}
        cells = [_spread(by_dataset.get(column, [])) for column in columns]
        means = [statistics.fmean(by_dataset[column]) for column in columns if by_dataset.get(column)]
        average = f"{statistics.fmean(means):.2f}" if len(means) == len(columns) else ""
        rows.append((name, *cells, average))
    for name, figures in published.items():
        rows.append((name, *(_cell(figures.get(column)) for column in (*columns, "average"))))
    title = f"{protocol.replace('-', ' ').capitalize()}, top-1 %"
    return Table(title, ("model", *columns, "average"), tuple(rows), TRANSDUCTIVE)


def _few_shot(records: Sequence[Record]) -> Table | None:
    own = [record for record in records if record.protocol == "few-shot"]
    if not own:
        return None
    shots = sorted({record.shots for record in own if record.shots is not None})
    rows = []
    for name, models in _by_model(own).items():
        for (dataset, method), scores in _group(models, lambda record: (record.dataset, record.method)).items():
            cells = [
                _spread([s.top1_percent for s in scores if s.shots == k and s.top1_percent is not None]) for k in shots
            ]
            rows.append((name, dataset, method, *cells))
    heads = ("model", "data", "method", *(f"{count} shots" for count in shots))
    return Table("Few-shot, top-1 %, mean ± spread over seeds", heads, tuple(rows))


def _group(records: Iterable[Record], key: Callable[[Record], K]) -> dict[K, list[Record]]:
    groups: dict[K, list[Record]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    return groups


def _by_model(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Records by row of a table: the students of a recipe share one, over datasets and seeds, and so do teachers.

    If different models would be averaged on one dataset, each model has a row of its own.
    """
    groups: dict[str, list[Record]] = {}
    for name, own in _group(records, _shared_name).items():
        of_datasets = _group(own, lambda record: record.dataset).values()
        if all(len({_family(record) for record in scores}) == 1 for scores in of_datasets):
            groups[name] = own
        else:
            groups |= _group(own, lambda record: f"{record.role} {_family(record)}")
    return groups


def _shared_name(record: Record) -> str:
    """`student runs/<recipe>` for runs/<recipe>/<dataset>/seed<k>/student.pt, `teacher` for any teacher."""
    if record.role == "teacher":
        return record.role
    family = _family(record)
    recipe = family if family == record.model else family.rpartition("/")[0].rpartition("/")[0]
    return f"{record.role} {recipe or record.model}"


def _family(record: Record) -> str:
    """The path of a student without seed<k>, which its seeds share. Any other model is a family of its own."""
    return re.sub(r"(^|/)seed\d+/(?=[^/]*$)", r"\1", record.model) if record.role == "student" else record.model


def _scores(records: Sequence[Record], half: str) -> list[float]:
    return [r.top1_percent for r in records if r.classes == half and r.top1_percent is not None]


def _spread(scores: Sequence[float]) -> str:
    """The mean, and for several seeds the population standard deviation."""
    if not scores:
        return ""
    mean = f"{statistics.fmean(scores):.2f}"
    return mean if len(scores) == 1 else f"{mean} ± {statistics.pstdev(scores):.2f}"


def _published(halves: Halves) -> tuple[str, ...]:
    return tuple(_cell(value) for value in (halves.base, halves.new, halves.harmonic))


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
