"""The student of the tests of the flows."""

from tests.flows.conftest import short_exports, tiny_student, weights

__all__ = ["short_exports", "tiny_student", "weights"]
