"""The study as plain data: the pair, the objectives, the grid of weights, and the rows of each table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Fields = Mapping[str, Any]
"""Fields of a recipe, as plain data."""

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
    half: bool = False
    """Train on the images of the first half of the classes only, and classify the others too."""


@dataclass(frozen=True)
class Settings:
    """The pair and the length of its training."""

    classes: int
    template: str
    augment: Fields
    teacher_config: Fields
    teacher_adapt: Fields
    students: Mapping[str, Fields]
    """open_clip configs by name; the first is that of every table but the one of sizes."""
    optim: Fields
    """Of every student, less its epochs."""
    epochs: int
    seeds: int
    fewer_seeds: int
    """Of the tables other than that of objectives."""
    image_counts: tuple[int, ...]
    """Of the table of unlabelled images; the last is taken for all that there are."""
    grid_images: int
    grid_epochs: int
    validation_share: float
    """Of the training images of each class: held out where weights are chosen."""

    @property
    def student(self) -> str:
        """The student of every table but the one of sizes."""
        return next(iter(self.students))


def _resnet(width: int) -> Fields:
    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": width, "head_width": 32}
    return {"embed_dim": 64, "vision_cfg": vision}


CIFAR10 = Settings(
    classes=10,
    template="a photo of a {}.",
    augment={"min_scale": 0.5},
    teacher_config={
        "embed_dim": 64,
        "vision_cfg": {"image_size": 48, "layers": [2, 2, 1, 1], "width": 16, "head_width": 32},
        "text_cfg": {"context_length": 16, "width": 64, "heads": 2, "layers": 2},
    },
    teacher_adapt={"method": "full", "epochs": 18, "batch_size": 128, "learning_rate": 3e-3},
    students={
        "efficientnet": {
            "embed_dim": 64,
            "vision_cfg": {
                "image_size": 32,
                "timm_model_name": "test_efficientnet",
                "timm_pool": "avg",
                "timm_proj": "none",
            },
        },
        "resnet_12": _resnet(12),
        "resnet_8": _resnet(8),
        "resnet_4": _resnet(4),
        "resnet_2": _resnet(2),
    },
    optim={"name": "adamw", "batch_size": 128, "learning_rate": 4e-3},
    epochs=8,
    seeds=5,
    fewer_seeds=3,
    image_counts=(1_000, 5_000, 10_000, 50_000),
    grid_images=10_000,
    grid_epochs=6,
    validation_share=0.1,
)


def objective_rows(settings: Settings) -> list[Row]:
    """Every objective on all images."""
    return [
        Row("objectives", name, terms, settings.student, settings.epochs, settings.seeds)
        for name, terms in OBJECTIVES.items()
    ]


def image_rows(settings: Settings) -> list[Row]:
    """Refinement, all terms and labels alone on fewer images, at equal epochs and at equal steps."""
    most = settings.image_counts[-1]
    rows = []
    for count in settings.image_counts[:-1]:
        for paces, epochs in (("epochs", settings.epochs), ("steps", settings.epochs * most // count)):
            base = f"{BASE}_{count}_equal_{paces}"
            for name in (BASE, "comkd", "labels"):
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
    return {
        "about": f"{row.study}: {row.name}",
        "data": {"folder": folder, "template": settings.template},
        "augment": dict(settings.augment),
        "teacher": {"config": dict(settings.teacher_config), "weights": "teacher.pt"},
        "student": {"train": "full", "config": dict(settings.students[row.student])},
        "loss": loss_of(row, settings, chosen),
        "optim": {**settings.optim, "epochs": row.epochs},
        "teacher_cache": {"views": min(row.epochs, settings.epochs)},
        "evaluate_every_epochs": 0,
    }


def teacher_recipe(settings: Settings, folder: str) -> dict[str, Any]:
    """The recipe that trains the teacher, on all labelled training images."""
    return {
        "about": "the study's teacher",
        "data": {"folder": folder, "template": settings.template},
        "augment": dict(settings.augment),
        "teacher": {"config": dict(settings.teacher_config), "adapt": dict(settings.teacher_adapt)},
        "student": {"train": "full", "config": dict(settings.students[settings.student])},
        "teacher_cache": {"views": 1},
    }
