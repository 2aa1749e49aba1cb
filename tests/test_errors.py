import pickle
from pathlib import Path

import pytest

from comkd_cli.errors import ComkdError, DataError, Interrupted, WriteError


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ComkdError("is damaged"), "is damaged"),
        (ComkdError("is damaged", path=Path("a/b"), remedy="fetch it"), "a/b: is damaged; fetch it"),
        (
            DataError("too few", path="p", field="f", found=0, allowed="at least 2", remedy="add some"),
            "p: f: too few: 0 (allowed: at least 2); add some",
        ),
        (ComkdError("unknown kind", found="x", allowed=["a", 1]), "unknown kind: x (allowed: a, 1)"),
        (WriteError("could not be written", path="p", remedy="r"), "p: could not be written; r"),
        (Interrupted("stopped", 129), "stopped"),
    ],
)
def test_a_text_is_made_of_the_fields_that_are_given_and_survives_pickling(error: ComkdError, text: str) -> None:
    assert str(error) == text
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert (str(again), vars(again), again.exit_code) == (text, vars(error), error.exit_code)
