"""Torch's exporter takes seconds: a module that was exported before is copied."""

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn


def export_once(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let torch.onnx.export keep its files in a folder, and take them from it for the same module, inputs and settings.

    The exporter itself is tested in tests/bundles/test_graphs.py.
    """
    export = torch.onnx.export

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

    patch.setattr(torch.onnx, "export", cached)
