"""Several processes on this machine that work together over gloo, as torchrun starts them."""

import os
import subprocess
import sys
from pathlib import Path


def launch(processes: int, *arguments: str, cwd: Path) -> subprocess.Popen[str]:
    """Start `torchrun --nproc-per-node PROCESSES ARGUMENTS` on the CPU, on a free port."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    root = str(Path(__file__).parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [*command, *arguments], cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run(processes: int, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The same, to its end."""
    started = launch(processes, *arguments, cwd=cwd)
    try:
        out, err = started.communicate(timeout=280)
    finally:
        started.kill()
    return subprocess.CompletedProcess(started.args, started.returncode, out, err)
