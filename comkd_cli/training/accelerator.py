"""The device, precision and processes of a run, as accelerate sees them."""

from __future__ import annotations

from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.state import AcceleratorState

from comkd_cli.errors import TrainingError
from comkd_cli.runtime import collectives, ranks
from comkd_cli.runtime.allocator import keep_freed_memory
from comkd_cli.runtime.devices import needs_cpu


def make_accelerator(precision: str) -> Accelerator:
    """accelerate's view of the machine: device, autocast, gradient scaling.

    precision: `fp32`, `bf16` or `fp16`. Several processes wait for one another as long as collectives.set_timeout
    says. Raises TrainingError if the machine lacks the precision, or the launcher's processes are not accelerate's.
    """
    handlers = [
        InitProcessGroupKwargs(timeout=collectives.timeout()),
        # Batch norms share their statistics, so that their buffers are equal without a broadcast.
        DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
    ]
    mixed = "no" if precision == "fp32" else precision
    if AcceleratorState._shared_state.get("_mixed_precision", mixed) != mixed:
        AcceleratorState._reset_state()  # accelerate keeps the precision of a process's first run for all that follow
    try:
        accelerator = Accelerator(mixed_precision=mixed, cpu=needs_cpu(), kwargs_handlers=handlers)
    except (ValueError, RuntimeError) as error:
        raise TrainingError(
            f"this machine does not support it ({error})", field="precision", found=precision
        ) from error
    if precision == "fp16" and accelerator.device.type == "cpu":
        # accelerate would train in fp32 and not say so.
        raise TrainingError("needs a GPU", field="precision", found="fp16", remedy="use bf16 or fp32 on a CPU")
    if accelerator.num_processes != ranks.world_size():
        raise TrainingError(
            f"the launcher reports {ranks.world_size()} processes, but accelerate uses {accelerator.num_processes}",
            remedy="start comkd with torchrun or `accelerate launch`",
        )
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    return accelerator
