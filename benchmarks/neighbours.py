"""Two processes of comkd on the same cores: each kind of work alone and beside another process of the same work.

    python -m benchmarks.neighbours [--works teacher student cifar vit graph] [--seconds 8] [--rounds 3]
                                    [--spin-count N]

Images per second, as the libraries' own settings have them (`default`: every core's threads, which spin while they
wait) and as comkd has them (`comkd`, see docs/performance.md), in turn. The works: stage 1 and stage 2 of the recipe
`digits` by their own training loops (stage 2 with a teacher of random weights); steps of the student of `cifar10`,
batch 128, and of a ViT-B/16 student with prompts, batch 4, on tensors in memory; and an onnxruntime session of the size
of a ViT-Ti/16, as a bundle starts it.
`--spin-count` gives GOMP_SPINCOUNT another value than comkd's. Prints one JSON document: medians over the rounds, and
the medians of two ratios of each round: `alone`, comkd over default, and `together`, both processes' sum over one
process alone, both with comkd's settings.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comkd_cli.edge.machine import cpu_name, usable_cores
from comkd_cli.runtime.cores import sharing_cores

if TYPE_CHECKING:
    from accelerate import Accelerator

    from comkd_cli.data.source import Source
    from comkd_cli.events import Event
    from comkd_cli.recipe import Recipe
    from comkd_cli.recipe.model import Student
    from comkd_cli.teachers.loading import ReadyTeacher

SETTINGS = ("default", "comkd")
WARM_UP_SECONDS = 2.0
VIT_BATCH = 4
VARIABLES = ("OMP_NUM_THREADS", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_WAIT_POLICY")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--works", nargs="+", choices=WORKS, default=list(WORKS))
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--spin-count", type=int)
    parser.add_argument("--child", choices=WORKS, help=argparse.SUPPRESS)
    parser.add_argument("--setting", choices=SETTINGS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        _work(options.child, options.setting, options.seconds)
        return
    document: dict[str, Any] = {"cpu": cpu_name(), "cores": usable_cores(), "spin_count": options.spin_count}
    for work in options.works:
        document[work] = compared([_round(work, options) for _ in range(options.rounds)])
    print(json.dumps(document, indent=2))


def compared(rounds: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Medians over rounds, each of which has images per second by setting and number of processes."""
    table = {
        setting: {count: statistics.median(found[setting][count] for found in rounds) for count in ("alone", "two")}
        for setting in SETTINGS
    }
    return {
        "images_per_second": table,
        "alone": statistics.median(found["comkd"]["alone"] / found["default"]["alone"] for found in rounds),
        "together": statistics.median(found["comkd"]["two"] / found["comkd"]["alone"] for found in rounds),
        "together_by_default": statistics.median(
            found["default"]["two"] / found["default"]["alone"] for found in rounds
        ),
    }


