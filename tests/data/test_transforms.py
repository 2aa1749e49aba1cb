import os
import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms

from comkd_cli.data.transforms import scoring_input, stable_seed, training_inputs
from comkd_cli.edge.images import Preprocessing
from comkd_cli.recipe.model import Augment, RandAugment

SIDE = 240
PLAIN = Preprocessing(size=48, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def map_of_places() -> Image.Image:
    """A picture whose red is its column and whose green is its row, so that a crop tells where it is from."""
    columns, rows = np.meshgrid(np.arange(SIDE), np.arange(SIDE))
    return Image.fromarray(np.stack([columns, rows, np.zeros_like(rows)], axis=2).astype(np.uint8))


def seen_region(crop: torch.Tensor) -> tuple[float, float, float, float]:
    """Left, right, top and bottom edge in the picture; left is right of right where the crop is mirrored."""
    size = crop.shape[-1]
    inner = slice(size // 8, -size // 8)  # interpolation bends the colours only near the picture's edge
    centres = (np.arange(size) + 0.5)[inner] / size
    columns = crop[0].numpy().mean(axis=0)[inner] * 255 + 0.5
    rows = crop[1].numpy().mean(axis=1)[inner] * 255 + 0.5
    (width, left), (height, top) = np.polyfit(centres, columns, 1), np.polyfit(centres, rows, 1)
    return left, left + width, top, top + height


def both(seed: int, augment: Augment) -> tuple[torch.Tensor, torch.Tensor]:
    teacher, student = training_inputs(map_of_places(), [PLAIN, replace(PLAIN, size=30)], augment, seed)
    return teacher, student


@pytest.mark.parametrize("seed", range(12))
def test_models_of_different_input_sizes_see_the_same_region_mirrored_alike(seed: int) -> None:
    teacher, student = both(seed, Augment())
    assert teacher.shape == (3, 48, 48)
    assert student.shape == (3, 30, 30)
    assert seen_region(teacher) == pytest.approx(seen_region(student), abs=2.0)


def test_crops_keep_within_their_share_of_area_and_aspect_and_reach_its_ends() -> None:
    areas = []
    for seed in range(60):
        left, right, top, bottom = seen_region(both(seed, Augment(min_scale=0.3, flip=False))[0])
        width, height = right - left, bottom - top
        areas.append(width * height / SIDE**2)
        assert 0.3 * 0.95 <= areas[-1] <= 1.03
        assert 3 / 4 * 0.95 <= width / height <= 4 / 3 * 1.05
        assert min(left, top) >= -3
        assert max(right, bottom) <= SIDE + 3
    assert min(areas) < 0.4
    assert max(areas) > 0.8


def test_half_of_the_crops_are_mirrored_and_none_where_flip_is_off() -> None:
    def mirrored(flip: bool) -> list[bool]:
        regions = [seen_region(both(seed, Augment(flip=flip))[0]) for seed in range(60)]
        assert all(top < bottom for _, _, top, bottom in regions)
        return [left > right for left, right, _, _ in regions]

    assert 15 < sum(mirrored(flip=True)) < 45
    assert not any(mirrored(flip=False))


def test_a_crop_is_a_function_of_its_seed_alone() -> None:
    first, again, other = both(1, Augment()), both(1, Augment()), both(2, Augment())
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


def test_a_crop_draws_nothing_from_any_global_generator() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tobytes()  # type: ignore[union-attr]
    both(1, Augment())
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tobytes() == before[2]  # type: ignore[union-attr]


def test_equal_preprocessings_share_one_tensor_and_others_do_not(noise: Callable[..., Image.Image]) -> None:
    brighter = replace(PLAIN, mean=(0.1, 0.1, 0.1))
    first, second, third = training_inputs(noise(60, 50), [PLAIN, brighter, replace(PLAIN)], Augment(), 3)
    assert first is third
    assert second is not first
    assert torch.allclose(first - 0.1, second, atol=1e-6)


def test_what_one_model_sees_does_not_depend_on_the_others(noise: Callable[..., Image.Image]) -> None:
    picture, small = noise(60, 50), replace(PLAIN, size=16)
    _, beside = training_inputs(picture, [PLAIN, small], Augment(), 3)
    (alone,) = training_inputs(picture, [small], Augment(), 3)
    assert torch.equal(beside, alone)


def test_a_whole_crop_is_the_picture_resized_and_normalised_as_torchvision_does(
    noise: Callable[..., Image.Image],
) -> None:
    settings = Preprocessing(size=24, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), interpolation="bilinear")
    reference = transforms.Compose(
        [
            transforms.Resize((24, 24), transforms.InterpolationMode.BILINEAR),
            transforms.ToTensor(),
            transforms.Normalize(settings.mean, settings.std),
        ]
    )
    picture = noise(3, 3).resize((50, 50), Image.Resampling.NEAREST)
    # A crop of all of a square picture's area is the picture.
    (crop,) = training_inputs(picture, [settings], Augment(min_scale=1, flip=False), 3)
    assert torch.equal(crop, reference(picture))


def test_scoring_sees_the_centre(noise: Callable[..., Image.Image]) -> None:
    picture = noise(30, 20)
    settings = replace(PLAIN, size=20)
    expected = torch.from_numpy(np.asarray(picture)[:, 5:25].transpose(2, 0, 1).astype(np.float32) / 255)
    assert torch.equal(scoring_input(picture, settings), expected)


def test_stable_seeds_are_fixed_numbers() -> None:
    # From `printf 'crop/1/a.png/0' | b2sum -l 64`, shifted right by one bit.
    assert stable_seed("crop", 1, "a.png", 0) == 0x89C79E3E0FB46C64 >> 1


@given(st.lists(st.text(st.characters(exclude_characters="/")) | st.integers(0), min_size=1))
def test_stable_seeds_are_what_torch_takes(parts: list[int | str]) -> None:
    seed = stable_seed(*parts)
    assert 0 <= seed < 2**63
    assert torch.Generator().manual_seed(seed).initial_seed() == seed
    assert stable_seed(*parts, "more") != seed


def test_names_that_are_not_utf8_have_seeds_of_their_own() -> None:
    assert stable_seed(os.fsdecode(b"\xe9")) != stable_seed(os.fsdecode(b"\xe8"))


def test_rand_augment_is_torchvisions_on_the_cropped_region_and_leaves_the_crop_where_it_is(
    noise: Callable[..., Image.Image],
) -> None:
    settings, picture = RandAugment(operations=2, magnitude=20), noise(40, 40)
    whole = {"min_scale": 1.0, "flip": False}
    for seed in range(8):
        (plain,) = training_inputs(picture, [replace(PLAIN, size=40)], Augment(**whole), seed)
        (found,) = training_inputs(picture, [replace(PLAIN, size=40)], Augment(**whole, rand_augment=settings), seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            transforms.RandomResizedCrop.get_params(picture, [1.0, 1.0], [3 / 4, 4 / 3])
            changed = transforms.RandAugment(2, 20, interpolation=transforms.InterpolationMode.BILINEAR)(picture)
        assert torch.equal(found, transforms.functional.to_tensor(changed))
        assert torch.equal(plain, transforms.functional.to_tensor(picture))


def test_models_of_different_input_sizes_see_one_change(noise: Callable[..., Image.Image]) -> None:
    augment = Augment(rand_augment=RandAugment(magnitude=30))
    differ = 0
    for seed in range(8):
        large, small = both(seed, augment)
        assert torch.nn.functional.interpolate(large[None], size=30, mode="area").sub(small).abs().mean() < 0.1
        differ += not torch.allclose(large, both(seed, Augment())[0], atol=0.05)
    assert differ >= 6
