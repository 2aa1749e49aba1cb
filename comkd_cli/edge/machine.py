"""The machine that a program runs on: its processor, the memory of this process, the versions of libraries."""

from __future__ import annotations

import math
import os
import platform
import re
import subprocess
import sys
from pathlib import Path


def usable_cores() -> int:
    """Cores that this process may use, by its affinity and by the CPU quotas of its control groups, rounded up."""
    quotas = _cpu_quotas() if sys.platform == "linux" else []
    return max(1, min([cores_of_affinity(), *map(math.ceil, quotas)]))


def cores_of_affinity() -> int:
    """Cores that this process may run on, at least some of the time."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_quotas(root: str = "/") -> list[float]:
    """The cores' worth of time that each control group of this process allows, of version 1 or 2, up to the root."""
    try:
        groups = Path(root, "proc/self/cgroup").read_text(errors="replace").splitlines()
    except OSError:
        return []
    quotas = []
    for group in groups:
        _, _, names_and_path = group.partition(":")
        names, _, path = names_and_path.partition(":")
        if names and "cpu" not in names.split(","):
            continue
        top = Path(root, "sys/fs/cgroup", names and "cpu")
        for folder in ("/" + path.strip("/"), *map(str, Path("/" + path.strip("/")).parents)):
            quotas.append(_quota(top / folder.strip("/")))
    return [quota for quota in quotas if quota is not None]


def _quota(group: Path) -> float | None:
    """The quota of one group, in cores; None if it has none."""
    try:
        if (version_2 := group / "cpu.max").is_file():
            quota, period = version_2.read_text().split()
        else:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):  # no such file, or `max`
        return None


def cpu_name() -> str:
    """The processor's name as far as the system tells; on ARM the board's, such as `Raspberry Pi 5 Model B`."""
    file = Path("/proc/cpuinfo")
    text = file.read_text(errors="replace") if file.is_file() else ""
    for field in ("model name", "Model"):
        if found := re.search(rf"^{field}\s*:[ \t]*(\S.*)$", text, re.MULTILINE):
            return found[1].strip()
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        if name := subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip():
            return name
    return platform.processor() or platform.machine()


def peak_bytes() -> int | None:
    """Peak resident memory of this process; None if the system does not tell."""
    # Linux's getrusage includes the memory of the process that started this one.
    status = Path("/proc/self/status")
    text = status.read_text() if status.is_file() else ""
    if found := re.search(r"^VmHWM:\s*(\d+) kB", text, re.MULTILINE):
        return int(found[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def versions() -> dict[str, str]:
    """What decides the last bits of an answer, and its speed: the libraries and the kind of the processor."""
    import numpy
    import onnxruntime
    import PIL

    return {
        "python": platform.python_version(),
        "onnxruntime": str(onnxruntime.__version__),
        "pillow": PIL.__version__,
        "numpy": numpy.__version__,
        "machine": f"{platform.system()} {platform.machine()}",
    }
