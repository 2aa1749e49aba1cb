from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from comkd_cli.errors import CheckpointError, ComkdError
from comkd_cli.method.student import Student
from comkd_cli.models.backbones import build_clip, build_image_tower
from comkd_cli.models.checkpoints import (
    STUDENT_FORMAT,
    TEACHER_FORMAT,
    SavedTeacher,
    TeacherRecord,
    load_student,
    load_teacher,
    save_student,
    save_teacher,
)
from comkd_cli.models.plain_data import save_plain
from comkd_cli.recipe import parse_recipe
from tests import tiny


@pytest.fixture
def student_file(tmp_path: Path) -> Path:
    """An untrained student of three classes."""
    recipe = parse_recipe(tiny.recipe(), name="tiny")
    tower = build_image_tower(recipe.student)
    vectors = torch.nn.functional.normalize(torch.ones(3, 16) + torch.eye(3, 16), dim=-1)
    student = Student(tower.module, tower.width, vectors, torch.tensor(10.0), recipe.student, recipe.loss.edu_attention)
    record = tiny.student_record(
        recipe,
        tower,
        source="digits",
        class_names=("a", "b", "c"),
        template="a photo of a {}.",
        identity="0",
        metrics={"loss": 1.0},
    )
    path = tmp_path / "student.pt"
    save_student(path, student, record)
    return path


@pytest.mark.parametrize("load", [load_student, load_teacher])
def test_a_file_that_is_not_a_checkpoint_is_named(load: Callable[[Path], object], tmp_path: Path) -> None:
    path = tmp_path / "student.pt"

    def failure() -> CheckpointError:
        with pytest.raises(CheckpointError) as caught:
            load(path)
        assert caught.value.path == path
        return caught.value

    assert failure().problem == "no such file"
    path.write_text("a text file")
    assert "not written by comkd" in failure().problem
    torch.save({"state_dict": {}}, path)
    assert failure().found == "no format"
    torch.save([1, 2], path)
    assert failure().found == "list"
    path.unlink()
    path.mkdir()
    assert failure().remedy == "specify the student.pt in it"


@pytest.mark.parametrize(("load", "format_name"), [(load_student, STUDENT_FORMAT), (load_teacher, TEACHER_FORMAT)])
def test_a_checkpoint_that_lacks_a_part_is_damaged(
    load: Callable[[Path], object], format_name: str, tmp_path: Path
) -> None:
    path = tmp_path / "some.pt"
    torch.save({"format": format_name, "key": "a"}, path)
    with pytest.raises(CheckpointError, match=r"damaged .* it lacks \w+") as caught:
        load(path)
    assert caught.value.path == path


def test_equal_data_give_equal_files(tmp_path: Path) -> None:
    weights, loss = torch.arange(12.0).reshape(3, 4), "a loss"
    other = "".join(["a ", "loss"])  # another object
    assert other is not loss
    first = {"format": "comkd-test/1", "weights": weights, "kept": [loss], "history": ({loss: 0.5}, {loss: 0.25})}
    second = {"format": "comkd-test/1", "weights": weights, "kept": [loss], "history": ({other: 0.5}, {loss: 0.25})}
    save_plain(tmp_path / "first.pt", first)
    save_plain(tmp_path / "second.pt", second)
    assert (tmp_path / "first.pt").read_bytes() == (tmp_path / "second.pt").read_bytes()


def test_code_in_a_checkpoint_is_never_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"

    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (marker,)

    path = tmp_path / "student.pt"
    torch.save({"format": "comkd-student/1", "recipe": Trap()}, path)
    with pytest.raises(CheckpointError):
        load_student(path)
    assert not marker.exists()


@pytest.mark.parametrize(("load", "known"), [(load_student, STUDENT_FORMAT), (load_teacher, TEACHER_FORMAT)])
def test_a_file_of_a_newer_comkd_asks_for_an_upgrade(
    load: Callable[[Path], object], known: str, tmp_path: Path
) -> None:
    kind, _, version = known.rpartition("/")
    path = tmp_path / "some.pt"
    torch.save({"format": f"{kind}/{int(version) + 1}", "odd": 1}, path)
    with pytest.raises(CheckpointError, match="of a newer comkd") as caught:
        load(path)
    assert (caught.value.path, caught.value.found) == (path, f"{kind}/{int(version) + 1}")
    assert "upgrade comkd" in str(caught.value.remedy)
    torch.save({"format": f"{kind}/new"}, path)
    with pytest.raises(CheckpointError, match="is not a") as caught:
        load(path)
    assert (caught.value.found, caught.value.allowed) == (f"{kind}/new", [known])


@pytest.fixture(scope="module")
def saved_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """student.pt and teacher.pt, as a run would leave them, by the function that reads each."""
    folder = tmp_path_factory.mktemp("saved")
    recipe = parse_recipe(tiny.recipe())
    tower, clip = build_image_tower(recipe.student), build_clip(recipe.teacher)
    names, vectors = ("cat", "dog"), torch.nn.functional.normalize(torch.randn(2, 16), dim=-1)
    student = Student(tower.module, tower.width, vectors, torch.ones(()), recipe.student, recipe.loss.edu_attention)
    save_student(folder / "student.pt", student, tiny.student_record(recipe, tower, class_names=names))
    record = TeacherRecord("1", {"config": tiny.CLIP}, names, "{}", tower.preprocessing, clip.origin, {})
    save_teacher(folder / "teacher.pt", SavedTeacher(record, vectors, torch.ones(()), clip.model.state_dict()))
    return {"student": folder / "student.pt", "teacher": folder / "teacher.pt"}


DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "a weight": (lambda data: first_weight(data).view(-1)[:1].fill_(torch.nan), "NaN or infinite values, first in "),
    "an infinite weight": (lambda data: first_weight(data).view(-1)[:1].fill_(torch.inf), "NaN or infinite values"),
    "a vector": (lambda data: data["class_vectors"].fill_(torch.nan), "first in class_vectors"),
    "the scale": (lambda data: data["logit_scale"].fill_(torch.inf), "first in logit_scale"),
    "too few vectors": (
        lambda data: data.update(class_vectors=data["class_vectors"][:1]),
        r"should be \(2 classes, width\): \(1, 16\)",
    ),
    "no vectors": (lambda data: data.update(class_vectors=None), "NoneType"),
    "two scales": (lambda data: data.update(logit_scale=torch.ones(2)), "its logit scale should be one number"),
    "no state": (lambda data: data.update(state_dict=None), "damaged"),
}


def first_weight(data: dict[str, Any]) -> torch.Tensor:
    found: torch.Tensor = next(value for value in data["state_dict"].values() if value.is_floating_point())
    return found


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(("kind", "load"), [("student", load_student), ("teacher", load_teacher)])
def test_damaged_values_are_refused(
    saved_files: dict[str, Path], tmp_path: Path, kind: str, load: Callable[[Path], object], damage: str
) -> None:
    load(saved_files[kind])
    data = torch.load(saved_files[kind], weights_only=True)
    change, message = DAMAGES[damage]
    change(data)
    path = tmp_path / f"{kind}.pt"
    torch.save(data, path)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(path)
    assert caught.value.path == path


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("metrics", None),
        ("metrics", {"test_top1_percent": "90"}),
        ("class_names", "abc"),
        ("class_names", [1, 2, 3]),
        ("recipe_name", 3),
        ("source", None),
        ("template", None),
        ("teacher", 3),
        ("preprocessing", {"size": -3, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}),
        ("preprocessing", {"size": 32, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "interpolation": "none"}),
        ("class_vectors", torch.eye(3, 16, dtype=torch.int64)),
        ("logit_scale", torch.tensor(10)),
    ],
)
def test_a_field_of_another_type_is_refused(student_file: Path, field: str, value: Any) -> None:
    load_student(student_file)
    torch.save({**torch.load(student_file, weights_only=True), field: value}, student_file)
    with pytest.raises(CheckpointError, match="damaged"):
        load_student(student_file)


def test_tensors_of_another_shape_are_named_in_one_line(student_file: Path) -> None:
    data = torch.load(student_file, weights_only=True)
    torch.save({**data, "class_vectors": data["class_vectors"][:, :8]}, student_file)
    with pytest.raises(CheckpointError) as raised:
        load_student(student_file)
    assert "loading state_dict" not in str(raised.value)
    assert "\\n" not in str(raised.value)
    assert "projector" in str(raised.value)


def test_class_vectors_in_half_precision_still_answer(student_file: Path) -> None:
    data = torch.load(student_file, weights_only=True)
    torch.save({**data, "class_vectors": data["class_vectors"].half()}, student_file)
    student, record = load_student(student_file)
    size = record.preprocessing.size
    assert student(torch.zeros(1, 3, size, size)).logits.dtype == torch.float32


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": 10**5},
        {"width": 10**6},
        {"layers": 10**4, "width": 10**4},
        {"image_size": 10**5},
        {"image_size": [16, 10**5]},
        {"patch_size": 10**5},
        {"mlp_ratio": 10**30},
        {"layers": 10**400},
    ],
)
def test_a_small_file_that_describes_a_huge_model_is_refused_before_it_is_built(
    student_file: Path, changes: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = torch.load(student_file, weights_only=True)
    data["recipe"]["student"]["config"]["vision_cfg"] |= changes
    torch.save(data, student_file)
    monkeypatch.setattr("comkd_cli.models.checkpoints.build_image_tower", None)
    with pytest.raises(ComkdError, match=r"describes (far more|about [\d,]+) weights"):
        load_student(student_file)


@pytest.mark.parametrize("value", [{}, "weights", 3])
def test_a_state_dict_of_anything_but_tensors_is_damaged(student_file: Path, value: object) -> None:
    data = torch.load(student_file, weights_only=True)
    data["state_dict"]["more"] = value
    torch.save(data, student_file)
    with pytest.raises(CheckpointError) as caught:
        load_student(student_file)
    assert caught.value.found == "more"


def test_a_backbone_whose_weights_are_no_text_is_damaged(student_file: Path) -> None:
    data = torch.load(student_file, weights_only=True)
    data["backbone"]["weights"] = [["a"]]
    torch.save(data, student_file)
    with pytest.raises(CheckpointError, match="weights should be text"):
        load_student(student_file)
