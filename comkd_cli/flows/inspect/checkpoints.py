"""What a student.pt, a teacher.pt or a text_student.pt is. Its tensors are loaded as data; no model is built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from comkd_cli.files import sha256_of_file
from comkd_cli.flows.inspect.kinds import unknown_file
from comkd_cli.models.checkpoints import (
    STUDENT_FORMAT,
    TEACHER_FORMAT,
    load_student_state,
    load_teacher,
    saved_format,
)
from comkd_cli.models.text_student import TEXT_FORMAT, load_text_state


def inspect_checkpoint(path: Path) -> dict[str, Any]:
    """A student.pt, a teacher.pt or a text_student.pt.

    Raises CheckpointError for a damaged one, ComkdError for any other file.
    """
    found = saved_format(path) or ""
    readers = {STUDENT_FORMAT: _student, TEACHER_FORMAT: _teacher, TEXT_FORMAT: _text_student}
    for known, read in readers.items():
        if found.rpartition("/")[0] == known.rpartition("/")[0]:
            common = {"path": str(path), "bytes": path.stat().st_size, "sha256": sha256_of_file(path), "format": found}
            return {**read(path), **common}
    raise unknown_file(path)


def _student(path: Path) -> dict[str, Any]:
    record, state = load_student_state(path)
    settings = record.recipe
    return {
        "kind": "student",
        "recipe": record.recipe_name,
        "seed": settings.seed,
        "data": record.source,
        "held_out_percent": None if record.holdout is None else record.holdout.percent,
        "classes": list(record.class_names),
        "classes_added": list(record.classes_added),
        "templates": list(record.prompts.templates),
        "preprocessing": asdict(record.preprocessing),
        "trained": settings.student.train,
        "backbone": asdict(record.backbone),
        "teacher": record.teacher,
        "teacher_sha256": record.teacher_sha256,
        "metrics": record.metrics,
        "identity": record.identity,
        "tensors": _tensors(state),
    }


def _teacher(path: Path) -> dict[str, Any]:
    saved = load_teacher(path)
    record = saved.record
    return {
        "kind": "teacher",
        "key": record.key,
        "adapted": "class vectors" if not saved.state_dict else "prompts" if saved.prompts else "all weights",
        "model": record.model,
        "classes": list(record.class_names),
        "templates": [record.template],
        "preprocessing": asdict(record.preprocessing),
        "origin": asdict(record.origin),
        "metrics": record.metrics,
        "tensors": _tensors(saved.state_dict),
    }


def _text_student(path: Path) -> dict[str, Any]:
    record, state = load_text_state(path)
    return {
        "kind": "text student",
        "parameters": record.parameters,
        "teacher_parameters": record.teacher_parameters,
        "shape": record.shape._asdict(),
        "tokens": len(record.vocabulary),
        "context_length": record.context_length,
        "classes": list(record.class_names),
        "templates": list(record.templates),
        "metrics": record.metrics,
        "tensors": _tensors(state),
    }


def _tensors(state: Mapping[str, Tensor]) -> dict[str, Any]:
    return {
        "count": len(state),
        "numbers": sum(tensor.numel() for tensor in state.values()),
        "types": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in state.values()}),
    }
