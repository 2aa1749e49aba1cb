import pytest

from comkd_cli.cli.reproduction import duration
from comkd_cli.cli.resuming import Choice, ReproducedRun


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "1 s"),
        (59.6, "1 min"),
        (3600 * 5 + 130, "5 h 2 min"),
        (86400 * 3 + 3600 * 4 + 5, "3 d 4 h"),
        (61, "1 min 1 s"),
    ],
)
def test_a_time_has_its_two_largest_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_command_that_makes_a_run_alone_is_comkd_distill() -> None:
    words = ["distill", "promptkd", "--dataset", "dtd", "--seed", "2", "--set", "selection=promptkd"]
    run = ReproducedRun([Choice("dtd", 1), Choice("dtd", 2)], 1, fresh=False, distill=words)
    assert run.alone == "comkd distill promptkd --dataset dtd --seed 2 --set selection=promptkd"
