"""A finished student in Python: its module, its transform, its answers, new classes, and saving it again."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from comkd_cli.api.folders import PathLike
from comkd_cli.edge.images import Preprocessing, UnreadableImage, load_prepared
from comkd_cli.errors import CheckpointError, DataError, MisuseError
from comkd_cli.events import ignore_event
from comkd_cli.files import sha256_of_data
from comkd_cli.flows.classes import Added, AddOptions, extend_with_classes
from comkd_cli.method.prompts import VisionPrompts
from comkd_cli.method.student import Student, StudentOutput
from comkd_cli.models import checkpoints
from comkd_cli.models.backbones import state_sha256, tensors_sha256
from comkd_cli.models.checkpoints import StudentRecord
from comkd_cli.runtime.devices import best_device, failures_explained
from comkd_cli.teachers.of_student import record_beside

ImageLike = str | os.PathLike[str] | bytes | Image.Image | np.ndarray
"""A path, the content of a file, a Pillow image, or uint8 pixels (height, width) or (height, width, 3)."""
Images = ImageLike | Sequence[ImageLike] | Tensor
"""One image, several, or a batch that the transform prepared, float (images, 3, size, size)."""

ONE_IMAGE = (str, os.PathLike, bytes, Image.Image, np.ndarray)
FINE_TUNED = ", fine-tuned"
BATCH = 32  # images; a larger batch is hardly faster and takes more memory
MEMORY_REMEDY = "pass fewer or smaller images, or load the student with device='cpu'"


@dataclass(frozen=True)
class Transform:
    """From an image to the student's input: resized, centre-cropped and normalised, as in scoring and on devices.

    It can be pickled, so that the workers of a DataLoader can have it, and takes the place of a torchvision transform.
    """

    preprocessing: Preprocessing

    def __call__(self, image: ImageLike) -> Tensor:
        """An image of any size and mode as float32 (3, size, size). Raises DataError if it could not be read."""
        try:
            if isinstance(image, np.ndarray):
                image = Image.fromarray(image)
            return torch.from_numpy(load_prepared(image, self.preprocessing))
        except UnreadableImage as error:
            raise DataError(f"could not be read: {error}", field="images") from error
        except TypeError as error:  # of Pillow, for arrays of other types and shapes
            raise DataError(
                "is not an image",
                field="images",
                found=str(error),
                allowed="uint8 (height, width) or (height, width, 3)",
            ) from error


@dataclass(frozen=True)
class Prediction:
    """The answer for one image."""

    class_name: str
    """The most probable class."""
    label: int
    """Its index among `class_names`."""
    probability: float
    """Its softmax over all classes, from 0 to 1; the temperature that an export fits is not applied."""
    top: tuple[tuple[str, float], ...]
    """The most probable classes with their probabilities, the first of them `class_name`."""


class LoadedStudent:
    """A loaded student.pt, with the classes that it distinguishes.

    `predict`, `encode` and `logits` accept images of any kind, run in evaluation mode without gradients, and return
    tensors on the CPU. To train further, call `model`.
    """

    def __init__(self, file: Path, model: Student, record: StudentRecord, device: torch.device) -> None:
        self.file = file
        """The student.pt that it was loaded from."""
        self.model = model.to(device)
        """The student as an nn.Module: images (batch, 3, size, size) to its features and logits, see StudentOutput."""
        self.transform = Transform(record.preprocessing)
        """From an image to the input of `model`; see Transform."""
        self._record = record
        self._learned = frozenset(model.learned_state())

    @property
    def record(self) -> StudentRecord:
        """What the student was made of: recipe, data, prompts, pre-processing, the teacher's files."""
        return self._record

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes, in the order of the logits."""
        return self._record.class_names

    @property
    def class_vectors(self) -> Tensor:
        """The teacher's text vectors of the classes, (classes, dim), L2-normalised, on the CPU."""
        return self.model.class_vectors.cpu().clone()

    def encode(self, images: Images) -> Tensor:
        """Image features (images, dim), L2-normalised; their products with `class_vectors` are cosines.

        Raises DataError for an image that could not be read.
        """
        found = [output.features.cpu() for output in self._outputs(images)]
        return torch.cat(found) if found else torch.empty(0, self.model.class_vectors.shape[1])

    def logits(self, images: Images) -> Tensor:
        """Logits (images, classes), float32: cosines times the teacher's logit scale. Raises as `encode`."""
        found = [output.logits.cpu() for output in self._outputs(images)]
        return torch.cat(found) if found else torch.empty(0, len(self.class_names))

    def predict(self, images: Images, top: int = 1) -> list[Prediction]:
        """The most probable classes of each image, `top` of them; a list also for one image.

        Raises DataError for an image that could not be read, MisuseError for a `top` below 1.
        """
        if top < 1:
            raise MisuseError("should be at least 1", field="top", found=top)
        names = self.class_names
        probabilities, labels = self.logits(images).softmax(dim=1).topk(min(top, len(names)), dim=1)
        answers = []
        for shares, indices in zip(probabilities.tolist(), labels.tolist(), strict=True):
            ranked = tuple((names[label], share) for label, share in zip(indices, shares, strict=True))
            answers.append(Prediction(names[indices[0]], indices[0], shares[0], ranked))
        return answers

    def add_class(self, name: str, templates: Sequence[str] = (), *, allow_download: bool = False) -> Added:
        """Add a class by its name, without training; returns the class that it is most easily mistaken for.

        templates: prompts with `{}` for the name; none: those of the student's run. allow_download: download files that
        student.pt refers to and this machine lacks. The text encoder of the student's teacher is loaded each time; to
        add several classes, call `add_classes`. Raises DataError for a name that cannot be added, CheckpointError if
        the text encoder is not available, MisuseError for a template that cannot be used.
        """
        return self.add_classes([name], templates, allow_download=allow_download)[0]

    def add_classes(
        self, names: Sequence[str], templates: Sequence[str] = (), *, allow_download: bool = False
    ) -> list[Added]:
        """As `add_class`, for several names."""
        options = AddOptions(templates=tuple(templates), allow_download=allow_download)
        self._record, added = extend_with_classes(self.file, self.model, self._record, names, options, ignore_event)
        return added

    def save(self, path: PathLike, *, force: bool = False) -> Path:
        """Write a student.pt that every command accepts, with added classes and trained weights; returns its path.

        If the weights are no longer those of `file`, the new file records that it was fine-tuned and has no scores
        of the old weights. Raises MisuseError if the file exists without `force`; CheckpointError if the frozen
        backbone of a student with `student.train: prompts` was trained, because student.pt does not store it.
        """
        target = Path(path)
        if target.exists() and not force:
            raise MisuseError(
                "already exists", path=target, remedy="replace it with force=True, or choose another path"
            )
        self._check_frozen(target)
        state = {name: value.cpu() for name, value in self.model.state_dict().items() if name in self._learned}
        record = self._record if self._holds(state) else _fine_tuned(self._record, state)
        checkpoints.save_student(target, self.model, record_beside(record, self.file, target), state)
        return target

    def _check_frozen(self, target: Path) -> None:
        """Raise CheckpointError if the frozen backbone of a prompts-only student was trained."""
        backbone, digest = self.model.backbone, self._record.backbone_sha256
        if digest is None or not isinstance(backbone, VisionPrompts) or state_sha256(backbone.tower) == digest:
            return
        raise CheckpointError(
            "its backbone was trained, but with student.train: prompts, student.pt does not store the backbone",
            path=target,
            remedy="leave the backbone frozen, or distil with student.train: full",
        )

    def _holds(self, state: dict[str, Tensor]) -> bool:
        """Whether `file` has the same weights."""
        try:
            _, saved = checkpoints.load_student_state(self.file)
        except (CheckpointError, OSError):  # moved or replaced since
            return False
        return saved.keys() == state.keys() and all(torch.equal(saved[name], value) for name, value in state.items())

    def _outputs(self, images: Images) -> Iterator[StudentOutput]:
        """The student's output of each batch."""
        device, training = self.model.class_vectors.device, self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), failures_explained(MEMORY_REMEDY):
                for batch in self._batches(images):
                    yield self.model(batch.to(device))
        finally:
            self.model.train(training)

    def _batches(self, images: Images) -> Iterator[Tensor]:
        """Prepared images, at most BATCH at once, so that memory does not grow with their number."""
        if isinstance(images, Tensor):
            size = self.transform.preprocessing.size
            if images.dim() != 4 or images.shape[1:] != (3, size, size) or not images.is_floating_point():
                raise DataError(
                    "is not a batch of prepared images",
                    field="images",
                    found=f"{images.dtype} {tuple(images.shape)}",
                    allowed=f"float (images, 3, {size}, {size})",
                    remedy="pass the images themselves, or stack what student.transform returns",
                )
            yield from torch.split(images.float(), BATCH)
            return
        several = [images] if isinstance(images, ONE_IMAGE) else images
        for start in range(0, len(several), BATCH):
            yield torch.stack([self.transform(image) for image in several[start : start + BATCH]])


def _fine_tuned(record: StudentRecord, state: dict[str, Tensor]) -> StudentRecord:
    """The record of a student whose weights were trained after its run: a different identity, and no scores."""
    digest = tensors_sha256(state)
    return replace(
        record,
        recipe_name=f"{record.recipe_name.removesuffix(FINE_TUNED)}{FINE_TUNED}",
        identity=sha256_of_data([record.identity, digest]),
        identity_parts=None if record.identity_parts is None else {**record.identity_parts, "fine_tuned": digest},
        metrics={},
    )


def load_student(
    path: PathLike, *, device: str | torch.device | None = None, allow_download: bool = False
) -> LoadedStudent:
    """The student of a student.pt, in evaluation mode.

    device: None uses the GPU if there is one, as the commands do. allow_download: download files that student.pt refers
    to and this machine lacks, such as the backbone of a student with `student.train: prompts`. Raises CheckpointError
    for any other file, ModelError if the backbone could not be built.
    """
    student, record = checkpoints.load_student(Path(path), allow_download)
    return LoadedStudent(Path(path), student, record, best_device() if device is None else torch.device(device))
