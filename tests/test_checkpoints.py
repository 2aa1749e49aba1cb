from pathlib import Path

import pytest
import torch

from comkd_cli.checkpoints import load_student, load_teacher
from comkd_cli.errors import CheckpointError


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
