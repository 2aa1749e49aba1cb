"""Distils the text encoder of a student's teacher into a small one."""

from comkd_cli.flows.distill_text.flow import DistilledText, DistillTextOptions, distill_text

__all__ = ["DistillTextOptions", "DistilledText", "distill_text"]
