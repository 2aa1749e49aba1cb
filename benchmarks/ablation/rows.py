"""The study as plain data: the objectives, the grid of weights, and the rows of each table."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from benchmarks.ablation.pairs import Fields, Settings

BASE = "refinement"
"""The row that the others are compared with: PromptKD's objective."""


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
    """Students of several sizes, by refinement and by labels alone."""
    return [
        Row("size", f"{name}_{student}", OBJECTIVES[name], student, settings.epochs, settings.fewer_seeds, base=base)
        for student in settings.students
        for base in (f"{BASE}_{student}",)
        for name in (BASE, "labels")
    ]


def base_to_novel_rows(settings: Settings) -> list[Row]:
    """Objectives on the images of half of the classes, scored on the images and class vectors of the others too."""
    objectives = {name: OBJECTIVES[name] for name in (BASE, "refinement_if_align", "refinement_edu_attention", "comkd")}
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


# One at a time, beside refinement alone: recipe fields by their dotted names.
TRICKS: dict[str, dict[str, Any]] = {
    "views_1": {"teacher_cache.views": 1},
    "views_8": {"teacher_cache.views": 8},
    "mixup": {"augment.mix": {"kind": "mixup"}},
    "cutmix": {"augment.mix": {"kind": "cutmix"}},
    "rand_augment": {"augment.rand_augment": {}},
    "smaller_crops": {"augment.min_scale": 0.2},
    "temperature_2": {"loss.refinement.temperature": 2.0},
    "temperature_4": {"loss.refinement.temperature": 4.0},
    "ema": {"ema_decay": 0.99},
    "sgd": {"optim.name": "sgd", "optim.learning_rate": 0.08},
}
LENGTHS = {"shorter": 0.3, "longer": 3.0}
"""Of the training, as multiples of the others' epochs."""


def trick_rows(settings: Settings) -> list[Row]:
    """What is known to help a student, one change at a time, on few images; and labels alone on the same images."""
    base = f"{BASE}_tricks"

    def row(name: str, changes: Fields, epochs: int = settings.trick_epochs, terms: str = BASE) -> Row:
        fields = {"teacher_cache.views": epochs, **changes}
        images, seeds = settings.trick_images, settings.fewer_seeds
        return Row(
            "tricks", name, OBJECTIVES[terms], settings.student, epochs, seeds, images, base=base, changes=fields
        )

    lengths = {name: round(settings.trick_epochs * times) for name, times in LENGTHS.items()}
    return [
        row(base, {}),
        *(row(f"{name}_tricks", changes) for name, changes in TRICKS.items()),
        *(row(f"{name}_{epochs}_epochs", {}, epochs) for name, epochs in lengths.items()),
        row("labels_tricks", {}, terms="labels"),
    ]


def long_rows(settings: Settings) -> list[Row]:
    """Students that see more pixels for more epochs, to keep as much of the teacher as they can; and labels alone."""
    changes = {"teacher_cache.views": settings.long_epochs, **settings.long_student}
    return [
        Row(
            "long",
            f"{name}_long",
            OBJECTIVES[name],
            settings.student,
            settings.long_epochs,
            settings.fewer_seeds,
            settings.images,
            base=f"{BASE}_long",
            changes=changes,
        )
        for name in (BASE, "feature_cosine", "labels")
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

    Refinement's weight is the number of classes: the KL divergence of an image then has weight 1. A term that stands
    alone needs no choice, since AdamW is indifferent to the scale of a loss.
    """
    loss: dict[str, Any] = {"refinement": None, "if_align": None, "edu_attention": None}
    for name in row.terms:
        if name == "refinement":
            loss["refinement"] = {"weight": float(settings.classes // 2 if row.half else settings.classes)}
        elif name == CANDIDATES:
            loss |= TERMS["edu_attention"].fields(chosen["edu_attention"])
            loss["edu_attention"]["memory"] = "candidates"
        else:
            alone = len(row.terms) == 1
            weight = row.weights[name] if name in row.weights else 1.0 if alone else chosen[name]
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
