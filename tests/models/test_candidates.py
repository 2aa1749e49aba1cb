"""What is proposed can be built, and what is in the Hub's cache is known."""

from functools import cache
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import constants

from comkd_cli.models.backbones import ImageTower
from comkd_cli.models.candidates import (
    STUDENTS,
    TEACHERS,
    StudentCandidate,
    student_is_local,
    teacher_is_local,
    untrained_teacher,
)
from comkd_cli.models.costs import parameters
from comkd_cli.recipe.model import Model
from tests.outlined import outlined


def tower_of(candidate: StudentCandidate, size: int) -> ImageTower:
    return outlined(Model(config=candidate.config(size, pretrained=False)))


@cache
def own_parameters(name: str) -> tuple[int, int]:
    """Of timm's own model: the number of its parameters and the width of its features."""
    with torch.device("meta"):
        own = timm.create_model(name, num_classes=0, pretrained=False)
    return parameters(own), own.num_features


@pytest.mark.slow
@pytest.mark.parametrize("size", [64, 128, 224])
@pytest.mark.parametrize("candidate", STUDENTS, ids=lambda candidate: candidate.base_name)
def test_a_student_is_the_whole_timm_tower_at_its_size(candidate: StudentCandidate, size: int) -> None:
    tower = tower_of(candidate, size)
    own, width = own_parameters(candidate.timm_name)
    projection = 0 if candidate.proj == "none" else width * candidate.embed_dim
    assert parameters(tower.module) == own + projection
    assert tower.width == candidate.embed_dim
    assert tower.preprocessing.size == (size if candidate.any_size else 224)


@pytest.mark.slow
def test_students_have_weights_at_timm_and_are_ordered_from_the_largest() -> None:
    assert all(timm.get_pretrained_cfg(candidate.timm_name).license == "apache-2.0" for candidate in STUDENTS)
    counts = [parameters(tower_of(candidate, 224).module) for candidate in STUDENTS]
    assert counts == sorted(counts, reverse=True)


@pytest.mark.parametrize("size", [64, 128])
def test_the_untrained_teacher_takes_its_size(size: int) -> None:
    tower = outlined(Model(config=untrained_teacher(size)))
    assert (tower.width, tower.preprocessing.size) == (64, size)


def cached(cache: Path, repository: str, name: str) -> None:
    """A file in a cache of the Hugging Face Hub, in the layout that its documentation describes."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text("abc")
    (folder / "snapshots/abc").mkdir(parents=True)
    (folder / "snapshots/abc" / name).write_bytes(b"weights")


def test_weights_in_the_cache_are_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert not any(map(teacher_is_local, TEACHERS))
    assert not any(map(student_is_local, STUDENTS))
    cached(tmp_path, "timm/vit_large_patch14_clip_224.openai", "open_clip_model.safetensors")
    cached(tmp_path, "timm/mobilenetv3_small_050.lamb_in1k", "model.safetensors")
    cached(tmp_path, "timm/vit_base_patch16_clip_224.openai", "README.md")
    assert [candidate.arch for candidate in TEACHERS if teacher_is_local(candidate)] == ["ViT-L-14-quickgelu"]
    assert [candidate.base_name for candidate in STUDENTS if student_is_local(candidate)] == ["mobilenetv3_small_050"]
