import ctypes
import json
import platform
import subprocess
import sys

import pytest

from comkd_cli.runtime import allocator

MEASURE = """
import ctypes, json, os
from pathlib import Path
from comkd_cli.runtime.allocator import keep_freed_memory

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
SIZE = 200 * 2**20

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def share_kept():
    before = resident()
    block = libc.malloc(SIZE)
    ctypes.memset(block, 1, SIZE)
    held = resident() - before
    assert held > 0.9 * SIZE, held
    libc.free(block)
    return (resident() - before) / held

default = share_kept()
keep_freed_memory()
print(json.dumps([default, share_kept()]))
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc gives each large block back")
def test_freed_memory_stays_with_the_process_only_after_the_call() -> None:
    command = [sys.executable, "-c", MEASURE]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    default, kept = json.loads(done.stdout)
    assert default < 0.1
    assert kept > 0.9


@pytest.mark.parametrize("system", ["darwin", "win32", "freebsd14"])
def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch, system: str) -> None:
    def refuse(*_arguments: object) -> None:
        raise AssertionError("the C library was asked")

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    monkeypatch.setattr(sys, "platform", system)
    allocator.keep_freed_memory()


def test_a_linux_with_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    class Musl:
        """mallopt is not there; that it was looked for would be an AttributeError."""

        def __init__(self, name: object) -> None:
            asked.append(name)

    monkeypatch.setattr(ctypes, "CDLL", Musl)
    monkeypatch.setattr(sys, "platform", "linux")
    allocator.keep_freed_memory()
    assert asked == [None]
