"""Stage 1: adapt a teacher to the data, once for every run that shares it."""

from comkd_cli.flows.adapt.preparation import TeacherPreparation, describe_stage
from comkd_cli.flows.adapt.stage import Stage1, stage_1

__all__ = ["Stage1", "TeacherPreparation", "describe_stage", "stage_1"]
