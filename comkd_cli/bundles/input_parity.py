"""The gate of graphs that prepare their images, on real images of many sizes.

The reference is edge/images.py and the same precision's graph of prepared images, so that the figures are of the
preparation alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from comkd_cli.bundles.gates import INPUTS, Gate, input_gate
from comkd_cli.bundles.inputs import PIXELS, add_input, input_file, shape_of, write_front
from comkd_cli.bundles.parity import NO_CLASS, Parity, check_logits
from comkd_cli.bundles.parts import Part
from comkd_cli.bundles.precisions import OPTIMIZATION
from comkd_cli.bundles.runner import run_graph
from comkd_cli.bundles.shapes import fixed_batch
from comkd_cli.edge.images import Preprocessing, normalise, resize_and_crop
from comkd_cli.errors import ExportError
from comkd_cli.evaluation.metrics import agreement_percent
from comkd_cli.evaluation.text_encoders import cosine_rows
from comkd_cli.events import Notice, Report, Stage

MOST_IMAGES = 32
"""Of the gate's images; each is cut and resized to every one of `sizes`."""
MOST_WHOLE, MOST_PIXELS = 8, 2**22
"""MOST_WHOLE of them are also used as they are, or reduced to MOST_PIXELS pixels."""
BATCH = 8


@dataclass(frozen=True)
class Levels:
    """How far the levels, 0 to 255, that a graph prepares are from those of edge/images.py."""

    different_percent: float
    difference_max: int


@dataclass(frozen=True)
class InputGraph:
    """A pair of graphs that prepare their images, and how far they are from those that do not."""

    image_encoder: str
    classifier: str
    shape: Sequence[int | str]
    """Of the input."""
    parity: Parity
    levels: Levels

    def figures(self) -> str:
        """The figures in one line."""
        return (
            f"{self.parity.figures()}, on {self.parity.images} images of many sizes; "
            f"{self.levels.different_percent:.3f} % of the levels differ, by at most {self.levels.difference_max}"
        )

    def document(self) -> dict[str, Any]:
        """Names and figures as plain data, for the manifest."""
        return {
            "image_encoder": self.image_encoder,
            "classifier": self.classifier,
            "input": {"name": PIXELS, "type": "uint8", "shape": list(self.shape), "colours": "RGB"},
            "parity": self.parity.document(),
            "levels": asdict(self.levels),
        }


