"""Run as a process of its own: prints torch's report on itself and on the devices, as JSON."""

from __future__ import annotations

import json
import warnings
from typing import Any


def facts() -> dict[str, Any]:
    """Builds, devices, and whether the best device computes; `problems` has what failed."""
    import torch

    found: dict[str, Any] = {
        "torch": str(torch.__version__),
        "cuda_build": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "devices": [],
        "problems": [],
    }
    with warnings.catch_warnings(record=True) as caught:  # torch warns of a driver that is too old
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            for index in range(torch.cuda.device_count()):
                free, total = torch.cuda.mem_get_info(index)
                name = torch.cuda.get_device_name(index)
                found["devices"].append({"name": name, "free_bytes": free, "total_bytes": total})
            found["device"] = "cuda"
        else:
            found["device"] = "mps" if torch.backends.mps.is_available() else "cpu"
    found["problems"] += [str(warning.message).splitlines()[0] for warning in caught]
    try:
        _compute(found["device"])
    except Exception as error:  # of many types, such as a GPU without a kernel in this build
        found["failed"] = f"{found['device']} cannot compute: {str(error).splitlines()[0]}"
    try:
        import torchvision

        torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)  # fails if the builds do not match
    except Exception as error:
        found["failed"] = f"torchvision cannot be used: {str(error).splitlines()[0]}"
    return found


def _compute(device: str) -> None:
    """A forward and a backward pass of a convolution."""
    import torch

    image = torch.ones(1, 3, 8, 8, device=device, requires_grad=True)
    torch.nn.Conv2d(3, 4, 3).to(device)(image).sum().backward()


if __name__ == "__main__":
    print(json.dumps(facts()))  # noqa: T201 - the answer to the process that started this one
