"""Run an ONNX graph in a process of its own: onnxruntime can crash the process that it runs in.

    python -m comkd_cli.bundles.runner GRAPH INPUTS.npz OUTPUTS.npz OPTIMIZATION

INPUTS holds arrays `batch/NAME`, each a batch for the graph's first input, and `input/NAME` for its other
inputs, the same for every batch; OUTPUTS gets the answers under the batches' names.
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

from comkd_cli.edge.classifier import start_session
from comkd_cli.errors import ExportError

BATCH, OTHER_INPUT = "batch/", "input/"


def run_graph(
    graph: Path,
    batches: Mapping[str, np.ndarray],
    extra: Mapping[str, np.ndarray] | None = None,
    optimization: str = "all",
) -> dict[str, np.ndarray]:
    """The graph's answers to batches for its first input, by the same names.

    extra: arrays for its other inputs. optimization: onnxruntime's, `all` or `basic`. What is passed on lies beside
    the graph while it runs. Raises ExportError where onnxruntime refuses the graph or dies of it, and OSError where
    the system refuses to write, such as on a full disk: that is no fault of the graph.
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
            said = finished.stderr.strip().splitlines()
            if refused := re.match(r"OSError: \[Errno (\d+)\]", said[-1] if said else ""):
                number = int(refused[1])
                raise OSError(number, os.strerror(number), folder)
            died = f"signal {-finished.returncode}" if finished.returncode < 0 else f"exit {finished.returncode}"
            raise ExportError(f"{graph.name}: onnxruntime can't run it ({died}): {said[-1] if said else 'no message'}")
        with np.load(outputs) as answers:
            return {name: answers[name] for name in answers.files}


def main(graph: str, inputs: str, outputs: str, optimization: str) -> None:
    """The child's side."""
    session = start_session(Path(graph).read_bytes(), threads=None, optimization=optimization)
    first = session.get_inputs()[0].name
    with np.load(inputs) as arrays:
        others = {name.removeprefix(OTHER_INPUT): arrays[name] for name in arrays.files if name.startswith(OTHER_INPUT)}
        answers = {
            name.removeprefix(BATCH): session.run(None, {first: arrays[name], **others})[0]
            for name in arrays.files
            if name.startswith(BATCH)
        }
    np.savez(outputs, **answers)


if __name__ == "__main__":
    main(*sys.argv[1:])
