"""Several processes on this machine that work together over gloo, as torchrun starts them."""

import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests import warm

TIMEOUT_SECONDS = 280


def launch(processes: int, *arguments: str, cwd: Path) -> subprocess.Popen[str]:
    """Start `torchrun --nproc-per-node PROCESSES ARGUMENTS` on the CPU, on a free port."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    root = str(Path(__file__).parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [*command, *arguments], cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def start_ranks(processes: int, *arguments: object, cwd: Path, **options: Any) -> list[warm.Process]:
    """Start `comkd ARGUMENTS` in each rank with torchrun's variables; options: those of warm.Process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = []
    for rank in range(processes):
        variables = {**shared, "RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": 1, "CUDA_VISIBLE_DEVICES": ""}
        env = {name: str(value) for name, value in variables.items()}
        ranks.append(warm.Process(*arguments, cwd=cwd, env=env, **options))
    return ranks


def run(processes: int, *arguments: object, cwd: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """The same, to its end; as torchrun does, it ends all ranks when one has failed."""
    ranks = start_ranks(processes, *arguments, cwd=cwd, **options)
    with ThreadPoolExecutor(processes) as readers:
        texts = [readers.submit(rank.communicate, TIMEOUT_SECONDS) for rank in ranks]
        while not all(text.done() for text in texts):
            if any(rank.poll() for rank in ranks):
                for rank in ranks:
                    rank.send_signal(signal.SIGTERM)
                break
            time.sleep(0.05)
        outs, errs = zip(*(text.result() for text in texts), strict=True)
    code = next(filter(None, (rank.returncode for rank in ranks)), 0)
    return subprocess.CompletedProcess([str(argument) for argument in arguments], code, "".join(outs), "".join(errs))
