"""The model card's section on the text encoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def text_section(manifest: Mapping[str, Any], sizes: Mapping[str, int]) -> list[str]:
    """Lines with the figures of the text encoder; none without one. sizes: bytes of each file of the bundle."""
    text = manifest["text"]
    if text is None:
        return []
    return [
        "",
        f"The text encoder has {text['parameters']:,} parameters. {_distilled(text['distilled'])}Its precisions, "
        "against fp32:",
        "",
        "| text encoder | MB | smallest cosine | top-1 agreement |",
        "|---|---:|---:|---:|",
        *(_row(precision, entry, sizes) for precision, entry in text["precisions"].items()),
    ]


def _row(precision: str, entry: Mapping[str, Any], sizes: Mapping[str, int]) -> str:
    cosine = agreement = "-"
    if "cosine_min" in entry:
        cosine = f"{entry['cosine_min']:.5f} of {entry['names']} names"
        agreement = f"{entry['agreement_percent']:.2f} % of {entry['images']} images"
    return f"| {precision} | {sizes[entry['file']] / 1e6:.2f} | {cosine} | {agreement} |"


def _distilled(figures: Mapping[str, Any] | None) -> str:
    """What a distilled encoder keeps of the teacher's."""
    if figures is None:
        return ""
    text = (
        f"It was distilled from the teacher's, which has {figures['teacher_parameters']:,}. On "
        f"{int(figures['held_out_names']):,} names that it was not trained on, the cosine with the teacher's vectors "
        f"is "
        f"{figures['held_out_cosine_mean']:.4f} on average and {figures['held_out_cosine_min']:.4f} at worst (a "
        f"constant vector: {figures['constant_cosine_mean']:.4f}), and {figures['held_out_retrieval_percent']:.1f} % "
        "are nearest to the teacher's vector of the same name. With its vectors of this model's own classes, "
        f"{figures['gate_agreement_percent']:.2f} % of the images above keep their top-1 class"
    )
    trained = int(figures["classes_trained_on"])
    return f"{text}; it was trained on {trained} of {int(figures['classes'])} of these classes. "
