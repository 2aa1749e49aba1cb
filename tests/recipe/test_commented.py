"""Recipes with reasons: whatever the values, they read back; whatever the reasons, they stay comments."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comkd_cli.recipe.commented import Setting, commented_yaml, printable
from comkd_cli.recipe.loading import read_yaml

ODD = [
    "no",
    "null",
    "1e3",
    "2024-01-01",
    "~",
    "",
    " a ",
    "a: b # c",
    "- a",
    "{}",
    '"q"',
    "it's",
    "a\r\nb",
    "\x85\u2028\u2029",
    "狐",
    "%",
    "@",
    "x" * 300,
    "a " * 200,
]
TEXTS = st.one_of(st.sampled_from(ODD), st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00")))


@pytest.mark.slow
@given(st.lists(TEXTS), TEXTS, TEXTS)
def test_every_text_reads_back_and_every_reason_is_a_comment(names: list[str], text: str, reason: str) -> None:
    settings = [
        Setting("about", text, reason),
        Setting("data", [Setting("folder", text, reason), Setting("classes", names, reason)], reason),
        Setting("numbers", {"layers": [1, 1], "width": 1.5}),
    ]
    written = commented_yaml(settings, f"{printable(reason)}\nsecond line")
    assert read_yaml(written, "test") == {
        "about": text,
        "data": {"folder": text, "classes": names},
        "numbers": {"layers": [1, 1], "width": 1.5},
    }


def test_a_reason_stands_above_its_setting_and_is_folded() -> None:
    settings = [Setting("optim", [Setting("epochs", 5, "word " * 40), Setting("name", "adamw")], "How it is trained.")]
    lines = commented_yaml(settings, "Head.\n\nMore.").splitlines()
    assert lines[:5] == ["# Head.", "#", "# More.", "", "# How it is trained."]
    comments = lines[6 : lines.index("  epochs: 5")]
    assert len(comments) > 1
    assert all(line.startswith("  # word") and len(line) <= 96 for line in comments)
    assert lines[-1] == "  name: adamw"


def test_what_does_not_print_is_escaped() -> None:
    assert printable("a\nb\x1b[31m\udce9 狐 é") == "a\\nb\\x1b[31m\\udce9 狐 é"
