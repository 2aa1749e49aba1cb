"""The device that accelerate trains on, and common device and worker failures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from accelerate import PartialState

from comkd_cli.errors import TrainingError
from comkd_cli.runtime import collectives, ranks
from comkd_cli.runtime.allocator import keep_freed_memory

MEMORY_REMEDY = "lower the batch size, or use precision bf16 or fp16"

Explanation = Callable[[RuntimeError], TrainingError | None]
"""From an error to one that a user can act on; None for an error that it does not know."""
_EXPLANATIONS: list[Explanation] = []


def needs_cpu() -> bool:
    """Whether to set accelerate to the CPU: with several processes it does not detect that there is no GPU."""
    return ranks.world_size() > 1 and not torch.accelerator.is_available()


def best_device() -> torch.device:
    """CUDA, MPS or another accelerator if available, else the CPU; ACCELERATE_USE_CPU=1 forces the CPU.

    On a CPU the memory allocator is tuned for large blocks.
    """
    limits = {"timeout": collectives.timeout()} if ranks.world_size() > 1 else {}
    device: torch.device = PartialState(cpu=needs_cpu(), **limits).device
    if device.type == "cpu":
        keep_freed_memory()
    return device


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A CPU tensor on a device; to a GPU it is copied asynchronously, from page-locked memory."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def to_host(tensor: torch.Tensor) -> Callable[[], np.ndarray]:
    """Start to copy a tensor to the CPU; the result waits for the copy and returns it as an array.

    A GPU copies to page-locked memory while it computes what follows.
    """
    if tensor.device.type != "cuda":
        return lambda: tensor.cpu().numpy()
    copied = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    copied.copy_(tensor, non_blocking=True)
    done = torch.cuda.Event()  # type: ignore[no-untyped-call]
    done.record()

    def wait() -> np.ndarray:
        done.synchronize()
        return copied.numpy()

    return wait


@contextmanager
def limited_threads(threads: int | None) -> Iterator[None]:
    """A context in which torch uses this many threads on a CPU; None: as many as before."""
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def add_explanation(explanation: Explanation) -> None:
    """Let `failures_explained` try this one first: for errors that a signal handler raises wherever Python is."""
    _EXPLANATIONS.append(explanation)


@contextmanager
def failures_explained(memory_remedy: str = MEMORY_REMEDY) -> Iterator[None]:
    """Turn common device and worker failures into errors with a remedy.

    memory_remedy: what to do when memory runs out. Raises TrainingError.
    """
    try:
        yield
    except MemoryError as error:
        raise TrainingError("out of memory", remedy=memory_remedy) from error
    except RuntimeError as error:
        if (explained := _explained(error, memory_remedy)) is None:
            raise
        raise explained from error


def _explained(error: RuntimeError, memory_remedy: str) -> TrainingError | None:
    """The error that a user can act on; None for any other, such as a bug."""
    if found := next(filter(None, (explain(error) for explain in _EXPLANATIONS)), None):
        return found
    message = str(error).strip()
    lines = message.splitlines() or [""]
    first, last = lines[0].rstrip("."), lines[-1].rstrip(".")
    # CUDA has a class of its own; MPS and the CPU have only the message.
    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in message or "can't allocate memory" in message:
        return TrainingError("out of memory", found=first, remedy=memory_remedy)
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return TrainingError(
            "torch.compile failed",
            field="compile",
            found=first,
            remedy="set compile: false, or install the requirements of torch.compile (on a CPU, a C++ compiler)",
        )
    if (peer := collectives.peer_error(error)) is not None:
        return peer
    if "Expected to have finished reduction" in message:
        return TrainingError(
            "the image tower has weights that do not contribute to its features, which several processes cannot train",
            remedy="use one process, or student.train: prompts",
        )
    if "DataLoader worker (pid" in message or "Pin memory thread exited" in message:  # the latter with a GPU
        return TrainingError(
            "a process that decodes images died, perhaps for lack of memory or shared memory",
            field="data.workers",
            found=first,
            remedy="use fewer with data.workers, or none with data.workers=0",
        )
    if "in DataLoader worker process" in message and "/torch_" in message:  # the name of a file of shared memory
        return TrainingError(
            "not enough shared memory for decoded images",
            field="data.workers",
            found=last,
            remedy="enlarge /dev/shm, or set data.workers=0",
        )
    return None
