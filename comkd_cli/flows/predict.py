"""What images show, by a bundle. Needs no torch."""

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
    """A plain record for each image: its likeliest classes, or the reason that it can't be read.

    precision: None takes the first that the bundle has. add_classes: names to look for beside the bundle's
    own. Raises BundleError, naming the file of the bundle.
    """
    try:
        classifier = Classifier(bundle, precision=precision)
        if add_classes:
            classifier.add_classes(add_classes)
        return predict_all(classifier, images, top)
    except BundleProblem as error:
        raise BundleError(str(error)) from error
