"""Which teacher and student are proposed, and what is refused."""

from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import constants

from comkd_cli.edge.images import Preprocessing
from comkd_cli.errors import ModelError
from comkd_cli.method.student import Student
from comkd_cli.models import choice
from comkd_cli.models.choice import (
    ChosenTeacher,
    Limit,
    StudentChooser,
    choose_teacher,
    given_teacher,
    proposed_image_size,
)
from comkd_cli.models.costs import parameters
from tests.outlined import outline_once


@pytest.fixture(autouse=True)
def an_empty_cache_and_one_outline_of_each_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "no cache"))
    outline_once(monkeypatch)


@pytest.mark.parametrize(
    ("short_side", "size"), [(0, 64), (28, 64), (32, 64), (33, 128), (64, 128), (65, 224), (4000, 224)]
)
def test_the_input_is_twice_the_short_side_where_it_can_be(short_side: int, size: int) -> None:
    assert proposed_image_size(short_side) == size


@pytest.mark.slow
def test_the_teacher_depends_on_the_gpu(tmp_path: Path) -> None:
    with_gpu, without = (
        choose_teacher(labelled=False, gpu=gpu, image_size=224, download=True) for gpu in (True, False)
    )
    assert (with_gpu.model.arch, with_gpu.image_tower_parameters, with_gpu.dim) == (
        "ViT-L-14-quickgelu",
        303_966_208,
        768,
    )
    assert (without.model.arch, without.image_tower_parameters, without.dim) == ("ViT-B-16-quickgelu", 86_192_640, 512)
    assert all("downloads" in teacher.reason for teacher in (with_gpu, without))


def test_without_weights_labels_train_a_teacher_and_no_labels_are_refused() -> None:
    teacher = choose_teacher(labelled=True, gpu=False, image_size=224, download=False)
    assert not teacher.has_weights
    assert teacher.model.config is not None
    assert teacher.model.config["vision_cfg"]["image_size"] == 128
    with pytest.raises(ModelError) as caught:
        choose_teacher(labelled=False, gpu=False, image_size=224, download=False)
    assert "--teacher" in str(caught.value.remedy)
    assert "ViT-B-16-quickgelu:openai" in str(caught.value.allowed)


def test_a_given_teacher_is_a_tag_or_a_file(tmp_path: Path) -> None:
    (tmp_path / "clip.pt").write_bytes(b"")
    assert given_teacher("ViT-B-32-quickgelu:openai").dim == 512
    assert given_teacher(f"RN50:{tmp_path / 'clip.pt'}").dim == 1024
    for argument in ("ViT-B-32", "ViT-B-32:", ":openai", "ViT-B-32:opnai", "ViT-B-32:gone.pt"):
        with pytest.raises(ModelError) as caught:
            given_teacher(argument)
        assert caught.value.allowed
    with pytest.raises(ModelError):
        given_teacher(f"NoSuchCLIP:{tmp_path / 'clip.pt'}")


TEACHER = ChosenTeacher("a teacher", given_teacher("ViT-B-16-quickgelu:openai").model, 86_192_640, 512, True, "")


def chooser(milliseconds: dict[int, float] | None = None, teacher: ChosenTeacher = TEACHER) -> StudentChooser:
    """milliseconds: by the size of the image tower in millions, rounded; measuring is an error without it."""

    def measure(student: Student, preprocessing: Preprocessing) -> float:
        assert milliseconds is not None
        return milliseconds.get(round(parameters(student) / 1e6), 1000.0)

    return StudentChooser(teacher, classes=3, image_size=224, download=True, measure=measure)


@pytest.mark.slow
def test_without_a_limit_the_student_has_a_tenth_of_the_teacher() -> None:
    chosen = chooser().choose(Limit())
    assert chosen.name == "vit_tiny_patch16_224"
    assert chosen.parameters <= 86_192_640 / 10
    assert chosen.pretrained
    assert "mobilenetv4_conv_medium" in chosen.reason


@pytest.mark.slow
@pytest.mark.parametrize("most", [30_000_000, 10_500_000, 5_000_000, 2_700_000, 1_200_000])
def test_the_budget_is_kept_by_the_whole_student_and_used(most: int) -> None:
    chosen = chooser().choose(Limit(parameters=most))
    assert most / 2.5 < chosen.parameters <= most
    vision = chosen.config["vision_cfg"]
    assert isinstance(vision, dict)
    assert vision["timm_model_pretrained"] is True


@pytest.mark.slow
def test_a_budget_beyond_every_candidate_is_refused_with_the_nearest() -> None:
    with pytest.raises(ModelError) as caught:
        chooser().choose(Limit(parameters=1000))
    assert str(caught.value.found).startswith("test_efficientnet 0.5 M")
    assert caught.value.allowed == "1,000 parameters"


def test_the_largest_student_within_the_latency_is_taken_and_measured_ones_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(choice, "build_image_tower", lambda model, load_weights: choice.outline_image_tower(model))
    chosen = chooser({22: 40.0, 9: 21.0, 6: 19.5}).choose(Limit(milliseconds=20))
    assert (chosen.name, chosen.milliseconds) == ("vit_tiny_patch16_224", 19.5)
    assert "vit_small_patch16_224 40.0 ms; mobilenetv4_conv_medium 21.0 ms" in chosen.reason
    with pytest.raises(ModelError) as caught:
        chooser({}).choose(Limit(milliseconds=20))
    assert (caught.value.found, caught.value.allowed) == ("test_efficientnet 1000.0 ms", "20 ms")


def test_a_student_is_never_more_than_half_its_teacher() -> None:
    small = replace(TEACHER, image_tower_parameters=5_000_000, dim=64)
    assert chooser(teacher=small).choose(Limit(parameters=10**8)).parameters <= 2_500_000


def test_without_weights_in_the_cache_and_without_downloads_a_student_starts_from_scratch() -> None:
    chosen = replace(chooser(), download=False).choose(Limit())
    assert not chosen.pretrained
    assert "from scratch" in chosen.reason
