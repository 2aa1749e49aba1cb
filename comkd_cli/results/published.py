"""Published figures, for comparison. Top-1 in percent; unpublished ones are absent.

base, new and harmonic mean: CLIP and PromptKD from PromptKD (arXiv 2403.02781), table 1; its teacher from
the supplement, tables 10 and 11. ComKD-CLIP from arXiv 2408.04145, as far as its figures are known.
Students of PromptKD and ComKD-CLIP were trained on the unlabelled training images of all classes, new ones
included, and PromptKD selects the epoch that is best on the base test images.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Halves:
    """Base and new top-1 and their harmonic mean, each as published."""

    base: float | None
    new: float | None
    harmonic: float | None


def _table(text: str) -> dict[str, Halves]:
    rows = (line.split() for line in text.strip().splitlines())
    return {name: Halves(float(base), float(new), float(harmonic)) for name, base, new, harmonic in rows}


BASE_TO_NOVEL: dict[str, dict[str, Halves]] = {
    "CLIP ViT-B/16 (published)": _table("""
        imagenet 72.43 68.14 70.22
        caltech101 96.84 94.00 95.40
        oxford_pets 91.17 97.26 94.12
        stanford_cars 63.37 74.89 68.65
        oxford_flowers 72.08 77.80 74.83
        food101 90.10 91.22 90.66
        fgvc_aircraft 27.19 36.29 31.09
        sun397 69.36 75.35 72.23
        dtd 53.24 59.90 56.37
        eurosat 56.48 64.05 60.03
        ucf101 70.53 77.50 73.85
        average 69.34 74.22 71.70
    """),
    "PromptKD ViT-B/16 (published)": _table("""
        imagenet 80.83 74.66 77.62
        caltech101 98.91 96.65 97.77
        oxford_pets 96.30 98.01 97.15
        stanford_cars 82.80 83.37 83.13
        oxford_flowers 99.42 82.62 90.24
        food101 92.43 93.68 93.05
        fgvc_aircraft 49.12 41.81 45.17
        sun397 83.69 81.54 82.60
        dtd 85.84 71.37 77.94
        eurosat 97.54 82.08 89.14
        ucf101 89.71 82.27 86.10
        average 86.96 80.73 83.73
    """),
    "PromptKD's teacher ViT-L/14 (published)": _table("""
        imagenet 83.24 76.83 79.91
        caltech101 98.71 98.03 98.37
        oxford_pets 96.86 98.82 97.83
        stanford_cars 84.53 84.25 84.39
        oxford_flowers 99.05 82.60 90.08
        food101 94.56 95.15 94.85
        fgvc_aircraft 54.44 43.07 48.09
        sun397 84.97 81.09 82.98
        dtd 85.76 70.65 77.48
        eurosat 94.79 83.15 88.59
        ucf101 89.50 82.26 85.73
    """),
    "ComKD-CLIP ViT-B/16 (published)": {"sun397": Halves(84.19, None, 82.93)},
}

CROSS_DATASET: dict[str, dict[str, float]] = {
    "PromptKD ViT-B/16 (published)": {
        "caltech101": 93.61,
        "oxford_pets": 91.59,
        "stanford_cars": 73.93,
        "oxford_flowers": 75.33,
        "food101": 88.84,
        "fgvc_aircraft": 26.24,
        "sun397": 68.57,
        "dtd": 55.08,
        "eurosat": 63.74,
        "ucf101": 76.39,
        "average": 71.33,
    },
    "PromptKD's teacher ViT-L/14 (published)": {
        "caltech101": 95.61,
        "oxford_pets": 94.19,
        "stanford_cars": 77.70,
        "oxford_flowers": 77.54,
        "food101": 91.59,
        "fgvc_aircraft": 31.29,
        "sun397": 70.86,
        "dtd": 56.32,
        "eurosat": 47.55,
        "ucf101": 76.20,
        "average": 71.89,
    },
}

DOMAIN_GENERALIZATION: dict[str, dict[str, float]] = {
    "CLIP ViT-B/16 (published)": {
        "imagenetv2": 60.83,
        "imagenet_sketch": 46.15,
        "imagenet_a": 47.77,
        "imagenet_r": 73.96,
        "average": 57.18,
    },
    "PromptSRC ViT-B/16 (published)": {
        "imagenetv2": 64.35,
        "imagenet_sketch": 49.55,
        "imagenet_a": 50.90,
        "imagenet_r": 77.80,
        "average": 60.65,
    },
    "PromptKD ViT-B/16 (published)": {
        "imagenetv2": 69.77,
        "imagenet_sketch": 58.72,
        "imagenet_a": 70.36,
        "imagenet_r": 87.01,
        "average": 71.47,
    },
    "ComKD-CLIP ViT-B/16 (published)": {"average": 72.78},
}
