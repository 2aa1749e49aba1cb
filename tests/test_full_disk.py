"""Every command on a disk that is full or read-only: one message with the path and what to do, and nothing is lost."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests import tiny, warm

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not shutil.which("mount"), reason="needs mount")]

DISK_KIB = 1024
COMMANDS = {
    "run": ("distill", "tiny.yaml", "--runs", "{disk}/runs"),
    "teacher cache": ("distill", "cached.yaml", "--precompute", "--runs", "{disk}/runs"),
    "scores": ("evaluate", "runs/tiny/digits/seed1/student.pt", "--runs", "runs", "--out", "{disk}/out"),
    "bundle": ("export", "runs/tiny/digits/seed1/student.pt", "--out", "{disk}/bundle"),
    "report": ("report", "runs/tiny/digits/seed1", "--out", "{disk}/report.html"),
    "recipe": ("init", "digits", "--out", "{disk}/own.yaml"),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished student, two recipes and a folder of images."""
    folder = tmp_path_factory.mktemp("home")
    optim = {**tiny.OPTIM, "epochs": 1}
    for name, changes in {"tiny": {}, "cached": {"teacher_cache": {"views": 4}}}.items():
        (folder / f"{name}.yaml").write_text(json.dumps(tiny.recipe(optim=optim, **changes)))
    tiny.digits_folder(folder / "digits", 24, 12)
    done = warm.run("distill", "tiny.yaml", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of DISK_KIB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_KIB}k", "tmpfs", folder], check=False)
    if mounted.returncode:
        pytest.skip("mounting is not allowed")
    yield folder
    subprocess.run(["umount", folder], check=True)


def fill(disk: Path) -> None:
    """Leave no room."""
    with (disk / "filler").open("wb", buffering=0) as file, suppress(OSError):
        for _ in range(2 * DISK_KIB):
            file.write(bytes(1024))
    assert shutil.disk_usage(disk).free == 0


def make_read_only(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)


@pytest.mark.parametrize("state", ["full", "read-only"])
@pytest.mark.parametrize("what", COMMANDS)
def test_one_message_names_the_path_and_what_to_do(home: Path, disk: Path, what: str, state: str) -> None:
    if state == "full":
        fill(disk)
    else:
        make_read_only(disk)
    before = sorted(disk.rglob("*"))
    done = warm.run(*(part.format(disk=disk) for part in COMMANDS[what]), cwd=home)
    assert done.returncode == 1, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert str(disk) in errors[0]
    reason, remedy = ("No space left", "free") if state == "full" else ("Read-only file system", "choose|give")
    assert reason in errors[0]
    assert any(word in errors[0] for word in remedy.split("|"))
    left = [path for path in sorted(disk.rglob("*")) if path not in before]
    assert not [path for path in left if path.is_file() and path.stat().st_size], left


def test_a_run_continues_once_there_is_room(home: Path, disk: Path) -> None:
    """The disk fills in the first epoch of the teacher, whose checkpoint is larger than it."""
    stopped = warm.run("distill", "tiny.yaml", "--runs", str(disk / "runs"), cwd=home)
    assert stopped.returncode == 1
    assert "state.pt: could not be written: No space left on device; free space" in stopped.stderr
    subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
    done = warm.run("distill", "tiny.yaml", "--runs", str(disk / "runs"), cwd=home)
    assert done.returncode == 0, done.stderr
    place = "tiny/digits/seed1/student.pt"
    assert (disk / "runs" / place).read_bytes() == (home / "runs" / place).read_bytes()
