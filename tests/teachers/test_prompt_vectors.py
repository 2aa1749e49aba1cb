from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from comkd_cli.errors import Interrupted
from comkd_cli.events import ignore_event
from comkd_cli.method.teacher import encode_classes
from comkd_cli.models.backbones import Clip, build_clip
from comkd_cli.recipe.model import Model
from comkd_cli.teachers import prompt_vectors
from comkd_cli.teachers.prompt_vectors import PromptVectors
from tests import tiny

PROMPTS = [f"a {name}" for name in ("cat", "dog", "fox", "owl", "bee")]


@pytest.fixture(scope="module")
def clip() -> Clip:
    return build_clip(Model(config=tiny.CLIP), seed=3)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of prompts of each forward pass; blocks have two prompts."""
    monkeypatch.setattr(prompt_vectors, "BLOCK", 2)
    counts: list[int] = []

    def counted(model: object, tokens: torch.Tensor) -> torch.Tensor:
        counts.append(len(tokens))
        return encode_classes(model, tokens)

    monkeypatch.setattr(prompt_vectors, "encode_classes", counted)
    return counts


@pytest.fixture
def store(clip: Clip, tmp_path: Path) -> Callable[[str], PromptVectors]:
    return lambda key: PromptVectors(clip, key, tmp_path / "vectors", torch.device("cpu"), ignore_event)


def go_on() -> None:
    pass


def test_vectors_are_the_teachers_and_are_computed_once(
    clip: Clip, encoded: list[int], store: Callable[[str], PromptVectors]
) -> None:
    found = store("one").of(PROMPTS, go_on)
    with torch.no_grad():
        expected = encode_classes(clip.model, clip.tokenize(PROMPTS)).numpy()
    assert found.dtype == np.float16
    np.testing.assert_allclose(found, expected, atol=1e-3)
    assert np.array_equal(store("one").of(PROMPTS, go_on), found)
    assert encoded == [2, 2, 1]
    store("two").of(PROMPTS[:2], go_on)  # of another teacher
    assert encoded == [2, 2, 1, 2]


def test_an_interrupted_run_keeps_its_blocks(
    encoded: list[int], store: Callable[[str], PromptVectors], tmp_path: Path
) -> None:
    def stop() -> None:
        if len(encoded) == 2:
            raise Interrupted("stopped")

    with pytest.raises(Interrupted):
        store("one").of(PROMPTS, stop)
    damaged = sorted((tmp_path / "vectors").iterdir())[0]
    damaged.write_bytes(damaged.read_bytes()[:-3])
    assert len(store("one").of(PROMPTS, go_on)) == 5
    assert encoded == [2, 2, 2, 1]  # the damaged block again, and the last
