"""Tokenizers of the tokenizers library, as predict.py calls them."""

import functools
import sys

import ftfy
import numpy as np
import pytest
from open_clip.tokenizer import get_clean_fn

from comkd_cli.edge.json_tokenizer import CLEANING, JsonTokenizer, TokenizerRules
from tests import siglip
from tests.edge.test_clip_tokenizer import TEXTS

RULES = TokenizerRules(clean="canonicalize", pad=1)


def ids(*pieces: str) -> list[int]:
    return [siglip.IDS[piece] for piece in pieces]


def tokenizer(context_length: int = 6, rules: TokenizerRules = RULES) -> JsonTokenizer:
    return JsonTokenizer(siglip.definition(), context_length, rules)


@pytest.mark.parametrize("name", CLEANING)
def test_texts_are_cleaned_as_open_clip_cleans_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ftfy, "fix_text", functools.partial(ftfy.fix_text, fix_encoding=False))  # keeps mojibake
    theirs = get_clean_fn(name)
    for case, text in {**TEXTS, "punctuation": "A_red-fox's  (den), at\t100%!"}.items():
        assert CLEANING[name](text) == theirs(text), case


def test_tokens_are_those_of_the_file() -> None:
    expected = [ids("▁a", "▁red", "▁fox", "</s>", "</s>", "</s>"), ids("▁do", "g", "s", "</s>", "</s>", "</s>")]
    found = tokenizer()(["A red, fox!", "dogs"])
    assert found.dtype == np.int64
    assert found.tolist() == expected
    assert tokenizer()("dogs").tolist() == expected[1:]
    assert tokenizer(rules=TokenizerRules("whitespace", 1))(["dog!"]).tolist() == [
        ids("▁do", "g", "!", "</s>", "</s>", "</s>")
    ]


def test_a_long_text_is_truncated_and_keeps_its_end() -> None:
    text = "a photo of a red fox"
    built = tokenizer(4)
    assert built([text]).tolist() == [ids("▁a", "▁photo", "▁of", "</s>")]
    assert (built.length(text), built.cut(text), built.cut("a fox")) == (7, 3, 0)
    assert built([text]).tolist() == [ids("▁a", "▁photo", "▁of", "</s>")]  # also after the length was counted
    assert tokenizer(7).cut(text) == 0


def test_rows_are_padded_on_the_side_and_with_the_token_of_the_rules() -> None:
    left = tokenizer(5, TokenizerRules("canonicalize", 0, pad_left=True))
    assert left(["red fox"]).tolist() == [ids("<pad>", "<pad>", "▁red", "▁fox", "</s>")]
    zeroed = tokenizer(5, TokenizerRules("canonicalize", 2, zeroed=1))
    assert zeroed(["red fox"]).tolist() == [ids("▁red", "▁fox", "<pad>", "<unk>", "<unk>")]


@pytest.mark.parametrize(("definition", "context_length"), [("{}", 5), (None, 0), (None, 2**40)])
def test_what_cannot_be_followed_is_refused(definition: str | None, context_length: int) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.json|context_length"):
        JsonTokenizer(definition or siglip.definition(), context_length, RULES)


@pytest.mark.parametrize(("clean", "pad", "zeroed"), [("upper", 1, None), ("lower", -1, None), ("lower", 1, 2**40)])
def test_rules_that_no_tokenizer_has_are_refused(clean: str, pad: int, zeroed: int | None) -> None:
    with pytest.raises(ValueError, match=r"upper|no token is"):
        TokenizerRules(clean, pad, zeroed=zeroed)


def test_padding_and_truncation_of_the_file_do_not_count() -> None:
    import tokenizers

    library = tokenizers.Tokenizer.from_str(siglip.definition())
    library.enable_padding(length=9, pad_id=0, pad_token="<pad>")
    library.enable_truncation(2)
    built = JsonTokenizer(library.to_str(), 6, RULES)
    assert np.array_equal(built(["a red fox"]), tokenizer()(["a red fox"]))
    assert built.length("a red fox") == 4


def test_without_the_library_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    definition = siglip.definition()
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError) as caught:
        JsonTokenizer(definition, 5, RULES)
    assert caught.value.name == "tokenizers"
