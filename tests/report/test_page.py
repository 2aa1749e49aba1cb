import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from comkd_cli.report.details import PICTURES, Making
from comkd_cli.report.page import MOST_DETAILED, render
from comkd_cli.report.run import ScoredRun
from tests import warm
from tests.report.scored import scored_run

LABELS = [0, 0, 1, 1, 2, 2] * 5
STUDENT = [0, 1, 1, 1, 2, 0] * 5
TEACHER = [0, 0, 1, 1, 2, 0] * 5
CURVE = [
    {
        "epoch": number,
        "loss": 3.0 / number,
        "refinement": 2.0 / number,
        "if_align": 1.0 / number,
        "refinement_gradient_share": 0.75,
        "if_align_gradient_share": 0.25,
        "gate": 0.1 * number,
        "test_top1_percent": 50.0 + number,
        "test_images": 30,
    }
    for number in range(1, 11)
]
LATENCY = {
    "latency": [
        {"name": "pytorch", "threads": 1, "seconds": 0.02},
        {"name": "fp32", "threads": 1, "seconds": 0.01},
        {"name": "int8", "threads": 1, "seconds": 0.005},
        {"name": "int8", "threads": 2, "seconds": 0.001},
    ]
}
NASTY = ('<script>alert("1")</script>', 'O\'Brien & "sons"', "two\nlines </title> {{ 7 * 7 }}")


class Page(HTMLParser):
    """What a browser makes of a page: its elements, their attributes and their texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def values(self, attribute: str) -> list[str]:
        return [str(attributes[attribute]) for _, attributes in self.elements if attribute in attributes]

    def count(self, tag: str) -> int:
        return sum(tag == name for name, _ in self.elements)


def page(*runs: ScoredRun) -> Page:
    return Page(render(runs, Making("comkd report x", Path("runs"), Path("my data"))))


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of the page's words: to draw its figures takes most of the time."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", warm.save_nothing)


def test_names_of_classes_and_files_are_text_and_never_markup(tmp_path: Path) -> None:
    keys = [f"""dir/{i} "quoted" <img src=x onerror=alert(1)>'\n.png""" for i in range(30)]
    shown = page(scored_run(tmp_path, STUDENT, TEACHER, LABELS, names=NASTY, keys=keys, notices=("<b>note</b>",)))
    assert shown.count("script") == 0
    assert shown.count("b") == 0
    assert not [name for _, attributes in shown.elements for name in attributes if name.startswith("on")]
    for name in (*NASTY, "<b>note</b>", '29 "quoted" <img src=x onerror=alert(1)>\' .png'):
        assert " ".join(name.split()) in shown.text
    pictures = [attributes for tag, attributes in shown.elements if tag == "img"]
    assert len(pictures) == 2 * PICTURES
    assert all(str(picture["src"]).startswith("data:image/jpeg;base64,") for picture in pictures)
    assert {str(picture["alt"]) for picture in pictures} <= {key.partition("/")[2] for key in keys}


def test_nothing_is_fetched(tmp_path: Path) -> None:
    text = render(
        [scored_run(tmp_path, STUDENT, TEACHER, LABELS, history=CURVE)], Making("comkd report", tmp_path, tmp_path)
    )
    shown = Page(text)
    assert all(source.startswith("data:") for source in shown.values("src"))
    assert all(link.startswith(("#", "data:")) for link in shown.values("href"))
    assert "@import" not in text
    assert set(re.findall(r"url\(([^)]*)\)", text)) <= {f"#{name}" for name in shown.values("id")}
    addresses = set(re.findall(r"https?://[^\s'\"<]+", text))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


@pytest.mark.slow
def test_ids_are_unique_over_the_figures_of_all_runs_and_links_lead_to_them(tmp_path: Path) -> None:
    first = scored_run(tmp_path, STUDENT, TEACHER, LABELS, history=CURVE, manifest=LATENCY)
    shown = page(first, scored_run(tmp_path, TEACHER, TEACHER, LABELS, history=CURVE))
    ids = shown.values("id")
    assert len(ids) == len(set(ids)) > 50
    assert {link[1:] for link in shown.values("href") if link.startswith("#")} <= set(ids)
    links = [value for _, attributes in shown.elements for name, value in attributes.items() if name == "xlink:href"]
    assert links
    assert {str(link)[1:] for link in links} <= set(ids)


def test_each_figure_says_what_it_shows_and_takes_the_pages_colours(tmp_path: Path) -> None:
    text = render([scored_run(tmp_path, STUDENT, TEACHER, LABELS, history=CURVE)], Making("x", tmp_path, tmp_path))
    drawn = re.findall(r"<svg.*?</svg>", text, re.S)
    captions = re.findall(r'role="img" aria-label="([^"]+)"', text)
    assert len(drawn) == len(captions) == 6
    for words in ("Training loss", "Held-out top-1", "Share of each term", "gate", "Calibration", "95 % intervals"):
        assert any(words in caption for caption in captions)
    for figure in drawn:
        assert not re.findall(r"#[0-9a-f]{6}\b", figure)
        assert "var(--" in figure


