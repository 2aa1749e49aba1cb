"""The study as plain data: the objectives, the grid of weights, and the rows of each table."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from benchmarks.ablation.pairs import Fields, Settings

BASE = "refinement"
"""The row that the others are compared with: PromptKD's objective."""
BEST = "feature_cosine"
"""The objective that the tables of objectives and of images found best: sizes and tricks are studied with it."""


@dataclass(frozen=True)
class Term:
    """A part of the objective whose weight is chosen by the grid, beside refinement."""

    place: str
    """The recipe field below `loss` that holds the weight, such as `if_align.weight`."""
    middle: float
    """Tried together with `FACTORS` times it."""

    def fields(self, weight: float) -> dict[str, Any]:
        """The term with this weight, as fields of `loss`."""
        name, field_name = self.place.split(".")
        return {name: {field_name: weight}}


FACTORS = (0.2, 1.0, 5.0)

TERMS = {
    "if_align": Term("if_align.weight", 0.01),
    "edu_attention": Term("edu_attention.gate_learning_rate_factor", 5.0),
    "feature_cosine": Term("feature_cosine.weight", 1.0),
    "labels": Term("labels.weight", 1.0),
}

# EduAttention whose memory is the classes at hand. On the classes of the run it is `edu_attention` bit for bit, so it
# is compared on other classes alone, and takes the weight that was chosen for `edu_attention`.
CANDIDATES = "edu_attention_candidates"

# Which terms an objective has. `feature_mse` is `feature_cosine` with another weight, since features have unit length.
OBJECTIVES: dict[str, tuple[str, ...]] = {
    BASE: ("refinement",),
    "refinement_if_align": ("refinement", "if_align"),
    "refinement_edu_attention": ("refinement", "edu_attention"),
    "comkd": ("refinement", "if_align", "edu_attention"),
    "feature_cosine": ("feature_cosine",),
    "refinement_feature_cosine": ("refinement", "feature_cosine"),
    "labels": ("labels",),
    "refinement_labels": ("refinement", "labels"),
}


@dataclass(frozen=True)
class Row:
    """One line of a table; a run for each seed."""

    study: str
    name: str
    """Of its recipe, and of the folder of its runs."""
    terms: tuple[str, ...]
    student: str
    epochs: int
    seeds: int
    """Runs with the seeds from 1 to this."""
    images: int | None = None
    """Training images, the same number of each class; None takes all."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """Of terms, instead of those that the grid chose."""
    base: str = BASE
    """The row that this one is compared with, seed by seed."""
    changes: Fields = field(default_factory=dict)
    """Recipe fields by their dotted names, for a row that differs in more than its objective."""
    half: bool = False
    """Train on the images of the first half of the classes only, and classify the others too."""

    @property
    def searched(self) -> set[str]:
        """The terms whose weights the grid chooses. One that stands alone has weight 1: AdamW is indifferent to the
        scale of a loss."""
        if len(self.terms) == 1:
            return set()
        terms = {"edu_attention" if name == CANDIDATES else name for name in self.terms}
        return terms - self.weights.keys() - {"refinement"}


def objective_rows(settings: Settings) -> list[Row]:
    """Every objective on all images."""
    return [
        Row("objectives", name, terms, settings.student, settings.epochs, settings.seeds, settings.images)
        for name, terms in OBJECTIVES.items()
    ]


def image_rows(settings: Settings) -> list[Row]:
    """Refinement, all terms, feature cosine and labels on fewer images, at equal epochs and at equal steps."""
    most = settings.image_counts[-1]
    rows = []
    for count in settings.image_counts[:-1]:
        for paces, epochs in (("epochs", settings.epochs), ("steps", settings.epochs * most // count)):
            base = f"{BASE}_{count}_equal_{paces}"
            for name in (BASE, "comkd", "feature_cosine", "labels"):
                row = f"{name}_{count}_equal_{paces}"
                terms = OBJECTIVES[name]
                rows.append(Row("images", row, terms, settings.student, epochs, settings.fewer_seeds, count, base=base))
    return rows


def size_rows(settings: Settings) -> list[Row]:
    """Students of the other sizes, by the best objective and by labels alone; the first is among the objectives."""
    _, *others = settings.students
    return [
        Row("size", f"{name}_{student}", OBJECTIVES[name], student, settings.epochs, settings.fewer_seeds, base=base)
        for student in others
        for base in (f"labels_{student}",)
        for name in (BEST, "labels")
    ]


def base_to_novel_rows(settings: Settings) -> list[Row]:
    """Objectives on the images of half of the classes, scored on the images and class vectors of the others too."""
    names = (BASE, "refinement_if_align", "refinement_edu_attention", "comkd", BEST)
    objectives = {name: OBJECTIVES[name] for name in names}
    objectives |= {
        f"{name}_candidates": tuple(CANDIDATES if term == "edu_attention" else term for term in OBJECTIVES[name])
        for name in ("refinement_edu_attention", "comkd")
    }
    return [
        Row(
            "base_to_novel",
            f"{name}_base",
            terms,
            settings.student,
            settings.epochs,
            settings.fewer_seeds,
            base=f"{BASE}_base",
            half=True,
        )
        for name, terms in objectives.items()
    ]


# One at a time, with the best objective: recipe fields by their dotted names.
TRICKS: dict[str, dict[str, Any]] = {
    "views_1": {"teacher_cache.views": 1},
    "views_8": {"teacher_cache.views": 8},
    "mixup": {"augment.mix": {"kind": "mixup"}},
    "cutmix": {"augment.mix": {"kind": "cutmix"}},
    "rand_augment": {"augment.rand_augment": {}},
    "smaller_crops": {"augment.min_scale": 0.2},
    "ema": {"ema_decay": 0.99},
    "sgd": {"optim.name": "sgd", "optim.learning_rate": 0.08},
}
TEMPERATURES = (2.0, 4.0)
"""Of refinement, which alone has one; its default is 1."""
LENGTHS = {"shorter": 0.3, "longer": 3.0}
"""Of the training, as multiples of the others' epochs."""
REPEATED_VIEWS = (8, 20)
"""Crops of each image that the longest training repeats, as `comkd init` and recipes/folder.yaml let it."""