def _round(work: str, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    return {
        setting: {"alone": _run(work, setting, 1, options), "two": _run(work, setting, 2, options)}
        for setting in SETTINGS
    }


def _run(work: str, setting: str, count: int, options: argparse.Namespace) -> float:
    """Images per second of so many processes together."""
    env = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    if setting == "default":
        env["OMP_NUM_THREADS"] = str(os.cpu_count())
    elif options.spin_count is not None:
        env["GOMP_SPINCOUNT"] = str(options.spin_count)
    command = [sys.executable, "-m", "benchmarks.neighbours", "--child", work, "--setting", setting]
    command += ["--seconds", str(options.seconds)]
    children = [
        subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(count)
    ]
    for child in children:
        assert child.stdout is not None
        child.stdout.readline()  # it has imported what it needs
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
    answers = [child.communicate()[0] for child in children]
    return sum(json.loads(answer) for answer in answers)


class _Done(Exception):
    """The time of a measurement is over."""


class _Watch:
    """Counts images over the seconds after a warm-up, and ends the work a little later than that."""

    def __init__(self, seconds: float) -> None:
        self._start = time.monotonic() + WARM_UP_SECONDS
        self._end = self._start + seconds
        self._seen: list[tuple[float, int]] = []

    def count(self, images: int) -> None:
        """So many images are done since the start. Raises _Done once the time is over."""
        now = time.monotonic()
        if now >= self._start:
            self._seen.append((now, images))
        if now > self._end + 1 and len(self._seen) > 1:
            raise _Done

    def rate(self) -> float:
        """Images per second within the time; a step that is longer than the time counts in full."""
        within = [seen for seen in self._seen if seen[0] <= self._end]
        (first, before), (last, after) = self._seen[0], (within if len(within) > 1 else self._seen)[-1]
        return (after - before) / (last - first)


def _work(name: str, setting: str, seconds: float) -> None:
    """The side of a child process."""
    if setting == "default":
        _measure(name, setting, seconds)
        return
    with sharing_cores():
        _measure(name, setting, seconds)


def _measure(name: str, setting: str, seconds: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        work = WORKS[name](setting, Path(folder))
        print("ready", flush=True)
        sys.stdin.readline()
        watch = _Watch(seconds)
        try:
            work(watch.count)
        except _Done:
            print(json.dumps(watch.rate()))


Work = Callable[[Callable[[int], None]], None]
"""Works and passes the number of images so far, until that raises _Done."""


def _digits(setting: str) -> tuple[Recipe, Source, Accelerator]:
    """The recipe `digits` with epochs for any measurement; by default its images are prepared between the steps."""
    from comkd_cli.data.digits import digits_source
    from comkd_cli.recipe import load_recipe
    from comkd_cli.training.accelerator import make_accelerator

    changes = ["teacher.adapt.epochs=1000", "optim.epochs=1000", "evaluate_every_epochs=0"]
    recipe = load_recipe("digits", changes + (["data.workers=0"] if setting == "default" else []))
    return recipe, digits_source(), make_accelerator("fp32")


def _listening(count: Callable[[int], None]) -> Callable[[Event], None]:
    from comkd_cli.events import Progress

    def report(event: Event) -> None:
        if isinstance(event, Progress):
            count(event.done)

    return report


def _teacher(setting: str, folder: Path) -> Work:
    from comkd_cli.flows import adapt

    recipe, source, accelerator = _digits(setting)
    stage = adapt.stage_1(recipe, source, folder, folder)

    def work(count: Callable[[int], None]) -> None:
        adapt.TeacherPreparation(stage, accelerator, _listening(count), "").prepare()

    return work


def _student(setting: str, folder: Path) -> Work:
    from comkd_cli.flows import distill
    from comkd_cli.teachers.loading import build_teacher

    recipe, source, accelerator = _digits(setting)

    class Untrained:
        def prepare(self) -> ReadyTeacher:
            return build_teacher(recipe.teacher, source.class_names, source.wording, accelerator.device)

    run = distill.Run(recipe, "digits", source, folder, {})

    def work(count: Callable[[int], None]) -> None:
        distill.distill(run, Untrained(), accelerator, _listening(count), "")

    return work


def _cifar(setting: str, _folder: Path) -> Work:
    from comkd_cli.recipe import load_recipe

    recipe = load_recipe("cifar10", [])
    return _steps_of(recipe.student, recipe.optim.batch_size, setting)


def _vit(setting: str, _folder: Path) -> Work:
    from comkd_cli.recipe.model import Student

    return _steps_of(Student(arch="ViT-B-16", weights="random", train="prompts"), VIT_BATCH, setting)


def _steps_of(settings: Student, batch: int, setting: str) -> Work:
    """Steps of a student of random weights on the same images, in as many threads as a run would take."""
    import torch

    from comkd_cli.method import student as method
    from comkd_cli.models.backbones import build_image_tower
    from comkd_cli.models.costs import step_multiply_adds
    from comkd_cli.recipe.model import EduAttention, Model
    from comkd_cli.runtime.cores import step_threads
    from comkd_cli.runtime.devices import limited_threads
    from comkd_cli.training.accelerator import make_accelerator

    make_accelerator("fp32")
    tower = build_image_tower(Model(arch=settings.arch, config=settings.config))
    size = tower.preprocessing.size
    vectors = torch.nn.functional.normalize(torch.randn(100, 512), dim=-1)
    student = method.Student(tower.module, tower.width, vectors, torch.tensor(100.0), settings, EduAttention()).train()
    optimizer = torch.optim.SGD([each for each in student.parameters() if each.requires_grad], lr=0.01)
    images = torch.randn(batch, 3, size, size)
    multiply_adds = step_multiply_adds(batch, (student.backbone, size))

    def work(count: Callable[[int], None]) -> None:
        with limited_threads(step_threads(multiply_adds) if setting == "comkd" else None):
            for done in _steps():
                student(images).logits.square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                count(done * batch)

    return work


def _steps() -> Iterator[int]:
    done = 0
    while True:
        done += 1
        yield done


def _graph(setting: str, _folder: Path) -> Work:
    import numpy as np
    import onnxruntime

    from comkd_cli.edge.session import start_session

    if setting == "comkd":
        session = start_session(_layers(), threads=None)
    else:
        session = onnxruntime.InferenceSession(_layers(), providers=["CPUExecutionProvider"])
    image = np.random.default_rng(0).standard_normal((1, 197, 192), dtype=np.float32)

    def work(count: Callable[[int], None]) -> None:
        for done in _steps():
            session.run(None, {"tokens": image})
            count(done)

    return work


def _layers(width: int = 192, layers: int = 12, tokens: int = 197) -> bytes:
    """A graph with the products of a ViT-Ti/16's feed-forward layers, random weights."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    random, nodes, weights, last = np.random.default_rng(0), [], [], "tokens"
    for layer in range(layers):
        for part, shape in (("in", (width, 4 * width)), ("out", (4 * width, width))):
            name = f"{part}{layer}"
            values = (random.standard_normal(shape) / shape[0] ** 0.5).astype(np.float32)
            weights.append(numpy_helper.from_array(values, f"{name}.weight"))
            nodes.append(helper.make_node("MatMul", [last, f"{name}.weight"], [name]))
            nodes.append(helper.make_node("Relu" if part == "in" else "Softmax", [name], [f"{name}.then"]))
            last = f"{name}.then"
    inputs = [helper.make_tensor_value_info("tokens", TensorProto.FLOAT, [1, tokens, width])]
    outputs = [helper.make_tensor_value_info(last, TensorProto.FLOAT, None)]
    graph = helper.make_graph(nodes, "layers", inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())


WORKS: dict[str, Callable[[str, Path], Work]] = {
    "teacher": _teacher,
    "student": _student,
    "cifar": _cifar,
    "vit": _vit,
    "graph": _graph,
}


if __name__ == "__main__":
    main()
