from dataclasses import replace
from functools import partial

import pytest
import torch
from PIL import Image

from comkd_cli.data.digits import digits_source
from comkd_cli.edge.images import Preprocessing, UnreadableImage
from comkd_cli.errors import DataError
from comkd_cli.evaluation.features import Encoder, FeatureStore
from comkd_cli.evaluation.few_shot import Draws, few_shot
from comkd_cli.evaluation.protocols import Evaluation
from comkd_cli.evaluation.subjects import Subject
from comkd_cli.events import Event, Progress

DIGITS = digits_source()


def open_some(unreadable: frozenset[str], key: str) -> Image.Image:
    if key in unreadable:
        raise UnreadableImage(f"{key}: cut off")
    return DIGITS.train.open_key(key)


def subject_of_pixels() -> Subject:
    """A model whose features of a digit are some of its pixels."""
    return Subject(
        model="it",
        role="student",
        seed=1,
        parameters=1,
        module=torch.nn.Identity(),
        encoder=Encoder(
            "", Preprocessing(8, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)), lambda images: images.flatten(1)[:, :64]
        ),
        class_vectors=torch.nn.functional.normalize(torch.rand(10, 64), dim=1),
        logit_scale=10.0,
        attend=lambda kept, _vectors: torch.nn.functional.normalize(kept, dim=1),
    )


def test_unreadable_training_images_beyond_the_limit_are_refused() -> None:
    test = DIGITS.test
    assert test is not None
    subject = subject_of_pixels()
    store = FeatureStore(None, torch.device("cpu"), 0, lambda event: None)
    images = test.subset(list(range(50)))
    found = store.features(subject.encoder, images, "it")
    train = replace(DIGITS.train, open_key=partial(open_some, frozenset(DIGITS.train.keys[::2])))
    source = replace(DIGITS, train=train)
    with pytest.raises(DataError, match=r"train images of the few-shot draws \(.* %\) could not be read"):
        few_shot(Evaluation(subject, source, images, found), store, Draws((1,), (1,)), 10.0)
    records = few_shot(Evaluation(subject, source, images, found), store, Draws((4,), (1,)), 90.0)
    assert [(record.method, record.shots, record.seed) for record in records] == [
        (method, 4, 1) for method in ("linear-probe", "tip-adapter", "tip-adapter-f")
    ]


def test_progress_grows_over_all_draws_to_the_end() -> None:
    test = DIGITS.test
    assert test is not None
    events: list[Event] = []
    store = FeatureStore(None, torch.device("cpu"), 0, events.append)
    subject, images = subject_of_pixels(), test.subset(list(range(50)))
    found = store.features(subject.encoder, images, "it")
    few_shot(Evaluation(subject, DIGITS, images, found), store, Draws((1, 8), (1,)), 0.0)
    steps = [event for event in events if isinstance(event, Progress) and event.label.startswith("few-shot")]
    shares = [event.done / event.total for event in steps]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert shares[0] < 0.1
