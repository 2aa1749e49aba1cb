"""The machine that a program runs on: its processor, the memory of this process, the versions of libraries."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path


def usable_cores() -> int:
    """Cores of this machine that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
    """Peak resident memory of this process; None where the system does not tell."""
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
