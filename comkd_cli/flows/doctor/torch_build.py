"""torch and torchvision: whether they match each other, the machine's GPU and its driver."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib import metadata
from typing import Any

from comkd_cli.flows.doctor.checks import Check

GIB = 2**30
IMPORT_SECONDS = 300  # of torch, from a cold disk
MINOR_AHEAD = 15  # torchvision 0.(n + 15) is built for torch 2.n
BUILDS = "install matching builds: https://pytorch.org/get-started/locally/"


def check_torch() -> list[Check]:
    """Rows `torch`, `torchvision` and `device`."""
    versions = {name: _version(name) for name in ("torch", "torchvision")}
    if None in versions.values():
        return []  # named as a missing requirement
    pair = check_pair(str(versions["torch"]), str(versions["torchvision"]))
    found = _facts()
    if isinstance(found, str):
        return [Check("torch", f"{versions['torch']}: {found}", "error", BUILDS), pair]
    build = f"built for CUDA {found['cuda_build']}" if found["cuda_build"] else "without CUDA"
    threads = f"{found['threads']} thread{'s' if found['threads'] > 1 else ''}"
    checks = [Check("torch", f"{found['torch']}, {build}, {threads}"), pair]
    if failed := found.get("failed"):
        return [*checks, Check("device", failed, "error", BUILDS)]
    return [*checks, check_device(found, _driver())]


def check_pair(torch: str, torchvision: str) -> Check:
    """Whether versions such as 2.9.1+cu128 and 0.24.1+cpu match."""
    release, _, build = torch.partition("+")
    vision_release, _, vision_build = torchvision.partition("+")
    major, minor = _numbers(release)
    text = f"{torchvision}, for torch {torch}"
    if major == 2 and _numbers(vision_release) != (0, minor + MINOR_AHEAD):
        remedy = f"pip install 'torchvision==0.{minor + MINOR_AHEAD}.*' from the index that torch came from"
        return Check("torchvision", text, "error", remedy)
    if build and vision_build and build != vision_build:
        return Check("torchvision", text, "warning", BUILDS)
    return Check("torchvision", text)


def check_device(found: dict[str, Any], driver: str | None) -> Check:
    """The device that comkd uses. found: of torch_facts. driver: of an NVIDIA GPU; None without one."""
    if found["devices"]:
        gpus = [
            f"{gpu['name']}, {gpu['free_bytes'] / GIB:.1f} of {gpu['total_bytes'] / GIB:.1f} GiB free"
            for gpu in found["devices"]
        ]
        return Check("device", "; ".join([*gpus, f"driver {driver or 'unknown'}"]))
    if driver is None:
        return Check("device", f"{found['device']}; no NVIDIA driver")
    if not found["cuda_build"]:
        remedy = f"to use the GPU, {BUILDS}"
        return Check("device", f"cpu; an NVIDIA driver {driver}, but torch has no CUDA", "warning", remedy)
    reason = f": {found['problems'][0]}" if found["problems"] else ""
    remedy = "update the driver, or install a torch for an older CUDA; CUDA_VISIBLE_DEVICES may also hide the GPU"
    return Check("device", f"cpu; an NVIDIA driver {driver}, but torch finds no GPU{reason}", "warning", remedy)


def _facts() -> dict[str, Any] | str:
    """What torch_facts prints, or why it printed nothing."""
    command = [sys.executable, "-m", "comkd_cli.flows.doctor.torch_facts"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=IMPORT_SECONDS)
    except subprocess.TimeoutExpired:
        return f"could not be imported within {IMPORT_SECONDS} s"
    if done.returncode < 0:
        return f"the process that imported it was ended by signal {-done.returncode}"
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return f"could not be imported: {lines[-1] if lines else done.returncode}"
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _driver() -> str | None:
    """The version of the NVIDIA driver; None if there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout.strip() else None


def _numbers(release: str) -> tuple[int, int]:
    """The first two numbers of a version such as 0.24.1a0."""
    major, minor = release.split(".")[:2]
    return int(major), int("".join(filter(str.isdigit, minor)) or 0)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
