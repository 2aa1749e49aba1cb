from pathlib import Path

import pytest
import torch

from comkd_cli.errors import CheckpointError
from comkd_cli.models.checkpoints import STUDENT_FORMAT, TEACHER_FORMAT, load_student, load_teacher


@pytest.mark.parametrize("load", [load_student, load_teacher])
def test_a_file_that_is_none_is_named(load, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "student.pt"
    with pytest.raises(CheckpointError, match="no such file"):
        load(path)
    path.write_text("a text file")
    with pytest.raises(CheckpointError, match=r"student\.pt: is not"):
        load(path)
    torch.save({"state_dict": {}}, path)
    with pytest.raises(CheckpointError, match="no format"):
        load(path)
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match="list"):
        load(path)


def test_a_checkpoint_that_lacks_parts_is_named(tmp_path: Path) -> None:
    path = tmp_path / "student.pt"
    torch.save({"format": "comkd-student/1"}, path)
    with pytest.raises(CheckpointError, match="damaged student"):
        load_student(path)
    torch.save({"format": "comkd-teacher/1", "key": "a"}, path)
    with pytest.raises(CheckpointError, match="damaged teacher"):
        load_teacher(path)


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
def test_a_file_of_a_newer_comkd_asks_for_an_upgrade(load, known: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    kind, _, version = known.rpartition("/")
    path = tmp_path / "some.pt"
    torch.save({"format": f"{kind}/{int(version) + 1}", "odd": 1}, path)
    with pytest.raises(CheckpointError, match=rf"some\.pt: has the format {kind}/\d+ of a newer comkd.*upgrade comkd"):
        load(path)
    torch.save({"format": f"{kind}/new"}, path)
    with pytest.raises(CheckpointError, match=f"it holds {kind}/new, not {known}"):
        load(path)
