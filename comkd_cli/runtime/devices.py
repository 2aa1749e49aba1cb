"""The device that accelerate would train on, and what devices and worker processes fail of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import PartialState

from comkd_cli.errors import TrainingError
from comkd_cli.runtime import collectives, ranks
from comkd_cli.runtime.allocator import keep_freed_memory

FOR_MEMORY = "lower the batch size, or use precision bf16 or fp16"


def needs_cpu() -> bool:
    """Whether accelerate must be told to use the CPU: with several processes it does not see for itself."""
    return ranks.world_size() > 1 and not torch.accelerator.is_available()


def best_device() -> torch.device:
    """CUDA, MPS or another accelerator where there is one, else the CPU; ACCELERATE_USE_CPU=1 forces it.

    On a CPU the memory allocator is set up for work on large blocks.
    """
    limits = {"timeout": collectives.timeout()} if ranks.world_size() > 1 else {}
    device: torch.device = PartialState(cpu=needs_cpu(), **limits).device
    if device.type == "cpu":
        keep_freed_memory()
    return device


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A CPU tensor on a device; to a GPU it is copied from page-locked memory, while other work goes on."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


@contextmanager
def failures_explained(for_memory: str = FOR_MEMORY) -> Iterator[None]:
    """Turn a lack of memory, or the death of a worker process, into an error with a remedy.

    for_memory: what to do where memory is short. Raises TrainingError.
    """
    try:
        yield
    except MemoryError as error:
        raise TrainingError(f"out of memory; {for_memory}") from error
    except RuntimeError as error:
        said = str(error)
        # CUDA has a class of its own; MPS and the CPU say it in words.
        if isinstance(error, torch.OutOfMemoryError) or "out of memory" in said or "can't allocate memory" in said:
            raise TrainingError(f"out of memory; {for_memory} ({said.splitlines()[0]})") from error
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise TrainingError(
                f"compile: torch.compile failed ({said.strip().splitlines()[0]}); leave `compile` off, or install what "
                "it needs, a C++ compiler on a CPU"
            ) from error
        if (peer := collectives.peer_error(error)) is not None:
            raise peer from error
        if "Expected to have finished reduction" in said:
            raise TrainingError(
                "the image tower has weights that take no part in its features, which several processes can't train; "
                "use one process, or student.train: prompts"
            ) from error
        if "DataLoader worker (pid" in said or "Pin memory thread exited" in said:  # the latter with a GPU
            raise TrainingError(
                f"a process that decodes images died ({said.splitlines()[0]}); it may have lacked memory or shared "
                "memory: use fewer with data.workers, or none with data.workers=0"
            ) from error
        if "in DataLoader worker process" in said and "/torch_" in said:  # the name of a file of shared memory
            raise TrainingError(
                f"there is not enough shared memory for decoded images ({said.strip().splitlines()[-1]}); enlarge "
                "/dev/shm, or set data.workers=0"
            ) from error
        raise
