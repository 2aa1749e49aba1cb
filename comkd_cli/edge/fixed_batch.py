"""Runs graphs whose batch may have a fixed length on batches of any length."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def run_in_batches(session: Any, batch: np.ndarray, others: Mapping[str, np.ndarray]) -> np.ndarray:
    """The output of an onnxruntime session for a batch of any length of its first input.

    A graph with a fixed length is run on parts of that length; the last part is filled with copies of earlier entries.
    others: further inputs, the same for every part. Raises onnxruntime's types of errors.
    """
    first = session.get_inputs()[0]
    length = first.shape[0]
    if not isinstance(length, int):
        return np.asarray(session.run(None, {first.name: batch, **others})[0])
    parts = -(-len(batch) // length)
    filled = np.resize(batch, (parts * length, *batch.shape[1:]))
    outputs = [
        session.run(None, {first.name: filled[i * length : (i + 1) * length], **others})[0] for i in range(parts)
    ]
    return np.concatenate(outputs)[: len(batch)]
