"""How long the exported students of each size take for one image.

    python -m benchmarks.ablation.latency STUDY LATENCY.json

Exports the first seed's student of each size that is finished in STUDY by the best objective, in fp32 and int8, and
keeps what `comkd export --benchmark` measured with one thread. int8's gate is open, since figures of a graph that
misses it belong here too. Nothing else should run meanwhile.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.ablation.pairs import CIFAR10
from benchmarks.ablation.rows import BEST
from benchmarks.ablation.running import circumstances, environment
from comkd_cli.errors import ComkdError
from comkd_cli.files import write_text

OPEN_GATE = [
    word
    for limit in ("cosine_min=-1", "agreement_min_percent=0", "top1_loss_max_points=100")
    for word in ("--gate", f"int8.{limit}")
]


def row_of(student: str, objective: str = BEST) -> str:
    """The row of a student's size: the first student is the one of the objectives."""
    return objective if student == CIFAR10.student else f"{objective}_{student}"


def students_of(study: Path) -> dict[str, Path]:
    """The finished students by size."""
    found = {
        student: next(iter((study / "runs" / row_of(student)).glob("*/seed1/student.pt")), None)
        for student in CIFAR10.students
    }
    return {student: path for student, path in found.items() if path is not None}


def measure(study: Path, student_file: Path) -> dict[str, Any]:
    """Seconds for one image on one thread by precision, and int8's agreement with PyTorch in percent."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "bundle"
        options = ["--precision", "fp32", "--precision", "int8", "--benchmark", *OPEN_GATE, "--out", str(out)]
        command = [sys.executable, "-m", "comkd_cli", "export", str(student_file), *options]
        ended = subprocess.run(command, cwd=study, env=environment(), check=False)
        if ended.returncode:
            raise ComkdError("failed", path=student_file, found=f"exit code {ended.returncode}")
        manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    one_thread = [line for line in manifest["latency"] if line["threads"] == 1]
    return {
        "seconds": {line["name"]: line["seconds"] for line in one_thread},
        "int8_agreement_percent": manifest["precisions"]["int8"]["parity"]["top1_agreement_percent"],
        "parameters": manifest["parameters"],
        "multiply_adds": manifest["multiply_adds"],
    }


def main() -> None:
    """Measure every size and write the results."""
    study, out = map(Path, sys.argv[1:])
    sizes = {student: measure(study.resolve(), path.resolve()) for student, path in students_of(study).items()}
    write_text(out, json.dumps({"sizes": sizes, **circumstances()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
