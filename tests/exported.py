"""Torch's exporter takes seconds, and onnxruntime a process: what was exported or run before is copied."""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.onnx._internal.exporter._registration import ONNXRegistry

from comkd_cli.bundles import runner

_from_torchlib = ONNXRegistry.from_torchlib


def export_once(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let torch.onnx.export keep its files in a folder, and take them from it for the same module, inputs and settings.

    The same for the logits of a bundle's reference images. The exporter itself is tested in
    tests/bundles/test_graphs.py, the logits in test_reference.py.
    """
    from comkd_cli.bundles import reference

    export, run_graph = torch.onnx.export, reference.run_graph
    patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(torch_operators))

    def cached(module: nn.Module, inputs: tuple[torch.Tensor, ...], path: Path, **settings: Any) -> None:
        digest = hashlib.sha256(repr((module, [tensor.shape for tensor in inputs], settings)).encode())
        for name, value in module.state_dict().items():
            digest.update(name.encode() + value.numpy().tobytes())
        kept = folder / f"{digest.hexdigest()}.onnx"
        if not kept.exists():
            export(module, inputs, path, **settings)
            shutil.copy(path, folder / f"{os.getpid()}.onnx")
            (folder / f"{os.getpid()}.onnx").replace(kept)
        shutil.copy(kept, path)

    def run_once(
        graph: Path, batches: Mapping[str, np.ndarray], extra: Any, optimization: str
    ) -> dict[str, np.ndarray]:
        digest = hashlib.sha256(graph.read_bytes() + optimization.encode())
        for name, array in (*batches.items(), *extra.items()):
            digest.update(name.encode() + array.tobytes())
        kept = folder / f"{digest.hexdigest()}.npz"
        if not kept.exists():
            outputs = run_graph(graph, batches, extra, optimization)
            np.savez(folder / f"{os.getpid()}.npz", **outputs)  # type: ignore[arg-type]
            (folder / f"{os.getpid()}.npz").replace(kept)
        with np.load(kept) as outputs:
            return {name: outputs[name] for name in outputs.files}

    patch.setattr(torch.onnx, "export", cached)
    patch.setattr(reference, "run_graph", run_once)


@cache
def torch_operators(opset_version: int) -> ONNXRegistry:
    """What the exporter translates PyTorch's operators with, which it parses for every export otherwise."""
    return _from_torchlib(opset_version)


def run_graphs_here(patch: pytest.MonkeyPatch) -> None:
    """Let comkd_cli.bundles.runner run graphs in this process; tests/bundles/test_parity.py tests it with its own."""

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[:3] == [sys.executable, "-m", "comkd_cli.bundles.runner"]
        try:
            runner.main(*command[3:])
        except Exception as error:
            return subprocess.CompletedProcess(command, 1, "", f"{type(error).__name__}: {error}")
        return subprocess.CompletedProcess(command, 0, "", "")

    patch.setattr(runner, "subprocess", SimpleNamespace(run=run))
