"""Checks a teacher's answers before a student is trained on them: what would make a distillation pointless.

A pure function of features, class vectors and the temperature. Each finding has its figures and a remedy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from comkd_cli.recipe.model import UNLABELLED

ONE_CLASS_PERCENT = 90.0  # of the answers: the student of such a teacher learns to give one answer
EXPLAINED_POINTS = 10.0  # that the share of the answers may exceed the share of the labels
LEAST_EXPECTED = 5.0  # images of a class in the sample: 0 answers are then unlikely to be chance
NEAR_CHANCE = 1.5  # times 1 / classes, for the mean of the largest probability
SAME_NAME_COSINE = 0.98  # of two class vectors
NEAR_DUPLICATE_COSINE = 0.999  # of two images' features
COLLAPSED_COSINE = 0.9  # mean of all pairs of images: a teacher that sees no differences finds no duplicates either
MOST_NAMED = 5
CLASSES_AT_ONCE = 1024


@dataclass(frozen=True)
class Finding:
    """Something about the teacher or the images that a user should know before the training."""

    kind: str
    """`one_class`, `never_answered`, `near_chance`, `similar_classes`, `near_duplicates` or `shared_images`."""
    text: str
    remedy: str
    figures: dict[str, float] = field(default_factory=dict)
    names: tuple[str, ...] = ()
    """Of the classes or pairs of classes, the most striking first."""

    @property
    def line(self) -> str:
        """The notice of it."""
        return f"{self.text}; {self.remedy}"


@dataclass(frozen=True)
class Inspection:
    """The teacher's answers to a sample of the training images, and what was found."""

    images: int
    """That could be read."""
    classes: int
    share_percent: tuple[float, ...]
    """Of the answers, by class."""
    confidence_percent: float
    """The mean of the largest probability."""
    accuracy_percent: float | None
    """Of the labelled images; None without labels."""
    top_answer: str
    top_answer_percent: float
    labelled: int = 0
    """Of the images, those with a label."""
    findings: tuple[Finding, ...] = ()

    @property
    def line(self) -> str:
        """The summary in one line."""
        accuracy = "" if self.accuracy_percent is None else f", accuracy {self.accuracy_percent:.1f} %"
        if 0 < self.labelled < self.images:
            accuracy += f" on the {self.labelled:,} labelled ones"
        return (
            f"the teacher on {self.images:,} training images: mean confidence {self.confidence_percent:.1f} %"
            f"{accuracy}, most frequent answer {self.top_answer!r} ({self.top_answer_percent:.1f} %)"
        )

    def as_plain(self) -> dict[str, Any]:
        """The same as plain data, for JSON."""
        return {**asdict(self), "share_percent": list(self.share_percent), "findings": list(map(asdict, self.findings))}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Inspection:
        """The inspection of plain data. Raises KeyError or TypeError for other data."""
        findings = tuple(Finding(**{**entry, "names": tuple(entry["names"])}) for entry in plain["findings"])
        return cls(**{**plain, "share_percent": tuple(plain["share_percent"]), "findings": findings})


@torch.no_grad()
def inspect(
    features: Tensor,
    class_vectors: Tensor,
    logit_scale: float,
    class_names: Sequence[str],
    labels: Sequence[int] | None,
) -> Inspection:
    """The answers of a teacher to images, and the findings on them.

    features: (images, dim) and class_vectors: (classes, dim), L2-normalised, on the CPU. labels: of the images;
    UNLABELLED for an image without one, None if no image has one. The accuracy is that of the labelled images.
    Shares of labels are used only if every image has one, since a few labels need not be spread as the images are.
    Raises ValueError without images.
    """
    if not len(features):
        raise ValueError("a teacher is inspected on at least one image")
    count = len(class_names)
    probabilities = (logit_scale * features @ class_vectors.T).softmax(dim=1)
    confidence, answers = probabilities.max(dim=1)
    shares = 100 * torch.bincount(answers, minlength=count) / len(answers)
    top = int(shares.argmax())
    known = torch.tensor(labels if labels is not None else [UNLABELLED] * len(answers))
    labelled = known != UNLABELLED
    label_shares = 100 * torch.bincount(known, minlength=count) / len(known) if labelled.all() else None
    one_class = _one_class(shares, label_shares, class_names)
    findings = [
        *one_class,
        *([] if one_class else _never_answered(shares, label_shares, len(answers), class_names)),
        *_near_chance(float(confidence.mean()), count),
        *_similar_classes(class_vectors, class_names),
        *_near_duplicates(features),
    ]
    return Inspection(
        images=len(answers),
        classes=count,
        share_percent=tuple(shares.tolist()),
        confidence_percent=100 * float(confidence.mean()),
        accuracy_percent=100 * float((answers == known)[labelled].float().mean()) if labelled.any() else None,
        labelled=int(labelled.sum()),
        top_answer=class_names[top],
        top_answer_percent=float(shares[top]),
        findings=tuple(findings),
    )


