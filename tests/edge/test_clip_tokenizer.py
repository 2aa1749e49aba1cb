# ruff: noqa: RUF001 (characters that look like others are what is tokenized here)
import ast
import functools
import html.entities
import sys
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ftfy
import numpy as np
import pytest
import regex
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from open_clip import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES, SimpleTokenizer

from comkd_cli.edge import clip_tokenizer
from comkd_cli.edge.clip_tokenizer import MERGES, Tokenizer

START, END = 49_406, 49_407
LENGTHS = [1, 2, 3, 16, 77, 200]
THEIRS = SimpleTokenizer()


def merges_of(tokenizer: SimpleTokenizer) -> str:
    """The text of the merges that a tokenizer of open_clip was made from."""
    pairs = sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.__getitem__)
    return "".join(f"{first} {second}\n" for first, second in pairs)


@functools.cache
def ours(context_length: int = 77) -> Tokenizer:
    return Tokenizer(merges_of(THEIRS), context_length)


def check_same(texts: Sequence[str], context_length: int = 77) -> None:
    """Both tokenizers give the same for every text; the first for which they don't is named."""
    mine, theirs = ours(context_length)(texts), THEIRS(list(texts), context_length).numpy()
    assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype) == ((len(texts), context_length), np.int64)
    differing = np.flatnonzero((mine != theirs).any(axis=1))
    assert not differing.size, ascii(texts[differing[0]])


@pytest.fixture
def no_mojibake_repair(monkeypatch: pytest.MonkeyPatch) -> None:
    """open_clip's tokenizer, but for what is out of this one's scope."""
    monkeypatch.setattr(ftfy, "fix_text", functools.partial(ftfy.fix_text, fix_encoding=False))


# --- prompts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context_length", LENGTHS)
def test_class_names_are_tokenized_as_open_clip_does(context_length: int) -> None:
    check_same(IMAGENET_CLASSNAMES, context_length)


@pytest.mark.slow
def test_prompts_are_tokenized_as_open_clip_does() -> None:
    assert len(OPENAI_IMAGENET_TEMPLATES) == 80
    check_same([template(name) for template in OPENAI_IMAGENET_TEMPLATES for name in IMAGENET_CLASSNAMES[::10]])
    check_same([template("{}") for template in OPENAI_IMAGENET_TEMPLATES])


# --- chosen texts --------------------------------------------------------------------------------------

