"""The teacher cache of a run: opened while its student is trained, or filled in advance."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from accelerate import Accelerator

from comkd_cli.errors import MisuseError
from comkd_cli.events import Notice, Report
from comkd_cli.files import sha256_of_data, sha256_of_file
from comkd_cli.flows.distill.run import Run
from comkd_cli.runtime import collectives
from comkd_cli.runtime.locks import in_turn_with_others
from comkd_cli.teachers.cached import fill_cache
from comkd_cli.teachers.feature_cache import CacheKey, TeacherCache
from comkd_cli.teachers.loading import ReadyTeacher, TeacherSource


def precompute(run: Run, teacher: TeacherSource, accelerator: Accelerator, report: Report) -> None:
    """Fill the run's teacher cache with every missing crop; no student is trained.

    Raises MisuseError for a recipe without a cache, and what `distill` raises of teachers and images.
    """
    if run.recipe.teacher_cache is None:
        raise MisuseError(
            "--precompute needs a teacher cache, but the recipe does not enable one",
            field="teacher_cache",
            remedy="set teacher_cache.views in the recipe",
        )
    run.check_images()
    ready = teacher.prepare()
    cache = open_cache(run, ready, report)
    assert cache is not None  # since the recipe has settings for it
    ready.teacher.to(accelerator.device)
    with collectives.main_holds(in_turn_with_others(cache.folder, report)):
        fill_cache(cache, ready, run.images_to_crop(report), run.recipe, accelerator, report)


def open_cache(run: Run, ready: ReadyTeacher, report: Report) -> TeacherCache | None:
    """The run's teacher cache, created if it is missing; None if the recipe has none. Raises CheckpointError."""
    settings = run.recipe.teacher_cache
    if settings is None:
        return None
    images = run.source.train
    made_of: dict[str, Any] = {
        "teacher": run.teacher_key,
        "preprocessing": asdict(ready.preprocessing),
        "images": images.digest,
        # Without fields that are off, so that caches of versions without these fields are found.
        "augment": run.recipe.augment.model_dump(mode="json", exclude_none=True),
        "precision": run.recipe.precision,
        "teacher_cache": settings.model_dump(mode="json"),
        # Training with the same settings need not give the same teacher.
        "checkpoint_sha256": sha256_of_file(ready.checkpoint) if ready.checkpoint else None,
    }
    if run.copy_plan is not None:  # without it as in versions without copies
        made_of["resized"] = run.copy_plan.short_side
    dim = ready.teacher.class_vectors.shape[1]
    key = CacheKey(sha256_of_data(made_of), len(images), dim, settings.views, settings.dtype)
    with collectives.main_first():  # it creates the files
        cache = TeacherCache(run.runs / "cache", key, images.rows, made_of)
    cached, cost = cache.count(), cache.seconds_per_crop()
    saving = f", which save about {cached * cost:,.0f} s of the teacher's time" if cached and cost is not None else ""
    report(
        Notice(
            f"teacher cache: {cached:,} of {settings.views * len(images):,} crops cached{saving}; the full cache takes "
            f"{key.size_bytes / 1e6:,.1f} MB in {cache.folder}"
        )
    )
    return cache
