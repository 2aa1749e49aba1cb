"""The `data` and `augment` sections of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from comkd_cli.errors import did_you_mean
from comkd_cli.recipe.catalog import CATALOG
from comkd_cli.recipe.fields import Closed

DATASETS = ("digits", *CATALOG)
DEFAULT_TEMPLATE = "a photo of a {}."
OPENAI_TEMPLATES = "openai"
MOST_IMAGE_PIXELS = 178_956_970  # edge.images.MOST_PIXELS
LEAST_SHORT_SIDE = 32
UNLABELLED = -1
"""The label of an image without one, in a set where others have labels, and in its batches."""


class Images(Closed):
    """How image files are read. The defaults show an image as a viewer does; the recipes of the papers read them as the
    public code does, `{orient: false, alpha: drop, grey16: clip}`."""

    orient: bool = True
    """Apply the EXIF orientation. PromptKD's code does not."""
    alpha: Literal["white", "drop"] = "white"
    """Transparent pixels: `white` composites them on white, `drop` shows the colours that they are stored with, as
    PromptKD's code does."""
    grey16: Literal["scale", "clip"] = "scale"
    """16-bit grey: `scale` maps its levels to 8 bits, `clip` makes every level above 255 white, as PromptKD's code
    does."""


class Data(Closed):
    """The images and the classes: a named `dataset`, a `folder`, or `shards`."""

    dataset: str | None = None
    """A dataset of the suite (`comkd datasets list`), below the data root; or `digits`, which ships with scikit-learn:
    1,797 handwritten digits, 8 by 8 pixels."""
    folder: str | None = None
    """A folder of images: unlabelled anywhere below it, or train/, val/ and test/ with a sub-folder for each class.
    train/unlabelled/ beside the class folders holds training images without a label. A relative path is looked for in
    the current directory, then in the data root."""
    labels: str | None = None
    """With `folder`: a CSV file with the columns `path` and `class`, which assigns labels to some or all training
    images; the others have none, whatever folders they are in. Paths are relative to `folder`, or to the file's own
    folder. The file itself is looked for as `folder` is, then in `folder`."""
    shards: str | None = None
    """WebDataset shards, tar files of unlabelled images: a path or address, in which braces name many shards, such as
    `"train-{0000..0099}.tar"` (in quotes). A relative path is looked for as for `folder`; anything else that webdataset
    can open, such as `http:` and `pipe:`, is fetched once, into RUNS/shards. Needs `classes`."""
    classes: str | Annotated[tuple[str, ...], Field(strict=False)] | None = None
    """Class names in the order of the labels: a text file with a name on each line, or a list. Empty lines are skipped;
    a line that starts with `#` is refused. Default: the names of the sub-folders, sorted; with `labels`, only those of
    test/ and val/, or, if these have none, the classes in the file. Underscores become spaces in all names."""
    template: str | None = None
    """The prompt of a class, with `{}` for its name. Default: the dataset's own, or `a photo of a {}.`"""
    templates: str | Annotated[tuple[str, ...], Field(strict=False)] | None = None
    """Several prompts of a class instead of `template`, each with `{}` for its name; or `openai`, the 80 of OpenAI's
    ImageNet ensemble. The vector of a class is the normalised mean of the vectors of its prompts. `adapt: full` uses
    only the first [C]; promptsrc learns its own words and accepts neither `templates` nor `prompts`."""
    prompts: str | None = None
    """A YAML file with descriptions of single classes, `class name: text` or a list of texts, which replace the prompts
    of that class. A relative path is looked for as for `folder`."""
    unreadable_limit_percent: Annotated[float, Field(ge=0, le=100)] = 10.0
    """The share of images that may be unreadable; they are named and skipped. Above it the run stops."""
    image_limit_pixels: Annotated[int, Field(ge=1, le=MOST_IMAGE_PIXELS)] = MOST_IMAGE_PIXELS
    """The maximum number of pixels of an image (width times height), at most 178,956,970; a larger image counts as
    unreadable, as does one whose longer side is more than 1,000 times the shorter. It bounds the memory of the
    processes that decode images: about 8 bytes per pixel, 16 with transparency [C]."""
    holdout_percent: Annotated[float, Field(ge=0, lt=100)] = 10.0
    """The share of the images that is held out to measure on, if a `folder` or `shards` has no test split (and no val/
    that is scored). Neither the teacher nor the student is trained on them. Images are chosen by their content: copies
    of an image are on the same side, and adding images does not move others. With labels, each class of two or more
    distinct images has some on both sides. 0 trains on every image; scores are then measured on training images [C]."""
    fingerprint: Literal["contents", "size_and_time"] = "contents"
    """How runs, teachers, caches and kept features notice changed images. `contents` reads every file once and keeps
    its sha256 in RUNS/image_digests.sqlite while its path, size and times stay the same. `size_and_time` reads no file,
    for datasets that take too long to read: it does not notice a file that was replaced by another of the same size and
    modification time [C]."""
    resized: Literal["auto", "off"] | Annotated[int, Field(ge=LEAST_SHORT_SIDE)] = "auto"
    """Decode each training image once, and keep a copy of its pixels in RUNS/resized, from which later epochs, runs and
    students crop. A number is the short side of the copies in pixels; an image of up to 1.5 times that size keeps its
    own size. `auto`: the short side is ceil(input / sqrt(augment.min_scale)), with the larger input of teacher and
    student. It makes copies only if at least a tenth of the sampled images of a `folder` or of `shards` is larger than
    both this and 128 pixels; for a `dataset` it is `off`. Images that are scored are never read from copies. The folder
    can be deleted at any time [C]."""
    images: Images = Images()
    """How image files are read, with `dataset` and `folder`. Bundles always use the defaults; with other values, no
    copies are kept (`resized`)."""
    workers: Annotated[int, Field(ge=0)] | None = None
    """Processes that decode images, for each training process. Default: the machine's cores divided by its training
    processes, minus one, at most 8; at most one for `digits`, and none in short runs on it."""

    @model_validator(mode="after")
    def _one_source(self) -> Data:
        if [self.dataset, self.folder, self.shards].count(None) != 2:
            raise ValueError("needs exactly one of `dataset`, `folder` and `shards`")
        if self.dataset is not None and self.dataset not in DATASETS:
            hint = did_you_mean(self.dataset, DATASETS) or f"the datasets are {', '.join(DATASETS)}"
            raise ValueError(f"unknown dataset {self.dataset!r}; {hint}")
        if self.dataset is not None and self.classes is not None:
            raise ValueError(f"`classes` needs `folder` or `shards`; the dataset {self.dataset} has its own")
        if self.images != Images() and isinstance(self.resized, int):
            raise ValueError(
                "copies (`resized`) are always upright and on white, so `images` does not apply: leave one of them out"
            )
        if self.dataset == "digits" and isinstance(self.resized, int):
            raise ValueError("`resized` needs images in files; the digits are in memory")
        if self.labels is not None and self.folder is None:
            raise ValueError("`labels` needs `folder`: it gives labels to images of a folder")
        if self.shards is not None and self.images != Images():
            raise ValueError("`images` needs `dataset` or `folder`: images of shards are always read upright")
        if self.shards is not None and self.classes is None:
            raise ValueError("`shards` have no labels: set `classes`, a list or a text file with a name on each line")
        return self

    @model_validator(mode="after")
    def _prompts(self) -> Data:
        if self.template is not None and self.templates is not None:
            raise ValueError("`template` and `templates` cannot be combined")
        if isinstance(self.templates, str) and self.templates != OPENAI_TEMPLATES:
            raise ValueError(f"`templates` should be a list or `{OPENAI_TEMPLATES}`, not {self.templates!r}")
        if self.templates == ():
            raise ValueError("`templates` is empty")
        given: dict[str, tuple[str, ...]] = {}
        if self.template is not None:
            given["template"] = (self.template,)
        if self.templates is not None and not isinstance(self.templates, str):
            given["templates"] = self.templates
        for field, templates in given.items():
            for template in templates:
                if template.count("{}") != 1:
                    raise ValueError(f"`{field}` must contain {{}} once, for the class name; it is {template!r}")
            if len(set(templates)) < len(templates):
                raise ValueError(f"`{field}` repeats a template")
        return self

    @property
    def words(self) -> str | None:
        """The field that gives a class several prompts or its own; None if no field does."""
        given = {"templates": self.templates, "prompts": self.prompts}
        return next((name for name, value in given.items() if value is not None), None)


