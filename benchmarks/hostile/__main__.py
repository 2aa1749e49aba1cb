"""Gives hostile files to the readers of comkd, and prints what they did with them.

    python -m benchmarks.hostile --inputs 2000 --seed 1 [--kinds recipe image ...] [--jobs 2] [--log FILE.jsonl]
    python -m benchmarks.hostile --inputs 1 --first NUMBER --kinds KIND --seed 1

An input is one file or folder of a kind, such as a recipe or a checkpoint, that its seed, kind and number determine. It
is in order if it is read, or refused with an error of comkd or of click. A traceback, ten seconds of the processor, a
minute of the clock, a GiB of memory, a program that is started, a connection to a host, a payload that is executed, a
file written anywhere but in the input's own folder, or a process that dies is a finding; the second command repeats it.
Prints one JSON document; exit status 1 where there are findings. With --log, blocks of 1,000 inputs are added to a file
as they are done, and a run with the same file, seed and kinds skips them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.hostile.kinds import KINDS
from benchmarks.hostile.running import Block

BLOCK_INPUTS = 1000


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the inputs and print what they did; returns 1 where there are findings."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(1)
    done = _read_log(options.log, options.seed, options.kinds) if options.log else {}
    last = options.first + options.inputs
    blocks = []
    for first in range(options.first, last, BLOCK_INPUTS):
        inputs = min(BLOCK_INPUTS, last - first)
        if (first, inputs) not in done:
            tally = Block(options.seed, options.kinds, first, inputs, min(options.jobs, inputs)).run()
            about = {"seed": options.seed, "kinds": options.kinds, "first": first, "inputs": inputs}
            done[first, inputs] = {**about, **tally.plain()}
            if options.log:
                with options.log.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(done[first, inputs]) + "\n")
        blocks.append(done[first, inputs])
    document = _summary(blocks)
    print(json.dumps(document, indent=2))
    return 1 if document["findings"] else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.hostile", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kinds", nargs="+", choices=sorted(KINDS), default=list(KINDS), metavar="KIND")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes; default: at most 2")
    parser.add_argument("--first", type=int, default=0, help="the number of the first input; default: 0")
    parser.add_argument("--log", type=Path, metavar="FILE", help="add each block of inputs to this file, and resume")
    return parser


def _read_log(path: Path, seed: int, kinds: Sequence[str]) -> dict[tuple[int, int], dict[str, Any]]:
    """The blocks of a log that belong to a seed and its kinds, by their first input and their number of inputs."""
    if not path.exists():
        return {}
    blocks = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    own = [block for block in blocks if block["seed"] == seed and block["kinds"] == list(kinds)]
    return {(block["first"], block["inputs"]): block for block in own}


def _summary(blocks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All blocks as one: counts and the worst of each kind, and every finding."""
    names = sorted({name for block in blocks for name in block["outcomes"]})
    outcomes = {name: Counter[str]() for name in names}
    for block in blocks:
        for name, counts in block["outcomes"].items():
            outcomes[name].update(counts)
    totals: Counter[str] = sum(outcomes.values(), Counter())
    seconds = sum(block["seconds"] for block in blocks)

    def worst(field: str) -> dict[str, float]:
        return {name: max(block[field].get(name, 0.0) for block in blocks) for name in names}

    return {
        "inputs": sum(block["inputs"] for block in blocks),
        "seed": blocks[0]["seed"],
        "seconds": round(seconds, 1),
        "outcomes": dict(totals),
        "by_kind": {name: dict(counts) for name, counts in outcomes.items()},
        "slowest_seconds": worst("slowest_seconds"),
        "most_mebibytes": worst("most_mebibytes"),
        "findings": [finding for block in blocks for finding in block["findings"]],
    }


if __name__ == "__main__":
    sys.exit(main())
