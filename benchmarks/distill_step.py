"""A step of stage 2 by the reference procedure, by comkd, and by the student alone, side by side.

    python -m benchmarks.distill_step --teacher ViT-L-14 --student ViT-B-16 --classes 100 --batch 8 --steps 3
    python -m benchmarks.distill_step --batch 64 --steps 20 --precision bf16 --compile      # on a GPU

Random weights, on the GPU if there is one. Seconds per image of: the reference code's procedure, in which the teacher
encodes the images and every class prompt at each step; class vectors computed once; the teacher's features read from a
warm cache; and only the forward, backward and optimiser step of the same student on tensors in memory. The variants
alternate. Prints one JSON document with the ratios; on a GPU also its peak memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from comkd_cli.data.loaders import Batch
from comkd_cli.method.objective import loss_terms
from comkd_cli.method.student import Student
from comkd_cli.method.teacher import Teacher
from comkd_cli.models.backbones import build_clip, build_image_tower
from comkd_cli.recipe.model import EduAttention, Loss, Model, Sgd
from comkd_cli.recipe.model import Student as StudentSettings
from comkd_cli.teachers.cached import CachedTeacher
from comkd_cli.teachers.feature_cache import CacheKey, TeacherCache
from comkd_cli.teachers.prompted import prompted_clip
from comkd_cli.training.accelerator import make_accelerator
from comkd_cli.training.optimizer import make_optimizer


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="ViT-L-14")
    parser.add_argument("--student", default="ViT-B-16")
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument(
        "--compile", action="store_true", help="compile the towers, as `compile: true` of a recipe does"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        accelerator = make_accelerator(options.precision)
        ways = make_ways(options, accelerator, Path(folder))
        peaks: dict[str, int] = {}
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for step in range(options.steps + 1):
            for name, way in ways.items():
                reset_peak(accelerator.device)
                started = time.perf_counter()
                with accelerator.autocast():
                    way()
                wait_for(accelerator.device)
                if step:  # the first step also allocates and compiles
                    seconds[name].append(time.perf_counter() - started)
                    peaks[name] = peak_bytes(accelerator.device)
    per_image = {name: statistics.median(measured) / options.batch for name, measured in seconds.items()}
    warm = per_image["cache_warm"]
    document = {
        **{f"{name}_seconds_per_image": value for name, value in per_image.items()},
        "reference_over_cache_warm": per_image["reference"] / warm,
        "class_vectors_once_over_cache_warm": per_image["class_vectors_once"] / warm,
        "cache_warm_over_student_only": warm / per_image["student_only"],
        "cache_warm_images_per_second": 1 / warm,
        **vars(options),
        "threads": torch.get_num_threads(),
        "device": device_name(accelerator.device),
    }
    if accelerator.device.type == "cuda":
        document["peak_gpu_mib"] = {name: peak / 2**20 for name, peak in peaks.items()}
    print(json.dumps(document, indent=2))


def device_name(device: torch.device) -> str:
    """The name of the GPU, or `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has finished its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device: torch.device) -> None:
    """Reset the peak memory of a GPU."""
    wait_for(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    """The peak memory of a GPU, with the models of all variants."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def make_ways(options: argparse.Namespace, accelerator: Accelerator, folder: Path) -> dict[str, Callable[[], None]]:
    """Each variant as a function that makes one step."""
    device, batch = accelerator.device, options.batch
    prompted = prompted_clip(build_clip(Model(arch=options.teacher)), vision_depth=9, text_depth=9, tokens=4)
    module = prompted.module.eval().to(device)
    tokens = prompted.tokens([f"thing number {number}" for number in range(options.classes)]).to(device)
    dim = module.encode_images(torch.zeros(1, 3, 224, 224, device=device)).shape[1]
    vectors = torch.nn.functional.normalize(torch.randn(options.classes, dim, device=device), dim=-1)
    teacher = Teacher(module.vision, vectors, module.logit_scale)
    tower = build_image_tower(Model(arch=options.student))
    settings = StudentSettings(arch=options.student, weights="random", train="prompts")
    student = (
        Student(tower.module, tower.width, vectors, module.logit_scale, settings, EduAttention()).to(device).train()
    )
    if options.compile:
        student.backbone.compile()
        teacher.image_tower.compile()
    optimizer = make_optimizer(student, Sgd(), {})
    cache = TeacherCache(folder, CacheKey("0" * 64, batch, dim, 1, "fp16"))
    asked = CachedTeacher(teacher, cache)
    size = tower.preprocessing.size
    images = torch.randn(batch, 3, size, size, device=device)
    indices = torch.arange(batch)
    loss = Loss()
    cache.put(0, np.arange(batch), teacher.encode(images).cpu().numpy())
    cache.mark(0, np.arange(batch))
    warm = Batch((torch.empty(0), images), None, indices, uncached=torch.zeros(batch, dtype=torch.bool))

    def learn(answered) -> None:  # type: ignore[no-untyped-def]
        sum(loss_terms(student(images), answered, loss).values()).backward()  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def reference_answer():  # type: ignore[no-untyped-def]
        teacher.class_vectors.copy_(module.encode_classes(tokens))
        return teacher(images)

    ready = teacher(images)
    return {
        "reference": lambda: learn(reference_answer()),
        "class_vectors_once": lambda: learn(teacher(images)),
        "cache_warm": lambda: learn(asked(warm)),
        "student_only": lambda: learn(ready),
    }


if __name__ == "__main__":
    main()
