from collections.abc import Iterator

import pytest
import torch
from accelerate.state import AcceleratorState

from comkd_cli.errors import TrainingError
from comkd_cli.training.accelerator import make_accelerator


@pytest.fixture(autouse=True)
def any_precision() -> Iterator[None]:
    """accelerate keeps the precision of a process's first accelerator for all that follow."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_half_precision_without_a_gpu_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has the GPU that the message asks for")
    with pytest.raises(TrainingError) as caught:
        make_accelerator("fp16")
    assert (caught.value.field, caught.value.found) == ("precision", "fp16")