def _one_class(shares: Tensor, label_shares: Tensor | None, names: Sequence[str]) -> list[Finding]:
    top = int(shares.argmax())
    share = float(shares[top])
    explained = label_shares is not None and share - float(label_shares[top]) <= EXPLAINED_POINTS
    if len(names) <= 2 or share < ONE_CLASS_PERCENT or explained:
        return []
    figures = {"share_percent": share}
    labelled = ""
    if label_shares is not None:
        figures["label_share_percent"] = float(label_shares[top])
        labelled = f", and {float(label_shares[top]):.0f} % of the labels"
    return [
        Finding(
            "one_class",
            f"{share:.0f} % of the teacher's answers are {names[top]!r}{labelled}: a student distilled from it learns "
            "to give this one answer, and agrees with it on any image",
            "check the class names, data.template and the teacher's weights, or adapt the teacher to labelled images",
            figures,
            (names[top],),
        )
    ]


def _never_answered(shares: Tensor, label_shares: Tensor | None, images: int, names: Sequence[str]) -> list[Finding]:
    expected = torch.full_like(shares, 100 / len(names)) if label_shares is None else label_shares
    unanswered = (shares == 0) & (expected * images / 100 >= LEAST_EXPECTED)
    absent = [name for name, is_absent in zip(names, unanswered.tolist(), strict=True) if is_absent]
    if not absent:
        return []
    more = f" and {len(absent) - MOST_NAMED:,} more" if len(absent) > MOST_NAMED else ""
    count = "1 class" if len(absent) == 1 else f"{len(absent):,} classes"
    return [
        Finding(
            "never_answered",
            f"the teacher never answers {count} of {len(names):,} on {images:,} images ("
            f"{', '.join(absent[:MOST_NAMED])}{more}), so a student cannot learn them",
            "check their names and data.template, or adapt the teacher to labelled images",
            {"classes": len(absent)},
            tuple(absent[:MOST_NAMED]),
        )
    ]


def _near_chance(confidence: float, classes: int) -> list[Finding]:
    if confidence >= NEAR_CHANCE / classes:
        return []
    return [
        Finding(
            "near_chance",
            f"the teacher's mean confidence is {100 * confidence:.1f} %, near the {100 / classes:.1f} % of chance "
            f"among {classes} classes: a student can learn little from its answers",
            "check the teacher's weights and the class names, or adapt the teacher to labelled images",
            {"confidence_percent": 100 * confidence, "chance_percent": 100 / classes},
        )
    ]


def _similar_classes(vectors: Tensor, names: Sequence[str]) -> list[Finding]:
    """Pairs of classes whose vectors are nearly equal; compared in blocks, since there may be very many classes."""
    pairs: list[tuple[float, int, int]] = []
    total = 0
    for start in range(0, len(vectors), CLASSES_AT_ONCE):
        block = vectors[start : start + CLASSES_AT_ONCE] @ vectors.T
        # Each pair once: the second class comes after the first.
        close = (block > SAME_NAME_COSINE).triu(diagonal=start + 1)
        total += int(close.sum())
        found = close.nonzero()
        if len(found):
            cosines = block[close]
            best = cosines.topk(min(MOST_NAMED, len(cosines))).indices
            pairs += [(float(cosines[i]), start + int(found[i][0]), int(found[i][1])) for i in best]
    if not total:
        return []
    pairs = sorted(pairs, key=lambda pair: (-pair[0], pair[1:]))[:MOST_NAMED]
    named = tuple(f"{names[first]} / {names[second]}" for _, first, second in pairs)
    count = "1 pair of classes has" if total == 1 else f"{total:,} pairs of classes have"
    return [
        Finding(
            "similar_classes",
            f"{count} nearly equal class vectors (cosine above {SAME_NAME_COSINE:g}): "
            + ", ".join(f"{name} ({cosine:.3f})" for name, (cosine, _, _) in zip(named, pairs, strict=True)),
            "the teacher hardly tells them apart: give them names that differ in what is seen, or merge them",
            {"pairs": total, "cosine_max": pairs[0][0]},
            named,
        )
    ]


def _near_duplicates(features: Tensor) -> list[Finding]:
    """Images of the sample that another one is nearly equal to, if the teacher tells other images apart."""
    count = len(features)
    if count < 2:
        return []
    cosines = (features @ features.T).fill_diagonal_(0)
    if float(cosines.sum()) / (count * (count - 1)) > COLLAPSED_COSINE:
        return []
    near = int((cosines.max(dim=1).values > NEAR_DUPLICATE_COSINE).sum())
    if not near:
        return []
    return [
        Finding(
            "near_duplicates",
            f"{near} of {count} sampled training images have a near-duplicate among them (cosine above "
            f"{NEAR_DUPLICATE_COSINE:g}), so held-out and test images may also have one among the training images",
            "remove all but one, or use a test split of other scenes; otherwise scores are too high",
            {"images": near, "sample": count},
        )
    ]
