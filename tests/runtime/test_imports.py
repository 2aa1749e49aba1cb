"""What commands that train nothing do not import, and that the commands that need it do."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Imported by some commands and by none of these.
UNUSED = [
    "jinja2",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "scipy",
    "sklearn",
    "torch._dynamo",
    "torch._inductor",
    "torch.distributed.fsdp",
    "transformers",
    "webdataset",
]
AFTER_A_PLAN = """
import json, sys
from comkd_cli.cli.app import main

main(["distill", "digits", "--dry-run"], standalone_mode=False)
import comkd_cli.flows.adapt, comkd_cli.flows.distill, comkd_cli.flows.evaluate, comkd_cli.flows.report
print(json.dumps([name for name in json.loads(sys.argv[1]) if name in sys.modules]))
"""
AFTER_THE_CONTEXT = """
import json, sys
import torch
from comkd_cli.runtime.imports import COMPILER, defer_compiler, without_compiler

defer_compiler()
import timm.layers, torchvision
from torch import nn
from comkd_cli.models.costs import multiply_adds

net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 2))
first = multiply_adds(net, 8)
deferred = COMPILER not in sys.modules
with without_compiler():
    torch.randn(2, 2, device="meta") / 3
    stood_in = sys.modules[COMPILER]
    from torch._dynamo.utils import counters  # more than the stand-in has
real = sys.modules[COMPILER]

@timm.layers.disable_compiler
def added(value):
    return value + 1

compiled = torch.compile(lambda value: added(value) * 2, backend="eager")
print(json.dumps({
    "deferred": deferred,
    "stood_in": stood_in is not real,
    "real": real.__spec__.origin is not None,
    "as_before": multiply_adds(net, 8) == first == 36 * 4 * 27 + 4 * 36 * 2,
    "asked_for": sys.modules["torchvision.ops.roi_align"].is_compile_supported("cpu"),
    "expected": sys.modules["torch._dynamo.utils"].is_compile_supported("cpu"),
    "compiled": compiled(torch.ones(1)).item(),
}))
"""


def answer(script: str, *arguments: str) -> object:
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=200)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_plan_imports_nothing_that_it_does_not_use() -> None:
    assert answer(AFTER_A_PLAN, json.dumps(UNUSED)) == []


@pytest.mark.slow
def test_the_compiler_is_there_for_those_who_use_it() -> None:
    found = answer(AFTER_THE_CONTEXT)
    assert isinstance(found, dict)
    assert found.pop("asked_for") == found.pop("expected")
    assert found == {"deferred": True, "stood_in": True, "real": True, "as_before": True, "compiled": 4.0}
