"""Runs of comkd that are killed and rerun, against the same runs undisturbed.

    python -m benchmarks.kills --kills 1000 --seed 1 [--first CASE] [--kinds distill evaluate ...] [--out FILE]

A case is a small real command (distill with a trained teacher, evaluate, export, predict --csv, datasets fetch, report)
that is killed by SIGKILL up to four times and rerun after each kill until it ends. A kill comes at a random instant of
the run, just before one of its file operations (open, rename, fsync, mkdir, remove and the like), or within 3 ms after
one began. Whatever the case left must equal what an undisturbed run leaves, byte for byte apart from the fields that
benchmarks/kills/states.py names; no process and no temporary file may stay. What a case does follows from the seed and
its number alone, so `--seed S --first CASE --kills 1` repeats it. Prints one JSON document and exits with 1 if it has
findings. Linux only; needs the development dependencies. Each process starts by a fork of one that has imported torch.
"""

from benchmarks.kills.harness import main

if __name__ == "__main__":
    raise SystemExit(main())
