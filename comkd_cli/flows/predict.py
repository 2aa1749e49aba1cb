"""Classify images with a bundle. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from comkd_cli.edge.classifier import Classifier, predict_all
from comkd_cli.edge.manifest import BundleProblem
from comkd_cli.errors import BundleError


def predict(
    bundle: Path, images: Sequence[str], top: int, precision: str | None = None, add_classes: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """A plain record for each image: its `top` most probable classes, or the error if it could not be read.

    precision: None takes the first of the bundle. add_classes: names of classes beside the bundle's own. Raises
    BundleError.
    """
    try:
        classifier = Classifier(bundle, precision=precision)
        if add_classes:
            classifier.add_classes(add_classes)
        return predict_all(classifier, images, top)
    except BundleProblem as error:
        raise BundleError(
            error.problem,
            path=error.path,
            field=error.field,
            found=error.found,
            allowed=error.allowed,
            remedy=error.remedy,
        ) from error
