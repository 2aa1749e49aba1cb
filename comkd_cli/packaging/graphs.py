"""ONNX graphs of a student."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from comkd_cli.errors import ExportError
from comkd_cli.method.student import Student
from comkd_cli.predictor import Preprocessing

# With an example of one image the exporter would take the batch axis for a constant.
EXAMPLE_BATCH = 2


class ImageEncoder(nn.Module):
    """From prepared images to L2-normalised image features."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student = student

    def forward(self, image: Tensor) -> Tensor:
        """image: (batch, 3, size, size). Returns (batch, dim)."""
        features: Tensor = self.student(image).features
        return features


class ImageClassifier(nn.Module):
    """From prepared images to logits over the student's classes."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student = student

    def forward(self, image: Tensor) -> Tensor:
        """image: (batch, 3, size, size). Returns (batch, classes)."""
        logits: Tensor = self.student(image).logits
        return logits


def export_graph(module: nn.Module, preprocessing: Preprocessing, output: str, path: Path) -> None:
    """Write a module as one ONNX file: `image` (batch, 3, size, size) float32 to `output`, any batch size.

    Raises ExportError where torch's exporter can't follow the module.
    """
    example = torch.zeros(EXAMPLE_BATCH, 3, preprocessing.size, preprocessing.size)
    try:
        with _quiet():
            torch.onnx.export(
                module.eval(),
                (example,),
                path,
                input_names=["image"],
                output_names=[output],
                dynamic_shapes={"image": {0: "batch"}},
                dynamo=True,
                external_data=False,
                verbose=False,
            )
    except Exception as error:  # the exporter raises many kinds, none of them ours to list
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ExportError(f"torch can't export this student to ONNX: {first}") from error


@contextlib.contextmanager
def _quiet():  # type: ignore[no-untyped-def]
    """Without the exporter's own progress, which it prints and logs."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
