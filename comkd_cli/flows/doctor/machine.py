"""Cores, memory and disk that a run may use."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path

from comkd_cli.edge.machine import cpu_name, usable_cores
from comkd_cli.flows.doctor.checks import Check

GIB = 2**30
LEAST_MEMORY = 2 * GIB  # torch and open_clip take one, and the demonstration run most of another
LEAST_DISK = 2 * GIB  # a run of ViT-B/16 with its checkpoint, and a bundle
LEAST_SHARED = 256 * 2**20  # the queues of a few processes that decode images; Docker gives 64 MiB
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
CGROUP = Path("/sys/fs/cgroup")
SHARED = Path("/dev/shm")


def check_cores() -> Check:
    """Cores of this process: affinity, and the share that a container allows."""
    cores, found = usable_cores(), f"{usable_cores()} usable, {cpu_name()}"
    quota = _cpu_quota()
    limits = [f"{name}={os.environ[name]}" for name in THREAD_VARIABLES if os.environ.get(name)]
    if limits:
        found += f"; {', '.join(limits)}"
    if quota is not None and quota < cores:
        remedy = f"set OMP_NUM_THREADS={max(1, round(quota))}, since torch starts a thread for each core that it sees"
        return Check("cores", f"{found}; the container may use {quota:g} of them", "warning", remedy)
    return Check("cores", found)


def check_memory() -> Check:
    """Memory that a run can still use."""
    free = _free_memory()
    if free is None:
        return Check("memory", "unknown on this system")
    found = f"{free / GIB:.1f} GiB free"
    if free < LEAST_MEMORY:
        return Check("memory", found, "warning", "close other programs; even `comkd distill digits` takes about 1 GiB")
    return Check("memory", found)


def check_shared_memory() -> list[Check]:
    """Room for decoded images on their way between processes; nothing if the system has no such folder."""
    if not SHARED.is_dir():
        return []
    total = shutil.disk_usage(SHARED).total
    found = f"{total / GIB:.2f} GiB at {SHARED}"
    if total < LEAST_SHARED:
        remedy = "start the container with --shm-size=2g, or set data.workers=0 in the recipe"
        return [Check("shared memory", found, "warning", remedy)]
    return [Check("shared memory", found)]


def check_disk(runs: Path) -> Check:
    """Whether runs can be written, and the space for them."""
    place = next(path for path in (runs.absolute(), *runs.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=place):
            free = shutil.disk_usage(place).free
    except OSError as error:
        remedy = "choose a writable folder with --runs"
        return Check("disk", f"{place}: {error.strerror or error}", "error", remedy)
    found = f"{free / GIB:.1f} GiB free for {runs}"
    if free < LEAST_DISK:
        return Check("disk", found, "warning", "delete old runs, or choose another folder with --runs")
    return Check("disk", found)


def _free_memory() -> int | None:
    """Bytes; the smaller of the system's free memory and the memory that a container may still use."""
    found = []
    if match := re.search(r"^MemAvailable:\s*(\d+) kB", _text(Path("/proc/meminfo")), re.MULTILINE):
        found.append(int(match[1]) * 1024)
    limit, used = (_text(CGROUP / name).strip() for name in ("memory.max", "memory.current"))
    if limit.isdigit() and used.isdigit():
        found.append(max(0, int(limit) - int(used)))
    return min(found, default=None)


def _cpu_quota() -> float | None:
    """How many cores a container may use; None without a limit."""
    quota, _, period = _text(CGROUP / "cpu.max").strip().partition(" ")
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else None


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
