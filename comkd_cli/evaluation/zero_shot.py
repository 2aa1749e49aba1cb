"""A model's top-1 on the test images while it trains."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from comkd_cli.data.source import Source
from comkd_cli.evaluation.features import Encoder, FeatureStore
from comkd_cli.evaluation.metrics import top1_percent
from comkd_cli.predictor import Preprocessing
from comkd_cli.progress import Report


def score_on_test(
    model: nn.Module,
    logits_of: Callable[[Tensor], Tensor],
    source: Source,
    preprocessing: Preprocessing,
    device: torch.device,
    workers: int,
    report: Report,
    classes: range | None = None,
) -> dict[str, float]:
    """{"test_top1_percent": ...}, or nothing where no test image has a label or can be read.

    logits_of: from prepared images (batch, 3, size, size) to logits (batch, classes). classes: score their
    images alone, answered among them alone; None takes all. Leaves the model in inference mode.
    """
    images = source.test
    if images is None or images.labels is None:
        return {}
    if classes is not None:
        images = images.subset([position for position, label in enumerate(images.labels) if label in classes])
    model.eval()
    # Nothing is kept: the weights are others at the next call.
    store = FeatureStore(None, device, workers, report)
    found = store.features(Encoder("", preprocessing, logits_of), images, "scoring")
    if not len(found.indices):
        return {}
    labels = np.asarray(images.labels)[found.indices]
    candidates = np.asarray(classes if classes is not None else range(found.values.shape[1]))
    predicted = candidates[found.values[:, candidates].argmax(axis=1)]
    return {"test_top1_percent": top1_percent(predicted, labels)}
