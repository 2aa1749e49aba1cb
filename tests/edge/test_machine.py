"""What a machine tells of itself."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from comkd_cli.edge import machine
from comkd_cli.edge.machine import cpu_name, peak_bytes

CPUINFO = {
    "x86": (
        "processor\t: 0\nmodel\t\t: 1\nmodel name\t: AMD EPYC 7B13\nprocessor\t: 1\nmodel name\t: AMD\n",
        "AMD EPYC 7B13",
    ),
    "board": (
        "processor\t: 0\nCPU part\t: 0xd0b\n\nModel\t\t: Raspberry Pi 5 Model B Rev 1.0\n",
        "Raspberry Pi 5 Model B Rev 1.0",
    ),
}


def without_proc(monkeypatch: pytest.MonkeyPatch, content: str | None = None) -> None:
    """Let the files of /proc be missing, or hold this."""
    monkeypatch.setattr(Path, "is_file", lambda self: content is not None)
    monkeypatch.setattr(Path, "read_text", lambda self, **_: content)


@pytest.mark.parametrize("kind", CPUINFO)
def test_the_processor_or_the_board_is_named(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content, expected = CPUINFO[kind]
    without_proc(monkeypatch, content)
    assert cpu_name() == expected


@pytest.mark.parametrize("content", [None, "processor\t: 0\nmodel name\t:\n"])
def test_without_a_name_the_kind_of_the_processor_is_given(
    content: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_proc(monkeypatch, content)
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(sys, "platform", "linux")
    assert cpu_name() == platform.machine()


USES_A_BLOCK = """
from comkd_cli.edge.machine import peak_bytes
before = peak_bytes()
block = bytearray(2**26)
block[::4096] = b"1" * len(block[::4096])
print(peak_bytes() - before)
"""


def test_the_peak_is_in_bytes_and_rises_with_what_is_used() -> None:
    command = [sys.executable, "-c", USES_A_BLOCK]
    root = Path(__file__).parents[2]
    rise = int(subprocess.run(command, capture_output=True, text=True, check=True, cwd=root).stdout)
    assert 0.9 * 2**26 < rise < 1.5 * 2**26


def test_where_there_is_no_proc_getrusage_gives_bytes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    here = peak_bytes()
    assert here is not None
    without_proc(monkeypatch)
    elsewhere = peak_bytes()
    assert elsewhere is not None
    assert 0.9 * here <= elsewhere  # it never falls, and may include the memory of the starting process


def test_where_neither_is_known_the_peak_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    without_proc(monkeypatch)
    monkeypatch.setitem(sys.modules, "resource", None)
    assert peak_bytes() is None


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    ("groups", "files", "quotas"),
    [
        ("0::/job/step\n", {"job/step/cpu.max": "max 100000\n", "job/cpu.max": "150000 100000\n"}, [1.5]),
        ("0::/\n", {"cpu.max": "400000 100000\n"}, [4.0]),  # as a container sees its own group
        (
            "3:cpuset:/\n4:cpu,cpuacct:/job\n0::/\n",
            {"cpu/job/cpu.cfs_quota_us": "50000\n", "cpu/job/cpu.cfs_period_us": "100000\n"},
            [0.5],
        ),
        # A container's path of version 1 is that of the host, and its own group is the root of what is mounted.
        (
            "4:cpu:/docker/abc\n",
            {"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"},
            [2.0],
        ),
        ("4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, []),
        ("0::/job\n", {"job/cpu.max": "nonsense\n"}, []),
        ("3:cpuset:/\n", {"cpu.max": "100000 100000\n"}, []),
    ],
)
def test_quotas_of_control_groups_are_cores(
    tmp_path: Path, groups: str, files: dict[str, str], quotas: list[float]
) -> None:
    write(tmp_path / "proc/self/cgroup", groups)
    for name, content in files.items():
        write(tmp_path / "sys/fs/cgroup" / name, content)
    assert machine._cpu_quotas(str(tmp_path)) == quotas


def test_a_system_without_control_groups_has_no_quota(tmp_path: Path) -> None:
    assert machine._cpu_quotas(str(tmp_path)) == []


@pytest.mark.parametrize(("quotas", "cores"), [([], 8), ([2.5, 16.0], 3), ([0.2], 1)])
def test_the_smallest_quota_counts_rounded_up(monkeypatch: pytest.MonkeyPatch, quotas: list[float], cores: int) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(machine, "cores_of_affinity", lambda: 8)
    monkeypatch.setattr(machine, "_cpu_quotas", lambda: quotas)
    assert machine.usable_cores() == cores
