from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from comkd_cli.data.batches import Crops, TrainingItems
from comkd_cli.data.mixing import Mixture, draw_mixture
from comkd_cli.data.source import ImageSet
from comkd_cli.edge.images import Preprocessing, UnreadableImage
from comkd_cli.recipe.model import Augment, Mix

LARGE = Preprocessing(size=24, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
SMALL = Preprocessing(size=16, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
PLAIN = Augment(min_scale=0.9, flip=False)


def grey(key: str) -> Image.Image:
    if key == "damaged":
        raise UnreadableImage(key, "is damaged")
    return Image.new("RGB", (32, 32), (int(key),) * 3)


def items(mix: Mix | None, keys: tuple[str, ...] = ("0", "255")) -> TrainingItems:
    images = ImageSet(keys, None, grey)
    return TrainingItems(images, (LARGE, SMALL), Crops(PLAIN.model_copy(update={"mix": mix}), seed=1))


def crops(mix: Mix, views: int = 60) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The crops of a black image in a set of a black and a white one, for both models, view by view."""
    found = [items(mix)[0, view, True].inputs for view in range(views)]
    return [(large, small) for large, small in found]  # type: ignore[misc]


def test_shares_follow_the_beta_distribution_and_partners_are_uniform() -> None:
    drawn = [draw_mixture(Mix(kind="mixup", alpha=0.4, probability=1), seed, 10) for seed in range(2000)]
    mixtures = [mixture for mixture in drawn if mixture is not None]
    assert len(mixtures) == 2000
    assert stats.kstest([mixture.share for mixture in mixtures], stats.beta(0.4, 0.4).cdf).pvalue > 1e-3
    assert stats.chisquare(np.bincount([mixture.partner for mixture in mixtures], minlength=10)).pvalue > 1e-3


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_the_probability_is_the_share_of_mixed_crops(kind: str) -> None:
    settings = Mix.model_validate({"kind": kind, "probability": 0.3})
    mixed = sum(draw_mixture(settings, seed, 5) is not None for seed in range(2000))
    assert stats.binomtest(mixed, 2000, 0.3).pvalue > 1e-3


def test_mixup_is_the_weighted_mean_at_every_input_size() -> None:
    levels = []
    for large, small in crops(Mix(kind="mixup", probability=1)):
        level = float(large[0, 0, 0])
        assert torch.allclose(large, torch.full_like(large, level))
        assert torch.allclose(small, torch.full_like(small, level))
        levels.append(level)
    assert min(levels) == 0  # mixed with itself
    assert len({level for level in levels if 0 < level < 1}) > 10


def test_cutmix_pastes_the_same_rectangle_of_the_other_crop_at_every_input_size() -> None:
    pasted = [pair for pair in crops(Mix(kind="cutmix", probability=1)) if pair[0].any()]
    assert len(pasted) > 10
    for large, small in pasted:
        assert set(large.unique().tolist()) <= {0.0, 1.0}
        edges = []
        for crop in (large[0], small[0]):
            rows, columns = (crop.amax(dim=axis).nonzero().flatten() for axis in (1, 0))
            assert crop[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()  # one solid rectangle
            assert crop.sum() == len(rows) * len(columns)
            edges.append([float(e) / len(crop) for e in (rows[0], rows[-1] + 1, columns[0], columns[-1] + 1)])
        assert np.allclose(edges[0], edges[1], atol=1 / 24 + 1 / 16)


@pytest.mark.parametrize(
    ("centre", "expected"), [((0.5, 0.5), (slice(4, 12), slice(4, 12))), ((0.0, 1.0), (slice(0, 4), slice(12, 16)))]
)
def test_a_quarter_of_the_area_is_half_of_each_side_clipped_at_the_edge(
    centre: tuple[float, float], expected: tuple[slice, slice]
) -> None:
    (mixed,) = Mixture(0, 0.25, centre).of([torch.zeros(3, 16, 16)], [torch.ones(3, 16, 16)])
    wanted = torch.zeros(3, 16, 16)
    wanted[:, expected[0], expected[1]] = 1
    assert torch.equal(mixed, wanted)


def test_a_tensor_that_models_share_stays_shared() -> None:
    tensor = torch.zeros(3, 8, 8)
    first, second = Mixture(0, 0.5, None).of([tensor, tensor], [torch.ones(3, 8, 8)] * 2)
    assert first is second
    assert not tensor.any()  # the original is not written to


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_what_the_student_sees_is_the_same_where_the_teachers_features_are_cached(kind: str) -> None:
    made = items(Mix.model_validate({"kind": kind, "probability": 1}))
    for view in range(10):
        beside, alone = made[0, view, True].inputs, made[0, view, False].inputs
        assert beside is not None
        assert alone is not None
        assert alone[0] is None
        assert torch.equal(beside[1], alone[1])  # type: ignore[arg-type]


def test_an_image_beside_an_unreadable_one_is_used_as_it_is(noise: Callable[..., Image.Image]) -> None:
    made = items(Mix(kind="mixup", probability=1), ("200", "damaged"))
    for view in range(10):
        item = made[0, view, True]
        assert item.inputs is not None
        assert torch.allclose(item.inputs[0], torch.tensor(200 / 255))  # type: ignore[arg-type]
    assert made[1, 0, True].inputs is None


def test_without_mix_the_crop_is_the_images_own() -> None:
    with_none, mixed_never = items(None), items(Mix(kind="mixup", probability=1e-12))
    for view in range(5):
        first, second = with_none[1, view, True].inputs, mixed_never[1, view, True].inputs
        assert torch.equal(first[0], second[0])  # type: ignore[index,arg-type]
