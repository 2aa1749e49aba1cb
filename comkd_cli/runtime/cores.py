"""How several processes share the cores: threads that wait soon sleep, and small models get few threads."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from comkd_cli.runtime import ranks

THREADS = "OMP_NUM_THREADS"
SPIN_COUNT = "3000"
"""Rounds that a thread of GNU OpenMP spins for before it sleeps, 0.15 ms on an EPYC; its own default is 300,000."""
SPIN_MILLISECONDS = "1"
"""The same for the OpenMP of LLVM and Intel, whose default is 200."""
LEAST_PER_THREAD = 250_000_000
"""Multiply-adds of a step that are worth a thread, about 20 ms of it."""
SMALL_STEP = 2_000_000_000
"""Multiply-adds; beside smaller steps the processes that decode images are busy too, and have half of the cores."""

_own_threads: str | None = None  # what OMP_NUM_THREADS was set to here, not by the user


def shared_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables to set before torch is loaded; none that the user has set, or has decided by another one.

    OpenMP's threads spin while they wait for one another. If another process is on the core of the one that they wait
    for, each of thousands of waits lasts until the spin ends, so two processes may be a hundred times slower than
    one. A bounded spin is long enough for the gaps between the operators of one process. If the affinity or a quota
    of a control group leaves fewer cores than OpenMP counts, it is told how many.
    """
    settings = {}
    if "OMP_WAIT_POLICY" not in environment:
        settings = {"GOMP_SPINCOUNT": SPIN_COUNT, "KMP_BLOCKTIME": SPIN_MILLISECONDS}
    if ranks.usable_cores() < ranks.cores_of_affinity():
        settings[THREADS] = str(ranks.usable_cores())
    return {name: value for name, value in settings.items() if name not in environment}


@contextmanager
def sharing_cores() -> Iterator[None]:
    """A context with the variables of `shared_settings`; libraries read them once, when they are loaded."""
    global _own_threads
    settings = shared_settings(os.environ)
    os.environ.update(settings)
    _own_threads = settings.get(THREADS)
    try:
        yield
    finally:
        _own_threads = None
        for name in settings:
            os.environ.pop(name, None)


def chooses_threads(device: str = "cpu") -> bool:
    """Whether steps on a device of this type get threads by their size, rather than by the user's OMP_NUM_THREADS."""
    return device == "cpu" and os.environ.get(THREADS) == _own_threads


def step_threads(multiply_adds: int | None) -> int | None:
    """The number of threads of this process for steps of that many multiply-adds; None leaves it unchanged.

    A thread costs a few microseconds at each operator, so a small step is as fast or faster with fewer. The number
    depends on the size of the step and on the cores alone, as it decides the last bits of the result. A number that the
    user has set is left alone.
    """
    if multiply_adds is None or not chooses_threads():
        return None
    cores = ranks.usable_cores() // ranks.per_machine()
    if multiply_adds < SMALL_STEP:
        cores //= 2
    return max(1, min(math.ceil(multiply_adds / LEAST_PER_THREAD), cores))
