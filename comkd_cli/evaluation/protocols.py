"""The published protocols, each derived from features that are already there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from comkd_cli.data.source import ImageSet, Source
from comkd_cli.data.splits import draw_shots, halves
from comkd_cli.data.unreadable import check_unreadable
from comkd_cli.evaluation.features import Features, FeatureStore
from comkd_cli.evaluation.linear_probe import linear_probe
from comkd_cli.evaluation.metrics import mean_per_class_percent, top1_percent
from comkd_cli.evaluation.subjects import Subject
from comkd_cli.evaluation.tip_adapter import Labelled, tip_adapter
from comkd_cli.events import Notice, Stage
from comkd_cli.results.records import Record

STANDARD_SHOTS = (1, 2, 4, 8, 16)
STANDARD_SEEDS = (1, 2, 3)


@dataclass(frozen=True)
class Scored:
    """A subject's answers on the test images, and the record of them."""

    record: Record
    predicted: np.ndarray
    """(images,) labels, of the images that could be read."""


def zero_shot(subject: Subject, source: Source, images: ImageSet, test: Features) -> Scored:
    """All classes, by class vectors alone; without labels, the answers alone."""
    predicted = subject.predict(test.values, range(len(source.class_names)))
    labels = None if images.labels is None else np.asarray(images.labels)[test.indices]
    record = Record(
        model=subject.model,
        role=subject.role,
        dataset=source.name,
        top1_percent=None if labels is None else top1_percent(predicted, labels),
        mean_per_class_percent=None if labels is None else mean_per_class_percent(predicted, labels),
        images=len(predicted),
        image_tower_parameters=subject.parameters,
        seed=subject.seed,
        unreadable=len(test.unreadable),
        selection=subject.selection,
        model_sha256=subject.encoder.identity,
        images_sha256=images.digest,
    )
    return Scored(record, predicted)


def base_to_novel(subject: Subject, source: Source, images: ImageSet, test: Features) -> list[Record]:
    """Each half of the classes on its own images, answered among its own classes only."""
    whole = zero_shot(subject, source, images, test).record
    labels = np.asarray(images.labels)[test.indices]
    records = []
    for half in ("base", "new"):
        classes = halves(len(source.class_names))[half]
        inside = np.isin(labels, classes)
        if not inside.any():
            continue
        predicted = subject.predict(test.values[inside], classes)
        records.append(
            replace(
                whole,
                protocol="base-to-novel",
                classes=half,
                top1_percent=top1_percent(predicted, labels[inside]),
                mean_per_class_percent=mean_per_class_percent(predicted, labels[inside]),
                images=int(inside.sum()),
            )
        )
    return records


def few_shot(
    subject: Subject,
    source: Source,
    images: ImageSet,
    test: Features,
    store: FeatureStore,
    shots: Sequence[int],
    seeds: Sequence[int],
    unreadable_limit_percent: float,
) -> list[Record]:
    """Linear probe, Tip-Adapter and Tip-Adapter-F for each number of shots and seed.

    The training images of every standard draw are encoded at once, so that asking for other shots or
    seeds among them reads no image. Raises DataError where more of them than the limit are unreadable.
    """
    pool = _Pool(subject, source, store, {*shots, *STANDARD_SHOTS}, {*seeds, *STANDARD_SEEDS}, unreadable_limit_percent)
    whole = zero_shot(subject, source, images, test).record
    labels = np.asarray(images.labels)[test.indices]
    classes = range(len(source.class_names))
    test_features = subject.features(test.values, classes)
    records = []
    for seed in seeds:
        for count in shots:
            train, val = pool.draw(count, seed)
            if len(set(train.labels.tolist())) < 2:
                store.report(Notice(f"{source.name}: too few readable images for {count} shots with seed {seed}"))
                continue
            store.report(Stage(f"{source.name}: {count} shots, seed {seed}"))
            answers = {
                "linear-probe": linear_probe(
                    train.features.numpy(),
                    train.labels.numpy(),
                    val.features.numpy(),
                    val.labels.numpy(),
                    test_features.numpy(),
                )
            }
            for method, fine_tune in (("tip-adapter", False), ("tip-adapter-f", True)):
                answers[method] = tip_adapter(
                    train, val, test_features, subject.class_vectors, subject.logit_scale, fine_tune, seed
                )
            for method, predicted in answers.items():
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


class _Pool:
    """The features of all training and validation images that any draw may take."""

    def __init__(
        self,
        subject: Subject,
        source: Source,
        store: FeatureStore,
        shots: set[int],
        seeds: set[int],
        unreadable_limit_percent: float,
    ) -> None:
        self._limit_percent = unreadable_limit_percent
        self._train_labels = list(source.train.labels or ())
        self._val_labels = list(source.val.labels or ()) if source.val else []
        draws = [draw_shots(self._train_labels, self._val_labels, k, s) for k in sorted(shots) for s in sorted(seeds)]
        classes = range(len(source.class_names))
        self._train = self._encoded(subject, source.train, [d[0] for d in draws], store, classes, "train")
        self._val = (
            self._encoded(subject, source.val, [d[1] for d in draws], store, classes, "val") if source.val else {}
        )
        self._dim = subject.class_vectors.shape[1]

    def draw(self, shots: int, seed: int) -> tuple[Labelled, Labelled]:
        """Train and validation images of a draw; those that could not be read are missing."""
        train, val = draw_shots(self._train_labels, self._val_labels, shots, seed)
        return self._labelled(train, self._train, self._train_labels), self._labelled(val, self._val, self._val_labels)

    def _labelled(self, drawn: list[int], features: dict[int, torch.Tensor], labels: list[int]) -> Labelled:
        kept = [position for position in drawn if position in features]
        stacked = torch.stack([features[p] for p in kept]) if kept else torch.empty(0, self._dim)
        return Labelled(stacked, torch.tensor([labels[p] for p in kept], dtype=torch.int64))

    def _encoded(
        self,
        subject: Subject,
        images: ImageSet,
        draws: list[list[int]],
        store: FeatureStore,
        classes: range,
        split: str,
    ) -> dict[int, torch.Tensor]:
        positions = sorted({position for draw in draws for position in draw})
        kept = store.features(subject.encoder, images.subset(positions), f"encoding {split} images")
        what = f"{split} images of the few-shot draws"
        check_unreadable(kept.unreadable, len(positions), self._limit_percent, what)
        if kept.unreadable:
            store.report(
                Notice(
                    f"{len(kept.unreadable)} of {len(positions)} {what} can't be read, "
                    f"left out; the first: {kept.unreadable[0]}"
                )
            )
        if not len(kept.indices):
            return {}
        features = subject.features(kept.values, classes)
        return {positions[index]: features[row] for row, index in enumerate(kept.indices)}
