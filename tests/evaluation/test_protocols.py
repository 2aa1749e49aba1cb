import numpy as np
import pytest
import torch
from PIL import Image

from comkd_cli.data.source import ImageSet, Source
from comkd_cli.edge.images import Preprocessing
from comkd_cli.evaluation.features import Encoder, Features
from comkd_cli.evaluation.protocols import Evaluation, base_to_novel, zero_shot
from comkd_cli.evaluation.subjects import Subject

LABELS = (0, 1, 2, 3, 3, 2)
# A row per image, a column per class: its similarity to the class.
SIMILARITIES = np.array(
    [
        [0.9, 0.1, 0.0, 0.0],  # 0, right
        [0.0, 0.5, 0.8, 0.0],  # 1, taken for 2 of all classes, and right within the base half
        [0.0, 0.0, 0.1, 0.9],  # 2, taken for 3 in either case
        [0.7, 0.0, 0.0, 0.6],  # 3, taken for 0 of all classes, and right within the new half
        [0.0, 0.0, 0.2, 0.9],  # 3, right
        [0.0, 0.0, 0.0, 0.0],  # could not be read
    ],
    np.float32,
)


def evaluation(readable: list[int], labels: tuple[int, ...] | None = LABELS) -> Evaluation:
    """A subject with the unit vectors as class vectors, whose features are the similarities."""
    subject = Subject(
        model="it",
        role="student",
        seed=7,
        parameters=1,
        module=torch.nn.Identity(),
        encoder=Encoder("sha", Preprocessing(4, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)), lambda images: images),
        class_vectors=torch.eye(4),
        logit_scale=1.0,
        attend=lambda encoded, _vectors: encoded,
    )
    images = ImageSet(tuple("abcdef"), labels, lambda key: Image.new("RGB", (4, 4), (ord(key), 0, 0)))
    source = Source("four", ("a", "b", "c", "d"), "{}", images, images)
    missing = tuple(key for index, key in enumerate("abcdef") if index not in readable)
    return Evaluation(subject, source, images, Features(SIMILARITIES[readable], np.array(readable), missing))


def test_zero_shot_predicts_among_all_classes_and_skips_unreadable_images() -> None:
    scored = zero_shot(evaluation([0, 1, 2, 3, 4]))
    assert scored.predicted.tolist() == [0, 2, 3, 0, 3]
    record = scored.record
    assert record.top1_percent == pytest.approx(100 * 2 / 5)
    assert record.mean_per_class_percent == pytest.approx(100 * np.mean([1, 0, 0, 1 / 2]))
    assert (record.images, record.unreadable, record.model_sha256, record.seed) == (5, 1, "sha", 7)


def test_without_labels_there_are_predictions_and_no_score() -> None:
    scored = zero_shot(evaluation([0, 1], labels=None))
    assert scored.predicted.tolist() == [0, 2]
    assert scored.record.top1_percent is None
    assert scored.record.mean_per_class_percent is None


def test_each_half_predicts_only_its_own_classes_on_its_own_images() -> None:
    base, new = base_to_novel(evaluation([0, 1, 2, 3, 4]))
    assert (base.classes, base.images, base.top1_percent) == ("base", 2, 100.0)
    assert (new.classes, new.images, new.top1_percent) == ("new", 3, pytest.approx(100 * 2 / 3))
    assert new.mean_per_class_percent == pytest.approx(50.0)


def test_a_half_without_images_has_no_record() -> None:
    assert [record.classes for record in base_to_novel(evaluation([0, 1]))] == ["base"]
