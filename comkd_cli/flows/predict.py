"""What images show, by a bundle. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from comkd_cli.errors import BundleError
from comkd_cli.predictor import BundleProblem, Classifier, predict_all


def predict(bundle: Path, images: Sequence[str], top: int) -> list[dict[str, Any]]:
    """A plain record for each image: its likeliest classes, or the reason that it can't be read.

    Raises BundleError, naming the file of the bundle.
    """
    try:
        return predict_all(Classifier(bundle), images, top)
    except BundleProblem as error:
        raise BundleError(str(error)) from error
