from pathlib import Path

import pytest

from tests.tars import samples, write


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    """Shards of 4, 1 and 5 samples."""
    counts = ((4, 0), (1, 4), (5, 5))
    return [write(tmp_path / f"set/train-{n}.tar", *samples(*count)) for n, count in enumerate(counts)]