TEXTS = {
    "empty": "",
    "space": "  \t\n ",
    "white space": "\ta\tphoto \r\nof\u00a0a\u3000dog\f.\u2028It\u2003is\v\x1cold.\x85 ",
    "long": "a photo of a very good dog, " * 60,
    "long word": "supercalifragilistic" * 60,
    "long repetition": "a" * 999 + "!" * 999 + "7" * 999,
    "contractions": "It's I'm we're they'll I'd've don't 'tis O'Sullivan's ''s '’s 1's 'S 'LL 'r rock'n'roll'",
    "long s": "it'ſ congreſs '\u017f <\u017ftart_of_text> <start_of_te\u017ft>",
    "kelvin": "300 \u212a, \u212bngström, 'K",
    "special": "<start_of_text>a<end_of_text> <START_OF_TEXT> x<end_of_text>y",
    "nearly special": "<end_of_text <<end_of_text>> .<end_of_text> <end_of_text>> <end of text> start_of_text",
    "padding token": "! !! !!!",
    "end of word": "</w> a</w> dog</w>",
    "curly quotes": "‘a’ “b” ‚c‛ „d‟ \u02bce it’s don’t ‘S «f» ‹g› \u2032h\u2033 `i´",
    "entities": "AT&amp;T &lt;b&gt; &quot;x&quot; &#39;s &#x27;s &eacute; &EACUTE; &eACUTE; &hellip; &rsquo;s &SZLIG;",
    "entities twice and more": "&amp;amp;amp;amp;lt; &amp;lt;b&amp;gt; &am&#112;;amp; &amp;rsquo;s &amp;#8217;s",
    "entities without end": "&amp &lt &eacute &copy2026 this&not that &notit; &rsquo &#8217 &#39s &;",
    "entities of HTML": "it&rsquo;s\n<b>it&rsquo;s</b>\nit&rsquo;s &amp;amp; &EACUTE;",
    "entities that become HTML": "&lt;b&gt;it&rsquo;s&lt;/b&gt; &EACUTE;",
    "entities of odd numbers": "&#0; &#x80; &#145;a&#146; &#xD83D;&#xDE00; &#59; &#38;#38; &#xFFFE; &#11; &#9999999;",
    "entities of space": "a&nbsp;b&Tab;c&NewLine;d&#32;e&ensp;f&ZeroWidthSpace;g&#10;h&#x85;i",
    "long entity": "&CounterClockwiseContourIntegral; &NotEqualTilde; &Jscr; &FRAC12; &GTCC; &LT; &COPY;",
    "numbers in part": "it&#8217s; &#8217s;x &#x2019s; &#38amp; &#x41g; &#59; &#x0000000000000000000000002019;s",
    "ligatures": "ﬁne oﬀer ﬂow oﬃce baﬄe ﬅ ﬆ ĳ Ĳssel ŉ Ǆ ǅ ǆ Ǉ ǈ ǉ Ǌ ǋ ǌ Ǳ ǲ ǳ æ Œ ﬓ",
    "widths": "ＬＯＵＤ　ＮＯＩＳＥＳ！ Ｕﾀｰﾝ ｶﾞ ﾊﾟ ﾡﾢ \uffa0 ￣ ￥ ＆ａｍｐ； ＇ｓ \x1b［３１ｍ ｡｢｣",
    "composition": "e\u0301 a\u030a\u0323 \u1100\u1161\u11a8 \u0958 \u2126 \u2000 o\u0302\u0303 \u0301 ﬁ\u0301 \u0344",
    "combining": "a\u0336b\u0336 \u20e3 1\u20e3 \u0903 \u093e z\u0351\u0352",
    "ypogegrammeni": "x\u0345y !\u0345! '\u0345s \u03b1\u0345 \u0345 1\u03452 \u0391\u0345 <end_\u0345of_text>",
    "controls": "a\x00b\x07c\x08 \x0bd\x0ee\x1ff\x7fg \ufeffh\u206ai \ufff9j\ufffak\ufffbl\ufffcm\ufffdn &am\x00p;",
    "terminal escapes": "\x1b[36;44mblue\x1b[0m \x1b[mx \x1b[1;2 y \x1b]z \x1b[\u0663m \x9b1m \x1b\x00[1m",
    "C1 controls": "\x80 5 \x85 \x91a\x92 \x93b\x94 \x81\x8d\x8f\x90\x9d \x99 \x9fx",
    "surrogates": "\ud83d\ude00 \ude00\ud83d \ud83d \ude00 \ud83d\ud83d\ude00 x\udfffy \ud800",
    "zero width": "a\u200bb\u200cc\u200dd\u2060e\u00adf\u200eg\u202ah\u180ei \ufeff",
    "emoji": "😀🎉 👨\u200d👩\u200d👧 🇫🇷 👍🏽 ❤\ufe0f 🏴\U000e0067\U000e0062\U000e007f dog🐶dog",
    "numbers": "2026 3.14 x² ½ ⅓ Ⅳ ⅷ ↂ ① ⑳ ١٢٣ १२ 〇 一二三 ㊿ 𝟘 𐄇 1st a1b2c3 1,000",
    "underscores": "snake_case __init__ _ a_1 _a_ \u203f",
    "CJK": "犬の写真 一只狗的照片。 개 사진 ｶﾀｶﾅ ヴァ カ\u3099 𠮷野家",
    "Arabic": "صورة كلب \u0640 \u06d4 ﷺ ﻻ",
    "other scripts": "собака щенок Ёжик כֶּלֶב σκύλος ΣΊΣΥΦΟΣ हिन्दी สุนัข ძაღლი ᏣᎳᎩ ꮳ",
    "case": "İstanbul ISTANBUL ıi ẞ ß ǅ ΑΣ ΑΣ. ΑΣ&nbsp;Β \u1e9e ℌ Ⓐ Å Ⴀ \u1c90 \ua64a \u1c88",
    "symbols": "a+b=c @home #1 $5 100% (x) [y] {z} | ~ ^ ` \\ / … — – • © ™ € ° ¶",
    "private use": "\ue000 \U000f0000 \U0010ffff \uffff \ufdd0",
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_chosen_text_is_tokenized_as_open_clip_does(name: str, no_mojibake_repair: None) -> None:
    for context_length in LENGTHS:
        check_same([TEXTS[name]], context_length)
    check_same([TEXTS[name]], 4_000)
    check_same(TEXTS[name].split(), 40)


def test_a_text_is_tokenized_alike_in_any_batch(no_mojibake_repair: None) -> None:
    check_same(list(TEXTS.values()))
    assert np.array_equal(ours()(list(TEXTS.values())), np.concatenate([ours()([text]) for text in TEXTS.values()]))


@pytest.mark.slow
def test_every_entity_is_replaced_as_open_clip_does(no_mojibake_repair: None) -> None:
    names = {name.removesuffix(";") for name in html.entities.html5}
    shapes = ("x&{}y", "x&{};y", "<x&{};y")
    check_same([shape.format(form) for name in names for form in {name, name.upper()} for shape in shapes], 40)


def test_every_code_point_of_an_entity_is_replaced_as_open_clip_does(no_mojibake_repair: None) -> None:
    check_same([f"x&#{code}{end}y" for code in range(0x400) for end in (";", "")], 40)


@pytest.mark.slow
def test_every_character_is_split_from_its_neighbours_as_open_clip_does(no_mojibake_repair: None) -> None:
    # Which versions of Unicode Python and regex have differs; what only one of them knows is left out. The
    # big blocks of characters that are alike are sampled.
    alike = ("CJK UNIFIED", "HANGUL SYLLABLE", "TANGUT", "EGYPTIAN", "CUNEIFORM", "YI SYLLABLE", "KHITAN", "ANATOLIAN")
    known = [
        chr(code)
        for code in range(sys.maxunicode + 1)
        if unicodedata.category(chr(code)) != "Cn" and not regex.match(r"\p{Cn}", chr(code))
    ]
    characters = [
        character
        for character in known
        if ord(character) % 50 == 0
        or not (unicodedata.category(character) == "Co" or unicodedata.name(character, "").startswith(alike))
    ]
    assert len(characters) > 30_000
    words = [f"b{character}b!{character}!'{character}s 1{character}1" for character in characters]
    check_same([" ".join(words[i : i + 20]) for i in range(0, len(words), 20)], 1_000)


# --- any text ------------------------------------------------------------------------------------------

FRAGMENTS = [
    *("a", "dog", "S", "1", "²", "Ⅳ", "_", "-", "'", "'s", "'RE", "\u017f", "!", " ", "\n", "\r\n", "\t", "\u3000"),
    *("\u2019", "\u201c", "\u02bc", "ŉ", "ﬁ", "\ufb05", "Ｓ", "＆", "；", "ﾞ", "ｶ", "e\u0301", "\u0301", "\u0345"),
    *("&", ";", "#", "amp", "lt", "&amp;", "&lt;", "&rsquo;", "&#39;", "&#x", "&EACUTE;", "&nbsp", "<", ">"),
    *("<start_of_text>", "<end_of_text>", "START_OF_TEXT", "\x1b", "[", "31m", "\x1b[0m", "\x00", "\ufeff", "\x92"),
    *("\ud83d", "\ude00", "😀", "\u200d", "Σ", "İ", "犬", "ك", "\x0b", "\x1c", "\x85", "\u2028", "\x81"),
]
any_text = st.text(st.characters(exclude_categories=("Cn",)), max_size=60)
ascii_text = st.text(st.characters(max_codepoint=0x7F), max_size=60)
latin_text = st.text(st.characters(max_codepoint=0x24F), max_size=30)
fragments = st.lists(st.sampled_from(FRAGMENTS), max_size=25).map("".join)


def assume_no_mojibake(text: str) -> None:
    """Leave out texts that ftfy takes for mojibake: its guesses of wrong decodings are not made here."""
    assume(ftfy.fix_text(text) == ftfy.fix_text(text, fix_encoding=False))


def assume_known(text: str) -> None:
    """Leave out characters that only Python's Unicode data, not that of regex, has: they are split otherwise."""
    assume(not regex.search(r"\p{Cn}", text))


@pytest.mark.slow
@settings(max_examples=2_000)
@given(any_text | latin_text, st.sampled_from(LENGTHS))
def test_any_text_is_tokenized_as_open_clip_does(text: str, context_length: int) -> None:
    assume_no_mojibake(text)
    assume_known(text)
    check_same([text], context_length)


@pytest.mark.slow
@settings(max_examples=2_000)
@given(fragments | ascii_text, st.sampled_from(LENGTHS))
def test_any_text_of_awkward_parts_is_tokenized_as_open_clip_does(text: str, context_length: int) -> None:
    assume_no_mojibake(text)
    check_same([text], context_length)


# --- what is not the same, and what is refused ---------------------------------------------------------


def test_mojibake_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "sch\u00c3\u00b6n"
    mine = ours()([text])
    assert np.array_equal(THEIRS(["sch\u00f6n"]), THEIRS([text]))
    assert not np.array_equal(mine, THEIRS([text]))
    monkeypatch.setattr(ftfy, "fix_text", functools.partial(ftfy.fix_text, fix_encoding=False))
    assert np.array_equal(mine, THEIRS([text]))


@pytest.mark.slow
def test_the_tokens_of_a_text_are_between_start_and_end() -> None:
    assert ours(8)(["a photo of a dog"]).tolist() == [[START, 320, 1125, 539, 320, 1929, END, 0]]
    assert ours(4)(["a photo of a dog"]).tolist() == [[START, 320, 1125, END]]
    assert ours(1)(["a photo of a dog"]).tolist() == [[END]]
    assert ours(8).encode("a photo of a dog") == [320, 1125, 539, 320, 1929]


def test_one_text_is_a_batch_of_one_and_none_a_batch_of_none() -> None:
    assert np.array_equal(ours()("a dog"), ours()(["a dog"]))
    assert np.array_equal(ours()(("a dog",)), ours()(["a dog"]))
    assert (ours(9)([]).shape, ours(9)([]).dtype) == ((0, 9), np.int64)


@pytest.mark.parametrize("context_length", [0, -1])
def test_a_context_without_room_for_a_token_is_refused(context_length: int) -> None:
    with pytest.raises(ValueError, match="context_length must be at least 1"):
        Tokenizer(merges_of(THEIRS), context_length)


@pytest.mark.parametrize(
    "damage",
    [
        lambda merges: "",
        lambda merges: merges[: merges.rindex("\n", 0, -1)],
        lambda merges: merges + "a b\n",
        lambda merges: "#version: 0.2\n" + merges,
        lambda merges: merges.replace("i n\n", "in\n", 1),
    ],
    ids=["empty", "one too few", "one too many", "a heading", "one symbol"],
)
def test_merges_of_another_vocabulary_are_refused(damage: Callable[[str], Any]) -> None:
    with pytest.raises(ValueError, match=f"merges must be {MERGES} lines of two symbols each"):
        Tokenizer(damage(merges_of(THEIRS)), 77)


@pytest.mark.slow
def test_merges_are_read_with_or_without_a_last_line_break_and_from_windows() -> None:
    merges = merges_of(THEIRS)
    for form in (merges.removesuffix("\n"), merges.replace("\n", "\r\n")):
        assert np.array_equal(Tokenizer(form, 77)(IMAGENET_CLASSNAMES), ours()(IMAGENET_CLASSNAMES))


def test_nothing_but_numpy_and_the_standard_library_is_imported() -> None:
    tree = ast.parse(Path(clip_tokenizer.__file__).read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "." for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in imported} <= sys.stdlib_module_names | {"numpy"}


# --- pruned vocabularies -------------------------------------------------------------------------------

BYTES = range(512)


def text_of(tokens: Sequence[int], vocabulary: Sequence[int]) -> str:
    """What tokens of a pruned vocabulary spell, by open_clip's own table."""
    return THEIRS.decode([vocabulary[token - 1] for token in tokens])


@pytest.mark.parametrize("kept", [[], [320, 1125, 2368], list(range(512, START))], ids=["bytes", "some", "all"])
@pytest.mark.parametrize("text", ["a photo of a red fox.", "Ü 日本 🦊", "it's 1970"])
def test_a_pruned_vocabulary_spells_the_same_text(kept: list[int], text: str) -> None:
    vocabulary = sorted({*BYTES, START, END, *kept})
    (row,) = Tokenizer(merges_of(THEIRS), 77, vocabulary)([text])
    used = row[row > 0]
    assert text_of(used[1:-1], vocabulary) == THEIRS.decode(THEIRS.encode(text))
    assert (vocabulary[used[0] - 1], vocabulary[used[-1] - 1]) == (START, END)
    if len(kept) > 3:
        assert [vocabulary[token - 1] for token in used[1:-1]] == THEIRS.encode(text)


def test_a_token_that_is_missing_becomes_the_two_that_it_was_merged_from() -> None:
    full = ours()
    (fox,) = full.encode("fox")
    first, second = full.split(fox)
    assert THEIRS.decoder[first] + THEIRS.decoder[second] == THEIRS.decoder[fox] == "fox</w>"
    vocabulary = sorted({*BYTES, START, END, first})
    pruned = Tokenizer(merges_of(THEIRS), 77, vocabulary)
    found = [vocabulary[token - 1] for token in pruned.encode("fox")]
    assert found[0] == first
    assert "".join(THEIRS.decoder[token] for token in found) == "fox</w>"
    assert pruned.clip_tokens("fox") == [fox]
    assert full.split(65) == (65,)
    assert full.split(START) == (START,)


def test_a_text_that_is_longer_in_a_pruned_vocabulary_is_cut_there() -> None:
    pruned = Tokenizer(merges_of(THEIRS), 5, sorted({*BYTES, START, END}))
    assert pruned.cut("owl") == 0
    assert pruned.cut("owls") == 1
    assert pruned(["owls"])[0].tolist() == [513, *pruned.encode("owls")[:3], 514]


@pytest.mark.parametrize("absent", [0, 511, START, END])
def test_a_vocabulary_without_a_token_that_every_text_needs_is_refused(absent: int) -> None:
    with pytest.raises(ValueError, match="lacks"):
        Tokenizer(merges_of(THEIRS), 77, sorted({*BYTES, START, END} - {absent}))
