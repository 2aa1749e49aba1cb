"""Run an ONNX graph in a process of its own, because onnxruntime can crash the process that it runs in.

    python -m comkd_cli.bundles.runner GRAPH INPUTS.npz OUTPUTS.npz OPTIMIZATION

INPUTS holds arrays `batch/NAME`, each a batch for the graph's first input, and `input/NAME` for its other
inputs, which are the same for every batch. OUTPUTS receives the graph's output for each batch, by the batch's name.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from comkd_cli.edge.fixed_batch import run_in_batches
from comkd_cli.edge.session import start_session
from comkd_cli.errors import ExportError

BATCH, OTHER_INPUT = "batch/", "input/"


def run_graph(
    graph: Path,
    batches: Mapping[str, np.ndarray],
    extra: Mapping[str, np.ndarray] | None = None,
    optimization: str = "all",
) -> dict[str, np.ndarray]:
    """The graph's output for each batch, by the same names.

    extra: arrays for its other inputs. optimization: onnxruntime's, `all` or `basic`. Temporary files are written
    beside the graph. Raises ExportError if onnxruntime refuses the graph or crashes, and OSError if the system refuses
    to write, such as on a full disk, which is not a failure of the graph.
    """
    arrays = {f"{BATCH}{name}": array for name, array in batches.items()}
    arrays |= {f"{OTHER_INPUT}{name}": array for name, array in (extra or {}).items()}
    with tempfile.TemporaryDirectory(prefix=".run.", dir=graph.parent) as folder:
        inputs, outputs = Path(folder, "inputs.npz"), Path(folder, "outputs.npz")
        np.savez(inputs, **arrays)  # type: ignore[arg-type] # numpy types its own keywords only
        module = "comkd_cli.bundles.runner"
        command = [sys.executable, "-m", module, str(graph), str(inputs), str(outputs), optimization]
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
        if finished.returncode:
            message = last_line(finished.stderr)
            if refused := re.match(r"OSError: \[Errno (\d+)\]", message):
                number = int(refused[1])
                raise OSError(number, os.strerror(number), folder)
            status = f"signal {-finished.returncode}" if finished.returncode < 0 else f"exit {finished.returncode}"
            raise ExportError(f"onnxruntime could not run it ({status}): {message}", path=graph.name)
        with np.load(outputs) as results:
            return {name: results[name] for name in results.files}


def last_line(text: str) -> str:
    """The last line of a process's standard error, where Python prints the error itself."""
    return next(reversed(text.strip().splitlines()), "no message")


def main(graph: str, inputs: str, outputs: str, optimization: str) -> None:
    """The side of the child process."""
    session = start_session(Path(graph).read_bytes(), threads=None, optimization=optimization)
    with np.load(inputs) as arrays:
        others = {name.removeprefix(OTHER_INPUT): arrays[name] for name in arrays.files if name.startswith(OTHER_INPUT)}
        results: dict[str, np.ndarray] = {
            name.removeprefix(BATCH): run_in_batches(session, arrays[name], others)
            for name in arrays.files
            if name.startswith(BATCH)
        }
    np.savez(outputs, **results)  # type: ignore[arg-type] # as above


if __name__ == "__main__":
    main(*sys.argv[1:])