def trick_rows(settings: Settings) -> list[Row]:
    """What is known to help a student, one change at a time, on few images; and labels alone on the same images."""

    def row(name: str, changes: Fields, epochs: int = settings.trick_epochs, terms: str = BEST, base: str = "") -> Row:
        fields = {"teacher_cache.views": epochs, **changes}
        images, seeds, base = settings.trick_images, settings.fewer_seeds, base or f"{BEST}_tricks"
        return Row(
            "tricks", name, OBJECTIVES[terms], settings.student, epochs, seeds, images, base=base, changes=fields
        )

    lengths = {name: round(settings.trick_epochs * times) for name, times in LENGTHS.items()}
    most = lengths["longer"]
    longest, softer = f"longer_{most}_epochs", f"{BASE}_tricks"
    return [
        row(f"{BEST}_tricks", {}),
        *(row(f"{name}_tricks", changes) for name, changes in TRICKS.items()),
        *(row(f"{name}_{epochs}_epochs", {}, epochs) for name, epochs in lengths.items()),
        *(row(f"{longest}_views_{n}", {"teacher_cache.views": n}, most, base=longest) for n in REPEATED_VIEWS),
        row(f"labels_{most}_epochs", {}, most, terms="labels", base=longest),
        row("labels_tricks", {}, terms="labels"),
        row(softer, {}, terms=BASE),
        *(
            row(f"temperature_{value:g}_tricks", {"loss.refinement.temperature": value}, terms=BASE, base=softer)
            for value in TEMPERATURES
        ),
    ]


def long_rows(settings: Settings) -> list[Row]:
    """Students that see more pixels for more epochs, to keep as much of the teacher as they can; and labels alone."""
    changes = {"teacher_cache.views": settings.long_epochs, **settings.long_student}

    def row(name: str, terms: str, epochs: int, base: str) -> Row:
        return Row(
            "long",
            name,
            OBJECTIVES[terms],
            settings.student,
            epochs,
            settings.fewer_seeds,
            settings.images,
            base=base,
            changes=changes,
        )

    longest = row(f"{BEST}_longest", BEST, settings.longest_epochs, f"{BEST}_long")
    return [
        *(row(f"{name}_long", name, settings.long_epochs, f"{BASE}_long") for name in (BASE, BEST, "labels")),
        longest,
    ]


