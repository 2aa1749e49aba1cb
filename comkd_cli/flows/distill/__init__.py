"""Stage 2: distil a frozen teacher into a student, without labels unless the recipe has `loss.labels`."""

from comkd_cli.flows.distill.dry_run import Outline, Plan, outline, plan
from comkd_cli.flows.distill.run import Run, finished, selection_classes, training_source
from comkd_cli.flows.distill.stage_2 import Distillation, build_student, distill, remove_leftovers
from comkd_cli.flows.distill.teacher_cache import open_cache, precompute
from comkd_cli.flows.distill.teacher_check import preview_teacher

__all__ = [
    "Distillation",
    "Outline",
    "Plan",
    "Run",
    "build_student",
    "distill",
    "finished",
    "open_cache",
    "outline",
    "plan",
    "precompute",
    "preview_teacher",
    "remove_leftovers",
    "selection_classes",
    "training_source",
]
