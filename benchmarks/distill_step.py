"""A step of stage 2 by the reference procedure, by comkd, and by the student alone, side by side.

    python -m benchmarks.distill_step --teacher ViT-L-14 --student ViT-B-16 --classes 100 --batch 8 --steps 3

Random weights. Seconds per image of: the reference code's procedure, in which the teacher encodes the images and
every class prompt again at each step; class vectors made once; the teacher's features read from a warm cache; and
the bare forward, backward and optimiser step of the same student on tensors that are ready. The ways take turns.
Prints one JSON document, with the ratios.
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

from comkd_cli.asked_teacher import AskedTeacher
from comkd_cli.backbones import build_clip, build_image_tower
from comkd_cli.data.loaders import Batch
from comkd_cli.method.objective import loss_terms
from comkd_cli.method.student import Student
from comkd_cli.method.teacher import Teacher
from comkd_cli.recipe.model import EduAttention, Loss, Model, Sgd
from comkd_cli.recipe.model import Student as StudentSettings
from comkd_cli.teacher_cache import CacheKey, TeacherCache
from comkd_cli.teachers import prompted_clip
from comkd_cli.training import make_accelerator, make_optimizer


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="ViT-L-14")
    parser.add_argument("--student", default="ViT-B-16")
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        ways = make_ways(options.teacher, options.student, options.classes, options.batch, Path(folder))
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for step in range(options.steps + 1):
            for name, way in ways.items():
                started = time.perf_counter()
                way()
                if step:  # the first one pays for what is made once
                    seconds[name].append(time.perf_counter() - started)
    per_image = {name: statistics.median(measured) / options.batch for name, measured in seconds.items()}
    warm = per_image["cache_warm"]
    document = {
        **{f"{name}_seconds_per_image": value for name, value in per_image.items()},
        "reference_over_cache_warm": per_image["reference"] / warm,
        "class_vectors_once_over_cache_warm": per_image["class_vectors_once"] / warm,
        "cache_warm_over_student_only": warm / per_image["student_only"],
        "teacher": options.teacher,
        "student": options.student,
        "classes": options.classes,
        "batch": options.batch,
        "steps": options.steps,
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(document, indent=2))


def make_ways(
    teacher_arch: str, student_arch: str, classes: int, batch: int, folder: Path
) -> dict[str, Callable[[], None]]:
    """Each way as a function that makes one step."""
    make_accelerator("fp32")  # which sets the memory allocator up, as a run does
    prompted = prompted_clip(build_clip(Model(arch=teacher_arch)), vision_depth=9, text_depth=9, tokens=4)
    module = prompted.module.eval()
    tokens = prompted.tokens([f"thing number {number}" for number in range(classes)])
    dim = module.encode_images(torch.zeros(1, 3, 224, 224)).shape[1]
    vectors = torch.nn.functional.normalize(torch.randn(classes, dim), dim=-1)
    teacher = Teacher(module.vision, vectors, module.logit_scale)
    tower = build_image_tower(Model(arch=student_arch))
    settings = StudentSettings(arch=student_arch, weights="random", train="prompts")
    student = Student(tower.module, tower.width, vectors, module.logit_scale, settings, EduAttention()).train()
    optimizer = make_optimizer(student, Sgd(), {})
    cache = TeacherCache(folder, CacheKey("0" * 64, batch, dim, 1, "fp16"))
    asked = AskedTeacher(teacher, cache)
    size = tower.preprocessing.size
    images = torch.randn(batch, 3, size, size)
    indices = torch.arange(batch)
    loss = Loss()
    cache.write(0, np.arange(batch), teacher.encode(images).numpy())
    warm = Batch((torch.empty(0), images), None, indices, asked=torch.zeros(batch, dtype=torch.bool))

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
