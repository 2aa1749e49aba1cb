from comkd_cli.bundles.card import MOST_CHARACTERS, class_text


def test_a_class_name_is_text_in_the_card_whatever_it_holds() -> None:
    assert class_text("red fox") == "red fox"
    assert class_text("<img src=x>\n| [a](javascript:b) `c` \x1b[2J") == (
        "\\<img src=x> \\| \\[a\\](javascript:b) \\`c\\` \\\\x1b\\[2J"
    )
    assert class_text("x" * 10_000) == "x" * MOST_CHARACTERS + "..."
