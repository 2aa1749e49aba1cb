"""The few-shot protocol: linear probe and Tip-Adapter on the features of a few training images of each class."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from comkd_cli.data.source import ImageSet
from comkd_cli.data.splits import draw_shots
from comkd_cli.data.unreadable import check_unreadable
from comkd_cli.evaluation.features import FeatureStore
from comkd_cli.evaluation.linear_probe import linear_probe
from comkd_cli.evaluation.metrics import mean_per_class_percent, top1_percent
from comkd_cli.evaluation.protocols import Evaluation, zero_shot
from comkd_cli.evaluation.subjects import Subject
from comkd_cli.evaluation.tip_adapter import tip_adapter
from comkd_cli.events import Notice, Stage
from comkd_cli.method.linear_probe import Labelled
from comkd_cli.results.records import Record

STANDARD_SHOTS = (1, 2, 4, 8, 16)
STANDARD_SEEDS = (1, 2, 3)


@dataclass(frozen=True)
class Draws:
    """The draws of training images to score: each number of images per class with each seed."""

    shots: tuple[int, ...] = STANDARD_SHOTS
    seeds: tuple[int, ...] = STANDARD_SEEDS


def few_shot(
    evaluation: Evaluation, store: FeatureStore, draws: Draws, unreadable_limit_percent: float
) -> list[Record]:
    """Linear probe, Tip-Adapter and Tip-Adapter-F for each draw.

    The training images of every standard draw are encoded at once, so that a later evaluation with other shots or
    seeds among them reads no image. Raises DataError where more of them than the limit are unreadable.
    """
    subject, source = evaluation.subject, evaluation.source
    pool = _Pool(evaluation, store, draws, unreadable_limit_percent)
    whole, labels = zero_shot(evaluation).record, evaluation.labels
    test_features = subject.features(evaluation.test.values, range(len(source.class_names)))
    records = []
    for seed in draws.seeds:
        for count in draws.shots:
            train, val = pool.draw(count, seed)
            if len(set(train.labels.tolist())) < 2:
                store.report(Notice(f"{source.name}: too few readable images for {count} shots with seed {seed}"))
                continue
            store.report(Stage(f"{source.name}: {count} shots, seed {seed}"))
            for method, predicted in _answers(subject, train, val, test_features, seed):
                records.append(
                    replace(
                        whole,
                        protocol="few-shot",
                        method=method,
                        shots=count,
                        seed=seed,
                        top1_percent=top1_percent(predicted, labels),
                        mean_per_class_percent=mean_per_class_percent(predicted, labels),
                    )
                )
    return records


def _answers(
    subject: Subject, train: Labelled, val: Labelled, test: torch.Tensor, seed: int
) -> Iterator[tuple[str, np.ndarray]]:
    """The predicted class of each test feature by each method, test being (images, dim)."""
    yield (
        "linear-probe",
        linear_probe(
            train.features.numpy(),
            train.labels.numpy(),
            val.features.numpy(),
            val.labels.numpy(),
            test.numpy(),
        ),
    )
    for method, fine_tune_seed in (("tip-adapter", None), ("tip-adapter-f", seed)):
        yield method, tip_adapter(train, val, test, subject.class_vectors, subject.logit_scale, fine_tune_seed)


class _Split:
    """The features of the training or validation images of some draws."""

    def __init__(self, name: str, images: ImageSet | None) -> None:
        self.labels = list(images.labels or ()) if images is not None else []
        self._name, self._images = name, images
        self._features: dict[int, torch.Tensor] = {}

    def encode(
        self, indices: list[int], evaluation: Evaluation, store: FeatureStore, unreadable_limit_percent: float
    ) -> None:
        """Compute the features of the images at these indices. Raises DataError beyond the limit."""
        if self._images is None:
            return
        subject = evaluation.subject
        found = store.features(subject.encoder, self._images.subset(indices), f"encoding {self._name} images")
        what = f"{self._name} images of the few-shot draws"
        check_unreadable(found.unreadable, len(indices), unreadable_limit_percent, what)
        if found.unreadable:
            store.report(
                Notice(
                    f"{len(found.unreadable)} of {len(indices)} {what} could not be read and were skipped; the first: "
                    f"{found.unreadable[0]}"
                )
            )
        if len(found.indices):
            features = subject.features(found.values, range(len(evaluation.source.class_names)))
            self._features = {indices[index]: features[row] for row, index in enumerate(found.indices)}

    def labelled(self, indices: list[int], dim: int) -> Labelled:
        """The features and labels of the images at these indices, without unreadable ones."""
        kept = [index for index in indices if index in self._features]
        stacked = torch.stack([self._features[index] for index in kept]) if kept else torch.empty(0, dim)
        return Labelled(stacked, torch.tensor([self.labels[index] for index in kept], dtype=torch.int64))


class _Pool:
    """The features of the training and validation images of all draws, the standard ones included."""

    def __init__(
        self, evaluation: Evaluation, store: FeatureStore, draws: Draws, unreadable_limit_percent: float
    ) -> None:
        self._dim = evaluation.subject.class_vectors.shape[1]
        self._train = _Split("train", evaluation.source.train.labelled)
        self._val = _Split("val", evaluation.source.val)
        drawn = [
            self._drawn(count, seed)
            for count in sorted({*draws.shots, *STANDARD_SHOTS})
            for seed in sorted({*draws.seeds, *STANDARD_SEEDS})
        ]
        for position, split in enumerate((self._train, self._val)):
            indices = sorted({index for pair in drawn for index in pair[position]})
            split.encode(indices, evaluation, store, unreadable_limit_percent)

    def draw(self, shots: int, seed: int) -> tuple[Labelled, Labelled]:
        """The training and validation images of a draw, without unreadable ones."""
        train, val = self._drawn(shots, seed)
        return self._train.labelled(train, self._dim), self._val.labelled(val, self._dim)

    def _drawn(self, shots: int, seed: int) -> tuple[list[int], list[int]]:
        return draw_shots(self._train.labels, self._val.labels, shots, seed)
