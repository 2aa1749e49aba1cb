import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from comkd_cli.edge.visible import visible

DIRECTIONS = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")


def test_a_terminal_escape_is_shown_and_words_stay() -> None:
    assert visible("\x1b[2Jfox\x9b31m\x07") == "\\x1b[2Jfox\\x9b31m\\x07"
    assert visible("fox\u202egnp.exe") == "fox\\u202egnp.exe"
    for word in ("Füchse", "क्\u200dष", "👩\u200d🚒", "狐"):
        assert visible(word, one_line=True) == word


def test_lines_stay_lines_unless_one_is_wanted() -> None:
    assert visible("a\n\tb\r") == "a\n\tb\\r"
    assert visible("a\n\tb\r", one_line=True) == "a\\n\\tb\\r"


@given(st.text())
def test_no_control_character_and_no_change_of_direction_is_left(text: str) -> None:
    for character in visible(text, one_line=True):
        assert unicodedata.category(character) not in ("Cc", "Zl", "Zp")
        assert unicodedata.bidirectional(character) not in DIRECTIONS
