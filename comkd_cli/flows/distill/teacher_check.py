"""Checks the teacher before the student trains, on a sample of the training images, with what it finds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from comkd_cli.data.held_out import count_shared
from comkd_cli.data.loaders import worker_count
from comkd_cli.data.source import evenly_spaced
from comkd_cli.errors import ComkdError, ModelError, first_line
from comkd_cli.evaluation.features import FeatureStore
from comkd_cli.evaluation.subjects import live_teacher
from comkd_cli.events import Notice, Report
from comkd_cli.files import sha256_of_data, write_text
from comkd_cli.flows.distill.run import Run
from comkd_cli.models import downloads
from comkd_cli.runtime import collectives, ranks
from comkd_cli.teachers.inspection import Finding, Inspection, inspect
from comkd_cli.teachers.loading import ReadyTeacher, build_teacher, load_saved_teacher

NAME = "teacher_check.json"
SAMPLE = 512  # images: a share of them is known to 4.4 points


def check_teacher(run: Run, ready: ReadyTeacher, device: torch.device, report: Report) -> None:
    """Look at the run's teacher, report what was found, and keep it in RUN/teacher_check.json.

    A run that is resumed reads that file. Nothing is drawn from a random generator, so that the training has the same
    bits. Raises ModelError if the teacher's features are NaN or infinite.
    """
    path = run.folder / NAME
    key = sha256_of_data([run.teacher_key, run.source.prompts, run.source.train.digest])
    saved = collectives.broadcast(_saved(path, key))
    if saved is not None:
        _report_inspection(saved, report)
        return
    inspection = inspect_teacher(run, ready, device, report)
    if inspection is None:
        return
    with collectives.without_timeout():  # disks can be slow
        if ranks.is_main():
            document = {"made_of": key, **inspection.as_plain()}
            write_text(path, json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    _report_inspection(inspection, report)


def inspect_teacher(run: Run, ready: ReadyTeacher, device: torch.device, report: Report) -> Inspection | None:
    """The teacher's answers to up to SAMPLE training images; None if none of them could be read."""
    source, teacher = run.source, ready.teacher
    sample = source.train.subset(evenly_spaced(source.train, SAMPLE))
    subject = live_teacher(teacher.image_tower, teacher.class_vectors, teacher.logit_scale, ready.preprocessing)
    store = FeatureStore(None, device, worker_count(run.recipe.data), report)
    found = store.features(subject.encoder, sample, "looking at the teacher")
    if not len(found.indices):
        return None
    features = subject.features(found.values, range(len(source.class_names)))
    labels = None if sample.labels is None else [sample.labels[index] for index in found.indices.tolist()]
    inspection = inspect(features, subject.class_vectors, subject.logit_scale, source.class_names, labels)
    return replace(inspection, findings=(*inspection.findings, *_shared_images(run)))


def preview_teacher(run: Run, saved: Path | None, device_type: str, report: Report) -> Inspection | str:
    """The inspection of a teacher whose files are all on this machine; otherwise why it was not checked.

    Nothing is downloaded, trained or written. saved: teacher.pt of an adapted teacher, None for one that is used as its
    weights are. device_type: such as `cuda`.
    """
    if not run.recipe.loss.needs_teacher:
        return "the loss does not use it"
    if saved is not None and not saved.is_file():
        return "it is not trained yet"
    source, settings, device = run.source, run.recipe.teacher, torch.device(device_type)
    with downloads.forbidden():
        try:
            if saved is not None:
                ready = load_saved_teacher(saved, source.class_names, device, report=report)
            else:
                ready = build_teacher(settings, source.class_names, source.template, device, report)
        except (ComkdError, OSError) as error:
            if downloads.was_refused(error):
                return "its weights are not on this machine, and a dry run downloads nothing"
            return first_line(error)
    ready.teacher.to(device)
    try:
        return inspect_teacher(run, ready, device, report) or "none of the sampled images could be read"
    except ModelError as error:  # features that are NaN or infinite: the rest of the plan is still of use
        return first_line(error)


def _shared_images(run: Run) -> list[Finding]:
    """Test images of a folder that are also training images, by content. Held-out images cannot be."""
    data, source = run.recipe.data, run.source
    if data.folder is None or data.fingerprint != "contents" or source.test is None or source.holdout is not None:
        return []
    with collectives.without_timeout():  # it reads the test images
        count = count_shared(source.test, source.train)
    if not count:
        return []
    return [
        Finding(
            "shared_images",
            f"{count:,} of {len(source.test):,} test images have the same content as training images",
            "remove them from one of the two splits; otherwise scores are too high",
            {"images": count, "test_images": len(source.test)},
        )
    ]


def _report_inspection(inspection: Inspection, report: Report) -> None:
    report(Notice(inspection.line))
    for finding in inspection.findings:
        report(Notice(finding.line))


def _saved(path: Path, key: str) -> Inspection | None:
    """The inspection of the same teacher on the same images; None if there is none."""
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if document.pop("made_of") != key:
            return None
        return Inspection.from_plain(document)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):  # none, or damaged: made again
        return None
