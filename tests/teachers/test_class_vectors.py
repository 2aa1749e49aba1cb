"""Class vectors: the tokens of class prompts, and the notices of what a short context cuts off."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from comkd_cli.data.prompts import Prompts
from comkd_cli.errors import DataError
from comkd_cli.events import Event, Notice
from comkd_cli.models.backbones import PROMPTSRC_TEMPLATES, Clip, build_clip, tokens_cut
from comkd_cli.recipe.model import Model
from comkd_cli.teachers.class_vectors import encode_ensemble, encode_prompts, report_truncation, tokenize_prompts
from tests import tiny

CPU = torch.device("cpu")
# Of 10 tokens, start and end among them, 8 are words; "a photo of a {}." leaves 3 for the name.
NAMES = ("cat", "very old cat", "very old grey cat", "very very old grey cat")


def notices(events: list[Event]) -> list[str]:
    return [event.text for event in events if isinstance(event, Notice)]


@pytest.fixture(scope="module")
def clip() -> Clip:
    return build_clip(Model(config=tiny.CLIP), seed=3)


@pytest.fixture(scope="module")
def roomy() -> Clip:
    """Reads every prompt of these tests whole."""
    text = {**tiny.CLIP["text_cfg"], "context_length": 77}  # type: ignore[dict-item]
    return build_clip(Model(config={**tiny.CLIP, "text_cfg": text}), seed=3)


def test_cut_tokens_are_those_that_a_longer_context_has_more(clip: Clip, roomy: Clip) -> None:
    texts = [
        "a",
        "a photo of a cat.",
        *NAMES,
        "one two three four five six seven eight",
        "x" * 9,
        "naïve café &amp; co",
    ]
    texts += [f"{text} {text}" for text in texts] + ["<" * 30, "🦊" * 9, ""]
    used = [int((row == roomy.tokenize([""])[0, 1]).nonzero()[0]) + 1 for row in roomy.tokenize(texts)]
    assert tokens_cut(clip, texts) == [max(0, length - 10) for length in used]
    assert tokens_cut(roomy, texts) == [0] * len(texts)


class Words:
    """A tokenizer of the transformers library: a token a word, and one at either end."""

    def __call__(self, texts: list[str], add_special_tokens: bool, **options: object) -> dict[str, list[list[int]]]:
        assert options == {"padding": False, "truncation": False, "verbose": False}
        marks = [0] if add_special_tokens else []
        return {"input_ids": [[*marks, *([1] * len(text.split())), *marks] for text in texts]}


@pytest.mark.parametrize(("mode", "expected"), [("", [0, 0, 1]), ("clips", [0, 1, 2])])
def test_tokenizers_of_transformers_tokenize_the_whole_text(clip: Clip, mode: str, expected: list[int]) -> None:
    tokenizer = SimpleNamespace(
        context_length=6, tokenizer=Words(), clean_fn=lambda text: " ".join(text.split()), tokenizer_mode=mode
    )
    texts = ["one  two three", "one two three four", "one two three four five"]
    assert tokens_cut(replace(clip, tokenize=tokenizer), texts) == expected  # type: ignore[arg-type]


def test_truncated_prompts_are_named_and_counted(clip: Clip) -> None:
    events: list[Event] = []
    tokenize_prompts(clip, NAMES[:2], "a photo of a {}.", events.append)
    assert events == []
    encode_prompts(clip, NAMES, "a photo of a {}.", CPU, events.append)
    (text,) = notices(events)
    assert "reads 10 tokens of a prompt: the prompts of 2 of 4 classes are truncated" in text
    assert "('very old grey cat', 'very very old grey cat')" in text
    assert "the name itself loses words in 1 ('very very old grey cat')" in text
    assert "shorten `data.template` or the class names" in text


def test_a_long_template_is_reported_also_where_the_names_are_whole(clip: Clip) -> None:
    events: list[Event] = []
    tokenize_prompts(clip, ("cat", "dog"), "{}, a type of pet that barks or does not.", events.append)
    (text,) = notices(events)
    assert "the prompts of 2 of 2 classes are truncated ('cat', 'dog')" in text
    assert "the name itself" not in text


def test_only_the_first_of_many_are_named(clip: Clip) -> None:
    events: list[Event] = []
    tokenize_prompts(
        clip, [f"{letter} thing" for letter in "abcdefg"], "here there and everywhere is {} or so", events.append
    )
    assert "'e thing' and 2 more" in notices(events)[0]


def test_truncated_prompts_of_an_ensemble_are_counted_over_its_templates(clip: Clip, roomy: Clip) -> None:
    events: list[Event] = []
    report_truncation(clip, ("cat", "old cat"), Prompts(PROMPTSRC_TEMPLATES), events.append)
    prompts = [template.replace("{}", name) for name in ("cat", "old cat") for template in PROMPTSRC_TEMPLATES]
    count = sum(tokens > 0 for tokens in tokens_cut(clip, prompts))
    assert count
    assert f"{count} of 120 prompts of " in notices(events)[0]
    encode_ensemble(roomy, ("cat", "old cat"), Prompts(PROMPTSRC_TEMPLATES), CPU, events.append)
    assert len(events) == 1
    encode_ensemble(clip, ("cat", "old cat"), Prompts(PROMPTSRC_TEMPLATES), CPU, events.append)
    assert notices(events)[0] == notices(events)[1]


def test_classes_that_differ_only_beyond_the_context_are_refused(clip: Clip) -> None:
    with pytest.raises(DataError) as caught:
        tokenize_prompts(clip, ("cat", "very old grey grey cat", "very old grey grey dog"), "a photo of a {}.")
    assert caught.value.field == "data.template"
    assert "grey grey cat" in str(caught.value.found)
    assert "grey grey dog" in str(caught.value.found)


def by_hand(clip: Clip, prompts: list[str]) -> torch.Tensor:
    """The unit vector of the sum of the unit vectors of the prompts."""
    features = clip.model.encode_text(clip.tokenize(prompts))  # type: ignore[operator]
    total = sum(feature / feature.norm() for feature in features)
    return total / total.norm()


@torch.no_grad()
def test_a_class_vector_is_the_normalised_mean_of_the_normalised_prompt_vectors(roomy: Clip) -> None:
    prompts = Prompts(("a {}.", "a drawing of the {}"), {"dog": ("a hound", "a puppy", "man's best friend")})
    vectors = encode_prompts(roomy, ("cat", "dog"), prompts, CPU)
    torch.testing.assert_close(vectors[0], by_hand(roomy, ["a cat.", "a drawing of the cat"]))
    torch.testing.assert_close(vectors[1], by_hand(roomy, ["a hound", "a puppy", "man's best friend"]))


def test_one_prompt_for_each_class_is_encoded_as_a_single_template_is(roomy: Clip) -> None:
    expected = encode_prompts(roomy, ("cat", "dog"), "a {}.", CPU)
    assert torch.equal(encode_prompts(roomy, ("cat", "dog"), Prompts(("a {}.",), {"dog": ("a dog.",)}), CPU), expected)


def test_truncated_descriptions_are_named(clip: Clip) -> None:
    events: list[Event] = []
    prompts = Prompts(("a {}.",), {"dog": ("a large dog that barks at every other animal", "a dog")})
    encode_prompts(clip, ("cat", "dog"), prompts, CPU, events.append)
    (text,) = notices(events)
    assert "1 of 3 prompts of 1 of 2 classes are truncated ('dog')" in text
    assert "the name itself" not in text


def test_classes_of_an_ensemble_with_the_same_tokens_are_refused(clip: Clip) -> None:
    same = Prompts(("a {}.", "the {}."), {"dog": ("the cat.", "a cat.")})
    with pytest.raises(DataError):
        encode_prompts(clip, ("cat", "dog"), same, CPU)
    encode_prompts(clip, ("cat", "dog"), Prompts(same.templates, {"dog": ("the cat.", "a dog.")}), CPU)