def grid_rows(settings: Settings) -> dict[str, list[Row]]:
    """By term, the short runs that choose its weight, from the least weight on."""
    return {
        name: [
            Row(
                "grid",
                f"grid_{name}_{term.middle * factor:g}",
                (BASE, name),
                settings.student,
                settings.grid_epochs,
                1,
                settings.grid_images,
                {name: term.middle * factor},
            )
            for factor in FACTORS
        ]
        for name, term in TERMS.items()
    }


STUDIES = {
    "objectives": objective_rows,
    "images": image_rows,
    "size": size_rows,
    "base_to_novel": base_to_novel_rows,
    "tricks": trick_rows,
    "long": long_rows,
}


def loss_of(row: Row, settings: Settings, chosen: Mapping[str, float]) -> dict[str, Any]:
    """The row's `loss`, as recipe fields. chosen: weights of terms, for those that the row does not give itself.

    Refinement's weight is the number of classes: the KL divergence of an image then has weight 1.
    """
    loss: dict[str, Any] = {"refinement": None, "if_align": None, "edu_attention": None}
    for name in row.terms:
        if name == "refinement":
            loss["refinement"] = {"weight": float(settings.classes // 2 if row.half else settings.classes)}
        elif name == CANDIDATES:
            loss |= TERMS["edu_attention"].fields(chosen["edu_attention"])
            loss["edu_attention"]["memory"] = "candidates"
        else:
            weight = chosen[name] if name in row.searched else row.weights.get(name, 1.0)
            loss |= TERMS[name].fields(weight)
    return loss


def recipe_of(row: Row, settings: Settings, chosen: Mapping[str, float], folder: str) -> dict[str, Any]:
    """The row's recipe as plain data, to be run in the study's folder. folder: its images, seen from there."""
    recipe: dict[str, Any] = {
        "about": f"{row.study}: {row.name}",
        "data": {"folder": folder, "template": settings.template},
        "augment": dict(settings.augment),
        "teacher": {"config": dict(settings.teacher_config), "weights": weights_name()},
        "student": {"train": "full", "config": deepcopy(dict(settings.students[row.student]))},
        "loss": loss_of(row, settings, chosen),
        "optim": {**settings.optim, "epochs": row.epochs},
        "teacher_cache": {"views": min(row.epochs, settings.epochs)},
        "evaluate_every_epochs": 0,
    }
    if settings.pretrained_classes is not None:
        recipe["student"] |= {
            "train": "prompts",
            "weights": weights_name(row.student),
            "prompts": dict(settings.prompts or {}),
        }
    if settings.stage_1 is not None:
        recipe["teacher"]["adapt"] = dict(settings.stage_1)
    for name, value in row.changes.items():
        *sections, field_name = name.split(".")
        place = recipe
        for section in sections:
            place = place[section]
        place[field_name] = value
    return recipe


def weights_name(student: str | None = None) -> str:
    """The file of a CLIP's weights in the study's folder: the teacher's, or those that a student starts from."""
    return "teacher.pt" if student is None else f"{student}.pt"


def pretraining(settings: Settings) -> dict[str, Fields]:
    """The CLIPs that are trained before everything else: their open_clip configs by the files of their weights."""
    frozen = {} if settings.pretrained_classes is None else settings.students
    return {weights_name(): settings.teacher_config, **{weights_name(name): of for name, of in frozen.items()}}


def pretraining_recipe(config: Fields, settings: Settings, folder: str) -> dict[str, Any]:
    """The recipe that trains a CLIP on all labelled training images of a folder."""
    return {
        "about": "weights for the study",
        "data": {"folder": folder, "template": settings.template},
        "augment": dict(settings.augment),
        "teacher": {"config": dict(config), "adapt": dict(settings.teacher_adapt)},
        "student": {"train": "full", "config": dict(settings.students[settings.student])},
        "teacher_cache": {"views": 1},
    }
