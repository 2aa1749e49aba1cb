"""Whether this machine can run comkd: software, hardware, data and weights, with a remedy for each finding."""

from comkd_cli.flows.doctor.checks import Check, State
from comkd_cli.flows.doctor.examination import Examination, examine

__all__ = ["Check", "Examination", "State", "examine"]
