"""The few-shot protocol: linear probe and Tip-Adapter on the features of a few training images of each class."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from comkd_cli.data.source import ImageSet
from comkd_cli.data.splits import draw_shots
from comkd_cli.data.unreadable import check_unreadable
from comkd_cli.evaluation.features import FeatureStore
from comkd_cli.evaluation.linear_probe import MOST_FITS, Advance, linear_probe
from comkd_cli.evaluation.metrics import mean_per_class_percent, top1_percent
from comkd_cli.evaluation.protocols import Evaluation, zero_shot
from comkd_cli.evaluation.tip_adapter import FINE_TUNING_EPOCHS, tip_adapter
from comkd_cli.events import Notice, Progress, Report, Stage
from comkd_cli.method.linear_probe import Classifier, Labelled
from comkd_cli.results.records import Record

STANDARD_SHOTS = (1, 2, 4, 8, 16)
STANDARD_SEEDS = (1, 2, 3)
PROGRESS_STEPS = 1000  # of all draws: their costs are compared, and no unit is counted
# Rough costs, which only the progress depends on.
EVALUATIONS_OF_A_FIT, DOUBLE, POWERS_OF_A_SEARCH = 20, 2, 1000


@dataclass(frozen=True)
class Draws:
    """The draws of training images to score: each number of images per class with each seed."""

    shots: tuple[int, ...] = STANDARD_SHOTS
    seeds: tuple[int, ...] = STANDARD_SEEDS


def few_shot(
    evaluation: Evaluation, store: FeatureStore, draws: Draws, unreadable_limit_percent: float
) -> list[Record]:
    """Linear probe, Tip-Adapter and Tip-Adapter-F for each draw, on the store's device.

    The training images of every standard draw are encoded at once, so that a later evaluation with other shots or
    seeds among them reads no image. Raises DataError if more of them than the limit are unreadable.
    """
    subject, source = evaluation.subject, evaluation.source
    pool = _Pool(evaluation, store, draws, unreadable_limit_percent)
    whole, labels = zero_shot(evaluation).record, evaluation.labels
    classifier = Classifier(subject.class_vectors, torch.tensor(subject.logit_scale))
    methods = _Methods(classifier, subject.features(evaluation.test.values, range(len(source.class_names))), store)
    drawn = []
    for seed in draws.seeds:
        for count in draws.shots:
            train, val = pool.draw(count, seed)
            if len(set(train.labels.tolist())) < 2:
                store.report(Notice(f"{source.name}: too few readable images for {count} shots with seed {seed}"))
                continue
            drawn.append(_Draw(count, seed, train, val))
    store.report(Stage(f"{source.name}: few-shot methods, {len(drawn)} draws"))
    work = _Work(f"few-shot on {source.name}", [methods.costs(draw) for draw in drawn], store.report)
    return [
        replace(
            whole,
            protocol="few-shot",
            method=method,
            shots=draw.shots,
            seed=draw.seed,
            top1_percent=top1_percent(predicted, labels),
            mean_per_class_percent=mean_per_class_percent(predicted, labels),
        )
        for draw in drawn
        for method, predicted in methods.answers(draw, work)
    ]


@dataclass(frozen=True)
class _Draw:
    """The few-shot images of a seed."""

    shots: int
    seed: int
    train: Labelled
    val: Labelled


class _Work:
    """Reports how much of some draws' work is done, by the costs of their methods: draws of more shots take longer."""

    def __init__(self, label: str, costs: Sequence[Sequence[float]], report: Report) -> None:
        """costs: of each method of each draw, in any unit."""
        self._label, self._report = label, report
        self._left = [cost for of_draw in costs for cost in of_draw]
        self._total, self._done = sum(self._left), 0.0

    def next(self) -> Advance:
        """What the next method calls with the share of its work that is done; with 1 at its end."""
        cost, before = self._left.pop(0), self._done

        def advance(share: float) -> None:
            self._done = before + cost * share
            done = round(PROGRESS_STEPS * self._done / self._total)
            self._report(Progress(self._label, done, PROGRESS_STEPS, unit=""))

        return advance


class _Methods:
    """The few-shot methods, by class vectors and test features that all draws share."""

    def __init__(self, classifier: Classifier, test: torch.Tensor, store: FeatureStore) -> None:
        """test: (images, dim)."""
        self._device = store.device
        self._classifier = Classifier(classifier.vectors.to(self._device), classifier.scale.to(self._device))
        self._test = test.to(self._device)

    def answers(self, draw: _Draw, work: _Work) -> Iterator[tuple[str, np.ndarray]]:
        """Each method, with its predicted class of each test image."""
        train, val = (
            Labelled(part.features.to(self._device), part.labels.to(self._device)) for part in (draw.train, draw.val)
        )
        advance = work.next()
        predicted = linear_probe(train, val, self._test, advance)
        advance(1.0)
        yield "linear-probe", predicted
        for method, fine_tune_seed in (("tip-adapter", None), ("tip-adapter-f", draw.seed)):
            yield method, tip_adapter(train, val, self._test, self._classifier, fine_tune_seed, work.next())

    def costs(self, draw: _Draw) -> tuple[float, float, float]:
        """What each method takes, roughly, in multiply-adds of single precision."""
        images, (classes, dim), val = len(draw.train.labels), self._classifier.vectors.shape, len(draw.val.labels)
        fits = MOST_FITS if val else 1
        probe = fits * EVALUATIONS_OF_A_FIT * 2 * images * classes * dim * DOUBLE
        tip = len(self._test) * images * dim + val * images * POWERS_OF_A_SEARCH
        return probe, tip, tip + FINE_TUNING_EPOCHS * 2 * images * images * dim


class _Split:
    """The features of the training or validation images of some draws."""

    def __init__(self, name: str, images: ImageSet | None) -> None:
        self.labels = list(images.labels or ()) if images is not None else []
        self._name, self._images = name, images
        self._features = torch.empty(0)
        self._rows: dict[int, int] = {}

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
            self._features = subject.features(found.values, range(len(evaluation.source.class_names)))
            self._rows = {indices[index]: row for row, index in enumerate(found.indices)}

    def labelled(self, indices: list[int], dim: int) -> Labelled:
        """The features and labels of the images at these indices, without unreadable ones."""
        kept = [index for index in indices if index in self._rows]
        features = self._features[[self._rows[index] for index in kept]] if kept else torch.empty(0, dim)
        return Labelled(features, torch.tensor([self.labels[index] for index in kept], dtype=torch.int64))


class _Pool:
    """The features of the training and validation images of all draws, the standard ones included."""

    def __init__(
        self, evaluation: Evaluation, store: FeatureStore, draws: Draws, unreadable_limit_percent: float
    ) -> None:
        self._dim = evaluation.subject.class_vectors.shape[1]
        self._train = _Split("train", evaluation.source.train.labelled)
        self._val = _Split("val", evaluation.source.val)
        self._drawn = {
            (count, seed): draw_shots(self._train.labels, self._val.labels, count, seed)
            for count in sorted({*draws.shots, *STANDARD_SHOTS})
            for seed in sorted({*draws.seeds, *STANDARD_SEEDS})
        }
        for position, split in enumerate((self._train, self._val)):
            indices = sorted({index for pair in self._drawn.values() for index in pair[position]})
            split.encode(indices, evaluation, store, unreadable_limit_percent)

    def draw(self, shots: int, seed: int) -> tuple[Labelled, Labelled]:
        """The training and validation images of a draw, without unreadable ones."""
        train, val = self._drawn[shots, seed]
        return self._train.labelled(train, self._dim), self._val.labelled(val, self._dim)
