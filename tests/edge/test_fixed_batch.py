from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from comkd_cli.edge.fixed_batch import run_in_batches


class Session:
    """Doubles its first input and adds the other, as an onnxruntime session would, for batches of one length."""

    def __init__(self, length: int | str) -> None:
        self.length, self.lengths = length, list[int]()

    def get_inputs(self) -> list[Any]:
        return [SimpleNamespace(name="image", shape=[self.length, 2])]

    def run(self, outputs: None, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        self.lengths.append(len(inputs["image"]))
        assert self.length in ("batch", len(inputs["image"]))
        return [2 * inputs["image"] + inputs["other"]]


@pytest.mark.parametrize(
    ("length", "images", "lengths"),
    [("batch", 7, [7]), (1, 3, [1, 1, 1]), (4, 3, [4]), (4, 4, [4]), (4, 9, [4, 4, 4])],
)
def test_any_number_of_images_runs_in_batches_of_the_graphs_length(
    length: int | str, images: int, lengths: list[int]
) -> None:
    session, batch = Session(length), np.arange(2 * images, dtype=np.float32).reshape(images, 2)
    found = run_in_batches(session, batch, {"other": np.float32([1, 3])})
    assert np.array_equal(found, 2 * batch + [1, 3])
    assert session.lengths == lengths
