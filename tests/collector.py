"""Python's garbage collector, for processes that import much and then run tests."""

import gc

YOUNG_OBJECTS = 50_000
"""Between two collections, 700 by default: those took a twentieth of the time of the tests."""


def pause() -> None:
    """Collect nothing while modules are imported: their objects stay, and looking at them takes up to a fifth of it."""
    gc.disable()


def resume() -> None:
    """Collect again, but nothing of what was imported: torch's objects take most of the time of each collection."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS)
    gc.enable()