class RandAugment(Closed):
    """Random changes of colour, contrast and geometry, torchvision's RandAugment (arXiv 1909.13719)."""

    operations: Annotated[int, Field(ge=1, le=10)] = 2
    """Changes of each crop, drawn from 14 kinds."""
    magnitude: Annotated[int, Field(ge=0, le=30)] = 9
    """Strength of each change; 30 is the largest."""


class Mix(Closed):
    """Mix some crops with a crop of another training image, which the seed chooses."""

    kind: Literal["mixup", "cutmix"]
    """`mixup`: the weighted mean of two crops (arXiv 1710.09412). `cutmix`: a rectangle of one in the other (arXiv
    1905.04899)."""
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """The share of the second crop is drawn from Beta(alpha, alpha)."""
    probability: Annotated[float, Field(gt=0, le=1)] = 0.5
    """The share of crops that are mixed [C]."""


class Augment(Closed):
    """Random resized crops and flips; teacher and student always see the same crop."""

    min_scale: Annotated[float, Field(gt=0, le=1)] = 0.08
    """The smallest share of an image's area that a crop keeps; the largest is all of it [K]."""
    flip: bool = True
    """Mirror half of the crops. Switch it off if left and right matter, as in text or digits [K]."""
    rand_augment: RandAugment | None = None
    """Stronger augmentation of the student's training: each crop is changed before it is resized. Teacher and student
    see the same change, and stage 1 does not use it."""
    mix: Mix | None = None
    """Mixed crops in the student's training; the teacher sees the mixed crop. Which image is mixed in, and how, depends
    on the seed, the image and the view, so the teacher cache works. Each mixed crop decodes two images. It cannot be
    combined with `loss.labels`; stage 1 does not use it."""

    @property
    def crops(self) -> Augment:
        """Only the crops and flips, as stage 1 uses them."""
        return Augment(min_scale=self.min_scale, flip=self.flip)
