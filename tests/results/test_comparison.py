"""Our scores beside the published ones: figures worked out by hand."""

import pytest

from comkd_cli.results.comparison import Comparison, compare, inconsistency, table_of
from comkd_cli.results.published import BASE_TO_NOVEL, CROSS_DATASET
from comkd_cli.results.records import Record
from comkd_cli.results.tables import ELEVEN, VARIANTS
from tests.results.test_tables import halves, record

PROMPTKD = "PromptKD ViT-B/16 (published)"


def of(comparisons: list[Comparison], published: str) -> dict[tuple[str, str], tuple[float | None, ...]]:
    (found,) = [each for each in comparisons if each.published == published]
    return {(c.dataset, c.figure): (c.published, c.ours, c.difference) for c in found.cells}


def test_each_figure_stands_beside_the_published_one_with_the_difference() -> None:
    records = [*halves("eurosat", 1, 90.0, 60.0), *halves("eurosat", 2, 94.0, 66.0)]
    found = of(compare("base-to-novel", "promptkd", records, ["eurosat"], {}), PROMPTKD)
    assert found["eurosat", "base"] == (97.54, 92.0, pytest.approx(92 - 97.54))
    assert found["eurosat", "new"] == (82.08, 63.0, pytest.approx(63 - 82.08))
    both = 2 * 92 * 63 / 155
    assert found["eurosat", "harmonic mean"] == (89.14, pytest.approx(both), pytest.approx(both - 89.14))
    # One dataset is no average of eleven.
    assert found["average", "harmonic mean"] == (83.73, None, None)


def test_the_average_of_all_eleven_is_the_published_one_for_the_published_halves() -> None:
    published = BASE_TO_NOVEL[PROMPTKD]
    records = [r for name in ELEVEN for r in halves(name, 1, published[name].base, published[name].new)]  # type: ignore[arg-type]
    found = of(compare("base-to-novel", "promptkd", records, ELEVEN, {}), PROMPTKD)
    for figure in ("base", "new", "harmonic mean"):
        _, _, difference = found["average", figure]
        assert difference == pytest.approx(0, abs=0.01)


def test_the_two_published_harmonic_means_that_do_not_follow_from_their_halves_are_marked() -> None:
    wrong = {
        (row, name)
        for row, table in BASE_TO_NOVEL.items()
        for name, figures in table.items()
        if inconsistency(figures) is not None
    }
    assert wrong == {(PROMPTKD, "stanford_cars"), (PROMPTKD, "ucf101")}
    (comparison,) = [c for c in compare("base-to-novel", "promptkd", [], ELEVEN, {}) if c.published == PROMPTKD]
    table = table_of(comparison)
    cells = {row[0]: row[7] for row in table.rows}
    assert [name for name, cell in cells.items() if cell.endswith("*")] == ["stanford_cars", "ucf101"]
    assert "stanford_cars 83.08; ucf101 85.83" in table.note


def test_a_dataset_without_scores_is_a_row_with_the_reason() -> None:
    comparisons = compare(
        "base-to-novel", "comkd", halves("dtd", 1, 80.0, 70.0), ["dtd", "sun397"], {"sun397": "was not found"}
    )
    assert [c.published for c in comparisons] == [
        "ComKD-CLIP ViT-B/16 (published)",
        PROMPTKD,
        "PromptKD's teacher ViT-L/14 (published)",
    ]
    rows = {row[0]: row for row in table_of(comparisons[0]).rows}
    # data, then published, ours and the difference for each figure, then the note
    assert rows["sun397"] == ("sun397", "84.19", "", "", "", "", "", "82.93", "", "", "was not found")
    assert rows["dtd"][1:4] == ("", "80.00", "")
    assert rows["dtd"][-1] == ""


def transferred(dataset: str, seed: int | None, top1: float, protocol: str, role: str = "student") -> Record:
    return record(dataset=dataset, seed=seed, top1_percent=top1, protocol=protocol, role=role)


def test_cross_dataset_figures_of_students_and_of_their_teacher() -> None:
    names = ELEVEN[1:]
    records = [transferred(name, seed, 50.0 + seed, "cross-dataset") for name in names for seed in (1, 2, 3)]
    records += [transferred(name, None, 60.0, "cross-dataset", "teacher") for name in names]
    comparisons = compare("cross-dataset", "promptkd", records, names, {})
    student = of(comparisons, PROMPTKD)
    assert student["average", "top-1"] == (71.33, 52.0, pytest.approx(52 - 71.33))
    published = CROSS_DATASET["PromptKD's teacher ViT-L/14 (published)"]
    teacher = of(comparisons, "PromptKD's teacher ViT-L/14 (published)")
    assert teacher["dtd", "top-1"] == (published["dtd"], 60.0, pytest.approx(60 - published["dtd"]))
    (cell,) = [c for c in comparisons[0].cells if c.dataset == "dtd"]
    assert (cell.spread, cell.seeds) == (pytest.approx((2 / 3) ** 0.5), (1, 2, 3))


def test_domain_generalisation_has_no_average_without_every_variant() -> None:
    records = [transferred(name, 1, 60.0, "domain-generalization") for name in VARIANTS[:3]]
    found = of(compare("domain-generalization", "comkd", records, VARIANTS, {}), "ComKD-CLIP ViT-B/16 (published)")
    assert found["average", "top-1"] == (72.78, None, None)
    assert found["imagenetv2", "top-1"] == (None, 60.0, None)


def test_records_of_another_protocol_are_not_compared() -> None:
    found = of(compare("cross-dataset", "comkd", [record(dataset="dtd")], ["dtd"], {}), PROMPTKD)
    assert found["dtd", "top-1"] == (55.08, None, None)


def test_plain_data_has_each_difference_and_the_title_says_what_was_selected_on_test() -> None:
    chosen = [record(dataset="dtd", protocol="cross-dataset", selection="promptkd", top1_percent=56.0)]
    (first, *_) = compare("cross-dataset", "promptkd", chosen, ["dtd"], {})
    assert table_of(first).title.endswith("selected on test")
    plain = first.as_plain()
    assert plain["cells"][0]["difference"] == pytest.approx(56 - 55.08)
    assert plain["selection"] == "promptkd"
