"""Run an ONNX graph in a process of its own: onnxruntime can crash the process that it runs in.

    python -m comkd_cli.packaging.runner GRAPH INPUTS.npz OUTPUTS.npz

INPUTS holds arrays by any name, each a batch for the graph's one input; OUTPUTS gets the answers under
the same names.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from comkd_cli.errors import ExportError


def run_graph(graph: Path, batches: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The graph's answers to batches of images, by the same names.

    Raises ExportError where onnxruntime refuses the graph or dies of it.
    """
    with tempfile.TemporaryDirectory() as folder:
        inputs, outputs = Path(folder, "inputs.npz"), Path(folder, "outputs.npz")
        np.savez(inputs, **batches)  # type: ignore[arg-type] # numpy types its own keywords only
        command = [sys.executable, "-m", "comkd_cli.packaging.runner", str(graph), str(inputs), str(outputs)]
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
        if finished.returncode:
            said = finished.stderr.strip().splitlines()
            died = f"signal {-finished.returncode}" if finished.returncode < 0 else f"exit {finished.returncode}"
            raise ExportError(f"{graph.name}: onnxruntime can't run it ({died}): {said[-1] if said else 'no message'}")
        with np.load(outputs) as answers:
            return {name: answers[name] for name in answers.files}


def main(graph: str, inputs: str, outputs: str) -> None:
    """The child's side."""
    import onnxruntime

    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    with np.load(inputs) as batches:
        np.savez(outputs, **{key: session.run(None, {name: batches[key]})[0] for key in batches.files})


if __name__ == "__main__":
    main(*sys.argv[1:])
