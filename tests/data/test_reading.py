import os
import signal
from pathlib import Path

import pytest
from PIL import Image

from comkd_cli.data.loaders import scoring_batches
from comkd_cli.data.reading import Reading, reading
from comkd_cli.data.source import ImageSet
from comkd_cli.edge.images import Preprocessing
from comkd_cli.errors import TrainingError
from comkd_cli.runtime.devices import failures_explained

PREPROCESSING = Preprocessing(8, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def test_the_image_of_a_dead_worker_is_found_by_its_process_in_any_message_of_torch() -> None:
    now = Reading(2)
    now.begin(1)
    pid = os.getpid()
    with reading(7):
        assert now.image_of(f"DataLoader worker (pid {pid}) is killed by signal: Segmentation fault. ") == 7
        assert now.image_of(f"DataLoader worker (pid(s) 1, {pid}) exited unexpectedly") == 7
        assert now.image_of("DataLoader worker (pid 1) is killed by signal: Killed. ") is None
        assert now.image_of("DataLoader worker (pid unknown) ended while it sent a batch") is None
        assert now.image_of(f"{pid}") is None
    assert now.image_of(f"DataLoader worker (pid {pid}) is killed by signal: Killed. ") is None


def open_or_die(key: str) -> Image.Image:
    if key == "bad/7.jpg":
        os.kill(os.getpid(), signal.SIGSEGV)
    return Image.new("RGB", (9, 9))


@pytest.mark.slow
def test_a_worker_that_dies_is_reported_with_the_image_that_it_read(tmp_path: Path) -> None:
    images = ImageSet(tuple(f"bad/{i}.jpg" for i in range(12)), None, open_or_die)
    with pytest.raises(TrainingError) as caught, failures_explained():
        list(scoring_batches(images, PREPROCESSING, 2, workers=2))
    assert caught.value.path == "bad/7.jpg"
    assert str(caught.value.found).startswith("DataLoader worker (pid")
    assert "data.workers" in str(caught.value.remedy)
