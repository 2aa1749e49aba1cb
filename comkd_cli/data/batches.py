"""What DataLoader passes from its worker processes to a model: single prepared images, and batches of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from comkd_cli.data.mixing import draw_mixture
from comkd_cli.data.reading import reading
from comkd_cli.data.source import ImageSet
from comkd_cli.data.transforms import scoring_input, stable_seed, training_inputs
from comkd_cli.edge.images import Preprocessing, UnreadableImage
from comkd_cli.recipe.model import Augment


@dataclass(frozen=True)
class Batch:
    """Images that could be read, and the names of those that could not."""

    inputs: tuple[Tensor, ...]
    """For each model, its input (batch, 3, size, size); models with one pre-processing share the tensor."""
    labels: Tensor | None
    """(batch,) int64, UNLABELLED (-1) for an image without a label; None if no image of the set has one."""
    indices: Tensor
    """(batch,) int64, the images' positions in their set."""
    unreadable: tuple[str, ...] = ()
    """A line for each image that is missing from the batch, naming it and the reason."""
    view: int = 0
    """Which crop of its images this is."""
    uncached: Tensor | None = None
    """(batch,) bool: the images that the first model's input holds, because its features of the others are cached.
    None: it holds all."""

    def __len__(self) -> int:
        return len(self.indices)

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device; copies to CUDA are asynchronous, from pinned memory."""
        asynchronous = device.type == "cuda"
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=asynchronous))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory; DataLoader calls this by name."""
        return self._mapped(lambda tensor: tensor.pin_memory())

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """With inputs and labels changed; an input that models share is changed once and stays shared."""
        changed = {id(tensor): change(tensor) for tensor in {id(t): t for t in self.inputs}.values()}
        labels = None if self.labels is None else change(self.labels)
        return replace(self, inputs=tuple(changed[id(tensor)] for tensor in self.inputs), labels=labels)


@dataclass(frozen=True)
class Crops:
    """How images are cropped for training; each crop is a function of the seed, the image's name and the view."""

    augment: Augment
    seed: int
    views: int | None = None
    """Crops of an image: epoch e shows crop e mod views. None: each epoch shows a new one."""

    def view_of(self, epoch: int) -> int:
        """Which crop an epoch shows."""
        return epoch if self.views is None else epoch % self.views


@dataclass(frozen=True)
class Item:
    """One image, prepared for each model."""

    index: int
    inputs: tuple[Tensor | None, ...] | None
    """None for an image that could not be read; within, for a model whose features of it are cached."""
    label: int | None
    problem: str = ""
    view: int = 0


CropIndex = tuple[int, int, bool]
"""An image, which crop of it, and whether the first model needs the crop."""


class TrainingItems(Dataset[Item]):
    """Crops of images by (image, view, whether the first model needs it)."""

    def __init__(self, images: ImageSet, preprocessings: tuple[Preprocessing, ...], crops: Crops) -> None:
        self._images = images
        self._preprocessings = preprocessings
        self._crops = crops

    def __len__(self) -> int:
        return len(self._images)

    def name_of(self, index: int) -> str:
        """What messages call an image."""
        return self._images.keys[index]

    def __getitem__(self, crop: CropIndex) -> Item:
        index, view, for_first = crop
        preprocessings = self._preprocessings if for_first else self._preprocessings[1:]

        def prepare() -> tuple[Tensor | None, ...]:
            inputs = self._inputs(index, view, preprocessings)
            return tuple(inputs) if for_first else (None, *inputs)

        return replace(_item(self._images, index, prepare), view=view)

    def _inputs(self, index: int, view: int, preprocessings: Sequence[Preprocessing]) -> list[Tensor]:
        """The crop of an image in a view, mixed with another image's if the recipe mixes."""
        image = self._images.open_to_crop(index)
        inputs = training_inputs(image, preprocessings, self._crops.augment, self._seed("crop", index, view))
        settings = self._crops.augment.mix
        mixture = None if settings is None else draw_mixture(settings, self._seed("mix", index, view), len(self))
        if mixture is None:
            return inputs
        try:
            other = self._images.open_to_crop(mixture.partner)
        except UnreadableImage:  # reported where its own turn comes; this image is still of use
            return inputs
        seed = self._seed("crop", mixture.partner, view)
        return mixture.of(inputs, training_inputs(other, preprocessings, self._crops.augment, seed))

    def _seed(self, purpose: str, index: int, view: int) -> int:
        return stable_seed(purpose, self._crops.seed, self._images.keys[index], view)


class ScoringItems(Dataset[Item]):
    """Images by position, each decoded once, and resized and centre-cropped for each of several models."""

    def __init__(self, images: ImageSet, preprocessings: Sequence[Preprocessing]) -> None:
        self._images = images
        self._preprocessings = tuple(preprocessings)

    def __len__(self) -> int:
        return len(self._images)

    def name_of(self, index: int) -> str:
        """What messages call an image."""
        return self._images.keys[index]

    def __getitem__(self, index: int) -> Item:
        return _item(self._images, index, lambda: self._inputs(index))

    def _inputs(self, index: int) -> tuple[Tensor, ...]:
        """For each model; those with one pre-processing share the tensor."""
        image = self._images.open(index)
        inputs = {settings: scoring_input(image, settings) for settings in dict.fromkeys(self._preprocessings)}
        return tuple(inputs[settings] for settings in self._preprocessings)


def collate(items: list[Item], sharing: Sequence[int]) -> Batch:
    """A batch of items. sharing: for each model, the model whose input it shares (see `shared_inputs`)."""
    readable = [item.inputs for item in items if item.inputs is not None]

    def stacked(model: int) -> Tensor:
        tensors = [tensor for inputs in readable if (tensor := inputs[model]) is not None]
        # In a worker, default_collate stacks into shared memory, which saves the copy that torch.stack would need.
        return default_collate(tensors) if tensors else torch.empty(0)

    inputs = {model: stacked(model) for model in set(sharing)}
    uncached = torch.tensor([item_inputs[0] is not None for item_inputs in readable], dtype=torch.bool)
    labels = [item.label for item in items if item.inputs is not None]
    return Batch(
        inputs=tuple(inputs[model] for model in sharing),
        labels=None if items[0].label is None else torch.tensor(labels, dtype=torch.int64),
        indices=torch.tensor([item.index for item in items if item.inputs is not None], dtype=torch.int64),
        unreadable=tuple(item.problem for item in items if item.inputs is None),
        view=items[0].view,
        uncached=None if bool(uncached.all()) else uncached,
    )


def shared_inputs(preprocessings: Sequence[Preprocessing]) -> tuple[int, ...]:
    """For each model, the first model with the same pre-processing: its tensor serves both."""
    return tuple(list(preprocessings).index(preprocessing) for preprocessing in preprocessings)


def _item(images: ImageSet, index: int, prepare: Callable[[], tuple[Tensor | None, ...]]) -> Item:
    label = None if images.labels is None else images.labels[index]
    try:
        with reading(index):
            return Item(index, prepare(), label)
    except UnreadableImage as error:
        return Item(index, None, label, str(error))
    except MemoryError:
        return Item(index, None, label, f"{images.keys[index]}: there is not enough memory to prepare it")
