"""Peak memory of a stage-1 step against the number of classes, with class prompts encoded in parts and at once.

    python -m benchmarks.teacher_memory [--arch ViT-S-32-alt] [--classes 100 1000] [--at-once 32] [--whole-up-to 100]

Each step (one batch of 8 images, forward and backward through all class prompts) runs in a process of its own.
Prints one JSON document: peak resident memory beyond that of the loaded models, in MiB, and the seconds of the step;
`whole` encodes all classes at once, as the reference code does, up to --whole-up-to classes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

STEP = """
import json, resource, sys, time, torch
from comkd_cli.models.backbones import build_clip
from comkd_cli.method.prompt_src import prompt_src_terms
from comkd_cli.recipe.model import Model
from comkd_cli.teachers.prompted import prompted_clip
arch, classes, at_once = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
clip = build_clip(Model(arch=arch))
prompted = prompted_clip(clip, vision_depth=9, text_depth=9, tokens=4)
tokens = prompted.tokens([f"thing number {n}" for n in range(classes)])
size = clip.preprocessing.size
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
frozen = torch.nn.functional.normalize(torch.randn(classes, clip.model.encode_text(tokens[:1]).shape[1]), dim=-1)
started = time.perf_counter()
output = prompted.module(torch.randn(8, 3, size, size), tokens, frozen, at_once)
terms = prompt_src_terms(output, torch.zeros(8, dtype=torch.int64), frozen, 25.0, 10.0, 1.0)
sum(terms.values()).backward()
print(json.dumps({"peak_mib": peak() - before, "seconds": time.perf_counter() - started}))
"""


def step(arch: str, classes: int, at_once: int) -> dict[str, float]:
    """One process's step."""
    command = [sys.executable, "-c", STEP, arch, str(classes), str(at_once)]
    measured: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return measured


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="ViT-S-32-alt")
    parser.add_argument("--classes", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--at-once", type=int, default=32)
    parser.add_argument("--whole-up-to", type=int, default=100)
    options = parser.parse_args()
    parts = {count: step(options.arch, count, options.at_once) for count in options.classes}
    whole = {count: step(options.arch, count, count) for count in options.classes if count <= options.whole_up_to}
    first, last = parts[min(parts)], parts[max(parts)]
    document = {
        "arch": options.arch,
        "classes_at_once": options.at_once,
        "parts": parts,
        "whole": whole,
        "most_classes_over_fewest_peak": last["peak_mib"] / first["peak_mib"],
    }
    print(json.dumps(document, indent=2))


if __name__ == "__main__":
    main()