def sizes(size: int) -> list[tuple[int, int]]:
    """Widths and heights for a model's input of `size` pixels: larger and smaller, upright, wide, square and equal."""
    return [
        (2 * size + 3, 3 * size + 1),
        (3 * size - 1, 2 * size + 5),
        (size + 1, 2 * size + 7),
        (4 * size + 1, size),
        (size // 2 + 1, size // 3 + 2),
        (size // 3 + 3, size - 1),
        (size, size),
    ]


def cut_to(image: Image.Image, width: int, height: int) -> Image.Image:
    """The centre of an image with the proportions of a size, resized to it."""
    scale = min(image.width / width, image.height / height)
    left, top = (max(0.0, image.width - scale * width) / 2, max(0.0, image.height - scale * height) / 2)
    box = (left, top, image.width - left, image.height - top)
    return image.resize((width, height), Image.Resampling.BICUBIC, box=box)


class InputGraphs:
    """The graphs of a bundle that prepare their images themselves.

    part: the gate's images, some of which are opened again. head: float32 (dim, classes); logits are features @ head.
    extra: the graphs' other inputs.
    """

    def __init__(
        self,
        part: Part,
        preprocessing: Preprocessing,
        head: np.ndarray,
        extra: Mapping[str, np.ndarray],
    ) -> None:
        self._part, self._preprocessing, self._head, self._extra = part, preprocessing, head, extra
        self.graphs: dict[str, dict[str, InputGraph]] = {}
        """By precision and kind of input."""
        self._references: dict[Path, np.ndarray] = {}
        self._levels: dict[str, Levels] = {}

    def add(self, kinds: Sequence[str], precision: str, graphs: tuple[Path, Path], report: Report) -> dict[str, str]:
        """Write the encoder and the classifier of a precision with other inputs, in files beside theirs.

        graphs: those with prepared images, which have passed their own gate. A kind that misses its gate is left out.
        Returns the reasons, by the name of what is missing.
        """
        failed: dict[str, str] = {}
        for kind in (kind for kind in INPUTS if kind in kinds):
            name = f"{precision} with --input {kind}"
            report(Stage(f"Checking {name} in onnxruntime"))
            try:
                graph = self._add(kind, graphs, OPTIMIZATION[precision], input_gate(kind, precision))
                self.graphs.setdefault(precision, {})[kind] = graph
                report(Notice(f"{name} passes its gate: {graph.figures()}"))
            except ExportError as error:
                failed[name] = str(error)
                report(Notice(f"{name} is left out: {error}"))
        return failed

    def remove(self, precision: str, graphs: tuple[Path, Path]) -> None:
        """Remove the graphs of a precision that is left out. graphs: as for `add`."""
        for kind in self.graphs.pop(precision, {}):
            for graph in graphs:
                input_file(graph, kind).unlink()

    def _add(self, kind: str, graphs: tuple[Path, Path], optimization: str, gate: Gate) -> InputGraph:
        """Raises ExportError, and leaves no file, if the graphs miss their gate or cannot be run."""
        targets = [input_file(graph, kind) for graph in graphs]
        try:
            for graph, target in zip(graphs, targets, strict=True):
                add_input(kind, graph, target, self._preprocessing)
            parity = self._parity(kind, graphs, targets, optimization)
            if missed := parity.failures(gate):
                raise ExportError(f"{', '.join(missed)} on {parity.images} images of many sizes")
            shape = shape_of(kind, self._preprocessing, fixed_batch(graphs[0]) or "batch")
            levels = self._levels_of_front(kind, graphs[0])
            return InputGraph(targets[0].name, targets[1].name, shape, parity, levels)
        except ExportError:
            for target in targets:
                target.unlink(missing_ok=True)
            raise

    @cached_property
    def _samples(self) -> _Samples:
        images = self._part.pictures
        if images is None or not len(images):
            raise ExportError("there are no images to compare it on", remedy="provide some with --images")
        return _Samples([images.open(i) for i in range(min(MOST_IMAGES, len(images)))], self._preprocessing)

    def _parity(self, kind: str, graphs: Sequence[Path], targets: Sequence[Path], optimization: str) -> Parity:
        for graph in graphs:
            if graph not in self._references:
                self._references[graph] = self._run(graph, self._samples.prepared, optimization)
        expected = [self._references[graph] for graph in graphs]
        found = [self._run(graph, self._samples.pixels[kind], optimization) for graph in targets]
        check_logits(targets[1], found[1], found[0], self._head)
        cosines = cosine_rows(found[0], expected[0])
        predicted = np.where(np.isfinite(found[1]).all(axis=1), found[1].argmax(axis=1), NO_CLASS)
        difference = float(np.abs(found[0] - expected[0]).max())
        return Parity(
            images=len(cosines),
            batch_sizes=(1, BATCH),
            feature_difference_max=difference if np.isfinite(difference) else math.inf,
            feature_cosine_min=float(cosines.min()),
            feature_cosine_mean=float(cosines.mean()),
            top1_agreement_percent=agreement_percent(predicted, expected[1].argmax(axis=1)),
            student_top1_percent=None,
            top1_percent=None,
            different=self._samples.images,
        )

    def _levels_of_front(self, kind: str, encoder: Path) -> Levels:
        """What the nodes before the graph compute, compared with edge/images.py; the same in every precision."""
        if kind in self._levels:
            return self._levels[kind]
        front = encoder.with_name(f".{kind}.onnx")
        write_front(kind, encoder, front, self._preprocessing)
        try:
            found = self._levels_of(run_graph(front, self._samples.pixels[kind]))
        finally:
            front.unlink(missing_ok=True)
        gaps = np.abs(found - self._levels_of(self._samples.prepared))
        self._levels[kind] = Levels(float(100 * np.mean(gaps > 0)), int(gaps.max()))
        return self._levels[kind]

    def _levels_of(self, prepared: Mapping[str, np.ndarray]) -> np.ndarray:
        mean, std = (
            np.array(each, np.float32).reshape(1, 3, 1, 1)
            for each in (self._preprocessing.mean, self._preprocessing.std)
        )
        normalised = np.concatenate([prepared[name] for name in self._samples.prepared])
        return np.asarray(np.rint((normalised * std + mean) * 255), dtype=np.int16)

    def _run(self, graph: Path, batches: Mapping[str, np.ndarray], optimization: str) -> np.ndarray:
        outputs = run_graph(graph, batches, self._extra, optimization)
        return np.concatenate([outputs[name] for name in batches])


class _Samples:
    """Images of many sizes, in batches of one size: their pixels for each kind of input, and prepared."""

    def __init__(self, images: Sequence[Image.Image], preprocessing: Preprocessing) -> None:
        self.images = len(images)
        self.pixels: dict[str, dict[str, np.ndarray]] = {kind: {} for kind in INPUTS}
        self.prepared: dict[str, np.ndarray] = {}
        for index, batch in enumerate(_batches(images, preprocessing.size)):
            squares, name = [resize_and_crop(image, preprocessing) for image in batch], str(index)
            self.pixels["image"][name] = np.stack([np.asarray(image) for image in batch])
            self.pixels["pixels"][name] = np.stack([np.asarray(square) for square in squares])
            self.prepared[name] = np.stack([normalise(square, preprocessing) for square in squares])


def _batches(images: Sequence[Image.Image], size: int) -> Iterator[list[Image.Image]]:
    """Images of one size each: some as they are, and all of them in each of `sizes`."""
    for image in images[:MOST_WHOLE]:
        shrink = math.sqrt(min(1.0, MOST_PIXELS / (image.width * image.height)))
        yield [image.resize((max(1, int(shrink * image.width)), max(1, int(shrink * image.height))))]
    for width, height in sizes(size):
        cut = [cut_to(image, width, height) for image in images]
        yield from (cut[i : i + BATCH] for i in range(0, len(cut), BATCH))
