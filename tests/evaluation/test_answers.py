from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cityblock
from scipy.special import softmax

from comkd_cli.data.digits import digits_source
from comkd_cli.edge.images import Preprocessing
from comkd_cli.evaluation import answers as room
from comkd_cli.evaluation.answers import Observation, answers, distances
from comkd_cli.evaluation.features import Encoder, Features
from comkd_cli.evaluation.protocols import Evaluation
from comkd_cli.evaluation.subjects import Subject

SOURCE = digits_source()
CLASSES = len(SOURCE.class_names)
DIM = 6


def observation(images: list[int], seed: int, scale: float = 5.0) -> Observation:
    """A model with random features of these images, whose class vectors are random too."""
    random = torch.Generator().manual_seed(seed)
    unit = torch.nn.functional.normalize
    subject = Subject(
        model="it",
        role="student",
        seed=1,
        parameters=1,
        module=torch.nn.Identity(),
        encoder=Encoder("", Preprocessing(8, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)), torch.nn.Identity()),
        class_vectors=unit(torch.randn(CLASSES, DIM, generator=random), dim=1),
        logit_scale=scale,
        attend=lambda kept, _vectors: unit(kept, dim=1),
    )
    values = torch.randn(len(images), DIM, generator=random).numpy()
    assert SOURCE.test is not None
    features = Features(values, np.array(images, np.int64), ())
    return Observation(Evaluation(subject, SOURCE, SOURCE.test, features), subject.predict(values, range(CLASSES)))


def by_scipy(seen: Observation) -> np.ndarray:
    subject = seen.evaluation.subject
    values = seen.evaluation.test.values.astype(np.float64)
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    logits = subject.logit_scale * values @ subject.class_vectors.double().numpy().T
    found: np.ndarray = softmax(logits, axis=1)
    return found


@pytest.mark.parametrize("at_once", [1, 25, 1 << 22])
def test_answers_have_the_largest_softmax_probability_however_many_are_computed_at_once(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "PROBABILITIES_AT_ONCE", at_once)
    seen = observation([0, 2, 3, 7, 8], seed=1)
    found, expected = answers(seen), by_scipy(seen)
    assert found.indices.tolist() == [0, 2, 3, 7, 8]
    assert found.predicted.tolist() == expected.argmax(axis=1).tolist()
    assert found.confidence == pytest.approx(expected.max(axis=1), abs=1e-6)


def test_distances_are_of_the_images_that_both_models_have_answered() -> None:
    first, second = observation([0, 2, 3, 7], seed=1), observation([1, 2, 7, 9], seed=2)
    found = distances(first, second)
    left, right = by_scipy(first)[[1, 3]], by_scipy(second)[[1, 2]]
    assert found.indices.tolist() == [2, 7]
    assert found.values == pytest.approx([cityblock(p, q) / 2 for p, q in zip(left, right, strict=True)], abs=1e-6)


def test_a_model_is_no_distance_from_itself_and_nothing_in_common_has_none() -> None:
    seen = observation([0, 1, 2], seed=3)
    assert distances(seen, seen).values == pytest.approx(0)
    test = replace(seen.evaluation.test, indices=np.array([7, 8, 9]))
    apart = distances(seen, replace(seen, evaluation=replace(seen.evaluation, test=test)))
    assert len(apart.indices) == len(apart.values) == 0