@pytest.mark.slow
def test_two_runs_are_compared_on_their_images_and_what_the_teacher_gave_is_said(tmp_path: Path) -> None:
    alone = {"loss": {"refinement": None, "if_align": None, "edu_attention": None, "labels": {"weight": 1.0}}}
    distilled = scored_run(tmp_path, TEACHER, TEACHER, LABELS, manifest=LATENCY)
    labels_only = scored_run(tmp_path, STUDENT, TEACHER, LABELS, recipe=alone)
    shown = page(distilled, labels_only)
    assert "2 runs compared" in shown.text
    # 25 of 30 right against 20 of 30
    assert "Gain from the teacher: +16.67 points of top-1 over labels alone" in shown.text
    assert "run 1 minus run 2" in shown.text
    assert "latency of one image on one thread, ms" in shown.text
    other_way = page(labels_only, distilled)
    assert "Gain from the teacher: +16.67 points" in other_way.text
    assert "\N{MINUS SIGN}16.67 points" in other_way.text
    assert "top\N{MINUS SIGN}1" not in shown.text


@pytest.mark.usefixtures("no_figures")
def test_runs_on_other_images_stand_beside_each_other_without_a_difference(tmp_path: Path) -> None:
    other = scored_run(tmp_path, STUDENT, TEACHER, LABELS, keys=[f"other{i}.png" for i in range(30)])
    shown = page(scored_run(tmp_path, STUDENT, TEACHER, LABELS), other)
    assert "run 1 minus" not in shown.text


@pytest.mark.usefixtures("no_figures")
def test_of_many_runs_the_first_have_sections_and_the_others_are_named(tmp_path: Path) -> None:
    runs = [scored_run(tmp_path, STUDENT, TEACHER, LABELS, dataset=f"set {i}") for i in range(MOST_DETAILED + 2)]
    shown = page(*runs)
    sections = {name for name in shown.values("id") if re.fullmatch(r"run\d+-scores", name)}
    assert len(sections) == MOST_DETAILED
    assert f"tiny on set {MOST_DETAILED + 1}, seed 1" in shown.text


@pytest.mark.usefixtures("no_figures")
def test_without_labels_the_page_speaks_of_agreement_alone(tmp_path: Path) -> None:
    shown = page(scored_run(tmp_path, STUDENT, TEACHER))
    assert "agreement with the teacher, not accuracy" in shown.text
    assert "Top-1" not in shown.text
    assert "calibration" not in shown.text.lower()
    assert "83.33 %" in shown.text  # 25 of 30 answers are the teacher's


@pytest.mark.usefixtures("no_figures")
def test_without_labels_and_teacher_the_page_says_so(tmp_path: Path) -> None:
    shown = page(scored_run(tmp_path, STUDENT))
    assert "the teacher was not found" in shown.text
    assert "Where the student is least certain" in shown.text
    assert "disagree most" not in shown.text


@pytest.mark.usefixtures("no_figures")
def test_the_fastest_graph_on_one_thread_is_the_latency(tmp_path: Path) -> None:
    assert (
        "5 ms int8, one image, one thread"
        in page(scored_run(tmp_path, STUDENT, TEACHER, LABELS, manifest=LATENCY)).text
    )


@pytest.mark.usefixtures("no_figures")
def test_pictures_that_disagree_most_come_first(tmp_path: Path) -> None:
    shown = page(scored_run(tmp_path, STUDENT, TEACHER, LABELS))
    pictures = [str(attributes["alt"]) for tag, attributes in shown.elements if tag == "img"]
    assert pictures[:PICTURES] == [f"{i:03d}.png" for i in range(29, 29 - PICTURES, -1)]  # distances rise with i
    assert pictures[PICTURES:] == [f"{i:03d}.png" for i in range(PICTURES)]  # so does confidence


@pytest.mark.usefixtures("no_figures")
def test_names_that_are_not_utf8_do_not_stop_the_page(tmp_path: Path) -> None:
    keys = [f"bad\udcff{i}.png" for i in range(30)]
    text = render([scored_run(tmp_path, STUDENT, TEACHER, LABELS, keys=keys)], Making("x", tmp_path, tmp_path))
    assert r"bad\udcff29.png" in text
    text.encode("utf-8")


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("classes", [3, 25, 26, 300])
def test_many_classes_are_pairs_and_those_with_most_errors(tmp_path: Path, classes: int) -> None:
    names = [f"class {i}" for i in range(classes)]
    labels = [i % classes for i in range(600)]
    student = [0 if label == 7 else label for label in labels]
    shown = page(scored_run(tmp_path, student, labels, labels, names=names))
    assert ("Images by class (rows)" in shown.text) == (classes <= 25)
    if classes > 7:
        assert "class 7 class 0" in shown.text
    assert ("100 classes with fewer errors are left out" in shown.text) == (classes == 300)


@pytest.mark.usefixtures("no_figures")
def test_commands_can_be_pasted_into_a_shell(tmp_path: Path) -> None:
    shown = page(scored_run(tmp_path, STUDENT, TEACHER, LABELS))
    assert f"comkd evaluate {tmp_path}/student.pt --runs runs --data-root 'my data'" in shown.text
