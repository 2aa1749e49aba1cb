import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from comkd_cli.data.loaders import Batch, Crops, Steps, TrainingLoader, scoring_batches, training_workers, worker_count
from comkd_cli.data.source import ImageSet
from comkd_cli.edge.images import Preprocessing, UnreadableImage, prepare
from comkd_cli.errors import TrainingError
from comkd_cli.recipe.model import Augment, Data
from tests import warm

pytestmark = [
    # Python and torch have their doubts about two workers; these tests want them on any machine.
    pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes"),
    pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning"),
]

TEACHER = Preprocessing(size=12, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
STUDENT = replace(TEACHER, size=8)
DAMAGED = ("4", "7")


def open_noise(key: str) -> Image.Image:
    """A picture of its own for each key."""
    pixels = np.random.default_rng(int(key)).integers(0, 256, (16, 20, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def open_some(key: str) -> Image.Image:
    if key in DAMAGED:
        raise UnreadableImage(f"{key}: is damaged")
    return open_noise(key)


def image_set(count: int, labelled: bool = True, damaged: bool = False) -> ImageSet:
    labels = tuple(i % 3 for i in range(count)) if labelled else None
    return ImageSet(tuple(map(str, range(count))), labels, open_some if damaged else open_noise)


class WholeSteps(TrainingLoader):
    """Its steps have one part each, which is what most tests look at."""

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:  # type: ignore[override]
        for (batch,) in super().epoch(epoch, first_step):
            yield batch


def loader(
    images: ImageSet | None = None,
    preprocessings: Iterable[Preprocessing] = (TEACHER, STUDENT),
    batch_size: int = 4,
    seed: int = 1,
    workers: int = 0,
) -> WholeSteps:
    return WholeSteps(
        image_set(18) if images is None else images,
        list(preprocessings),
        Crops(Augment(), seed),
        Steps(batch_size, seed),
        workers,
    )


def order(batches: Iterable[Batch]) -> list[list[int]]:
    return [batch.indices.tolist() for batch in batches]


def shown_images(batches: Iterable[Batch]) -> list[int]:
    return [index for batch in order(batches) for index in batch]


def assert_same(first: Iterable[Batch], second: Iterable[Batch]) -> None:
    pairs = list(zip(first, second, strict=True))
    assert pairs
    for left, right in pairs:
        assert torch.equal(left.indices, right.indices)
        assert all(torch.equal(a, b) for a, b in zip(left.inputs, right.inputs, strict=True))
        assert left.labels is not None
        assert right.labels is not None
        assert torch.equal(left.labels, right.labels)
        assert left.unreadable == right.unreadable


# --- order ---------------------------------------------------------------------------------------------


def test_an_epoch_shows_every_image_once_but_for_the_incomplete_last_batch() -> None:
    loading = loader()
    shown = order(loading.epoch(0))
    assert [len(batch) for batch in shown] == [4, 4, 4, 4]
    assert loading.steps_per_epoch == 4
    flat = [index for batch in shown for index in batch]
    assert len(set(flat)) == 16
    assert set(flat) < set(range(18))
    assert flat != sorted(flat)


def test_other_images_are_left_out_in_other_epochs() -> None:
    loading = loader()
    left_out = [set(range(18)) - set(shown_images(loading.epoch(e))) for e in range(5)]
    assert len(set(map(frozenset, left_out))) > 1


def test_a_batch_that_would_be_the_only_one_is_kept_incomplete() -> None:
    loading = loader(image_set(3), batch_size=8)
    assert (loading.steps_per_epoch, loading.batch_size, loading.image_count) == (1, 3, 3)
    assert sorted(shown_images(loading.epoch(0))) == [0, 1, 2]


def test_batches_depend_on_seed_and_epoch_and_not_on_what_was_loaded_before() -> None:
    used = loader()
    epochs = [list(used.epoch(e)) for e in range(3)]
    assert_same(loader().epoch(2), epochs[2])
    assert_same(used.epoch(0), epochs[0])
    assert order(epochs[0]) != order(epochs[1])
    assert order(loader(seed=2).epoch(0)) != order(epochs[0])


def test_each_epoch_crops_an_image_differently_by_its_name_not_its_place() -> None:
    def crops(images: ImageSet, epoch: int) -> dict[str, torch.Tensor]:
        (batch,) = loader(images, batch_size=6).epoch(epoch)
        return {images.keys[i]: crop for i, crop in zip(batch.indices.tolist(), batch.inputs[0], strict=True)}

    images = image_set(6)
    first, second, shuffled = crops(images, 0), crops(images, 1), crops(images.subset([5, 3, 1, 0, 2, 4]), 0)
    assert not any(torch.equal(first[key], second[key]) for key in first)
    assert all(torch.equal(first[key], shuffled[key]) for key in first)


@pytest.mark.parametrize("first_step", [0, 1, 3, 4])
def test_going_on_from_a_step_gives_the_tail_of_the_epoch(first_step: int) -> None:
    whole = list(loader().epoch(5))
    tail = list(loader().epoch(5, first_step))
    assert len(tail) == 4 - first_step
    if tail:
        assert_same(tail, whole[first_step:])


def test_workers_change_nothing_over_epochs_going_on_and_epochs_left_early() -> None:
    def show(loading: WholeSteps) -> Iterator[Batch]:
        yield from loading.epoch(0)
        abandoned = loading.epoch(1)
        yield next(abandoned)
        abandoned.close()
        yield from loading.epoch(2, first_step=2)
        yield from loading.epoch(3)

    images = image_set(18, damaged=True)
    assert_same(show(loader(images, workers=2)), show(loader(images, workers=0)))


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_draws_nothing_from_torchs_global_generator(workers: int) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    loading = loader(workers=workers)
    for epoch in range(2):
        for _ in loading.epoch(epoch):
            pass
    for _ in scoring_batches(image_set(5), STUDENT, 2, workers):
        pass
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_that_is_asked_of_the_whole_group_leaves_the_workers(number: signal.Signals) -> None:
    loading = loader(workers=2)
    batches = loading.epoch(0)
    shown = [next(batches), next(batches)]  # one from each worker: both have begun
    children = multiprocessing.active_children()
    assert len(children) >= 2
    for child in children:
        assert child.pid is not None
        os.kill(child.pid, number)
    shown += [*batches, *loading.epoch(1)]
    assert all(child.is_alive() for child in children)
    reference = loader()
    assert_same(shown, [*reference.epoch(0), *reference.epoch(1)])


# --- what a batch holds --------------------------------------------------------------------------------


def test_labels_and_inputs_belong_to_the_indices() -> None:
    images = image_set(18)
    for batch in loader(images, batch_size=5).epoch(0):
        assert batch.labels is not None
        assert images.labels is not None
        assert batch.labels.tolist() == [images.labels[i] for i in batch.indices]
        assert [tuple(inputs.shape) for inputs in batch.inputs] == [(5, 3, 12, 12), (5, 3, 8, 8)]
        assert {inputs.dtype for inputs in batch.inputs} == {torch.float32}
        assert (batch.labels.dtype, batch.indices.dtype) == (torch.int64, torch.int64)
        assert len(batch) == 5


def test_unlabelled_images_have_no_labels() -> None:
    (batch, *_) = loader(image_set(18, labelled=False)).epoch(0)
    assert batch.labels is None
    (batch, *_) = scoring_batches(image_set(18, labelled=False), STUDENT, 4, 0)
    assert batch.labels is None


def test_models_with_equal_preprocessings_share_one_tensor_also_once_moved() -> None:
    (batch, *_) = loader(preprocessings=(TEACHER, STUDENT, replace(TEACHER))).epoch(0)
    for shown in (batch, batch.to(torch.device("meta"))):
        assert shown.inputs[0] is shown.inputs[2]
        assert shown.inputs[1] is not shown.inputs[0]
    moved = batch.to(torch.device("meta"))
    assert moved.labels is not None
    assert {moved.labels.device.type, *(inputs.device.type for inputs in moved.inputs)} == {"meta"}


def test_unreadable_images_are_named_and_the_others_stay_as_they_are() -> None:
    whole = [batch for epoch in range(3) for batch in loader().epoch(epoch)]
    damaged_loader = loader(image_set(18, damaged=True))
    damaged = [batch for epoch in range(3) for batch in damaged_loader.epoch(epoch)]
    named = set()
    for before, after in zip(whole, damaged, strict=True):
        kept = [i for i, index in enumerate(before.indices.tolist()) if str(index) not in DAMAGED]
        lost = [f"{index}: is damaged" for index in before.indices.tolist() if str(index) in DAMAGED]
        assert list(after.unreadable) == lost
        assert torch.equal(after.indices, before.indices[kept])
        assert after.labels is not None
        assert before.labels is not None
        assert torch.equal(after.labels, before.labels[kept])
        assert all(torch.equal(a, b[kept]) for a, b in zip(after.inputs, before.inputs, strict=True))
        named |= set(after.unreadable)
    assert named == {"4: is damaged", "7: is damaged"}


def test_a_batch_may_lose_all_its_images() -> None:
    images = image_set(8, damaged=True).subset([4, 7])
    (batch,) = loader(images).epoch(0)
    assert len(batch) == 0
    assert sorted(batch.unreadable) == ["4: is damaged", "7: is damaged"]
    assert batch.labels is not None
    assert len(batch.labels) == 0
    assert len(batch.to(torch.device("cpu"))) == 0


def test_a_batch_can_be_sent_from_a_worker_without_losing_anything() -> None:
    (batch, *_) = loader(image_set(18, damaged=True)).epoch(0)
    assert_same([pickle.loads(pickle.dumps(batch))], [batch])


# --- scoring -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_scoring_shows_every_image_once_in_order_as_it_is_prepared_for_a_device(workers: int) -> None:
    images = image_set(11, damaged=True)
    batches = list(scoring_batches(images, STUDENT, 4, workers))
    assert order(batches) == [[0, 1, 2, 3], [5, 6], [8, 9, 10]]
    assert [batch.unreadable for batch in batches] == [(), ("4: is damaged", "7: is damaged"), ()]
    assert [batch.labels.tolist() for batch in batches] == [[0, 1, 2, 0], [2, 0], [2, 0, 1]]  # type: ignore[union-attr]
    for batch in batches:
        for index, shown in zip(batch.indices.tolist(), batch.inputs[0], strict=True):
            assert np.array_equal(shown.numpy(), prepare(images.open(index), STUDENT))


def test_an_empty_set_has_no_batches_to_score() -> None:
    assert list(scoring_batches(image_set(0), STUDENT, 4, 0)) == []


# --- how many workers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("cores", "workers"), [(1, 0), (2, 1), (4, 3), (9, 8), (64, 8)])
def test_a_folder_is_decoded_by_all_cores_but_one_and_by_eight_at_most(
    monkeypatch: pytest.MonkeyPatch, cores: int, workers: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(cores)), raising=False)
    assert worker_count(Data(folder="x")) == workers


def test_cores_are_counted_also_where_the_system_knows_no_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert worker_count(Data(folder="x")) == 5
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert worker_count(Data(folder="x")) == 0


def test_the_recipe_has_the_last_word_on_workers_and_digits_need_none() -> None:
    assert worker_count(Data(folder="x", workers=0)) == 0
    assert worker_count(Data(dataset="digits", workers=3)) == 3
    assert worker_count(Data(dataset="digits")) == 0


@pytest.mark.parametrize(("cores", "crops", "workers"), [(2, 50_000, 1), (16, 50_000, 1), (1, 50_000, 0), (2, 900, 0)])
def test_long_runs_on_digits_have_one_worker_where_there_is_a_core_for_it(
    monkeypatch: pytest.MonkeyPatch, cores: int, crops: int, workers: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(cores)), raising=False)
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda: "fork")
    assert training_workers(Data(dataset="digits"), crops) == workers
    assert training_workers(Data(dataset="digits", workers=5), crops) == 5
    assert training_workers(Data(folder="x"), crops) == worker_count(Data(folder="x"))


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_digits_are_not_worth_a_worker_that_imports_torch_first(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda: method)
    assert training_workers(Data(dataset="digits"), 50_000) == 0


def be_process(monkeypatch: pytest.MonkeyPatch, rank: int, world_size: int) -> None:
    for name, value in {"RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, str(value))


def of_parts(parts: int, batch_size: int = 8) -> list[list[list[int]]]:
    """For each step of an epoch, the images of its parts."""
    loading = TrainingLoader(image_set(18), [TEACHER], Crops(Augment(), 1), Steps(batch_size, 1, parts), 0)
    return [[part.indices.tolist() for part in step] for step in loading.epoch(2)]


@pytest.mark.parametrize(("parts", "processes"), [(1, 2), (2, 1), (2, 2), (1, 3), (2, 3)])
def test_processes_and_parts_share_out_the_steps_of_one(
    monkeypatch: pytest.MonkeyPatch, parts: int, processes: int
) -> None:
    (first,), (second,) = of_parts(1)
    shares = []
    for rank in range(processes):
        be_process(monkeypatch, rank, processes)
        shares.append(of_parts(parts))
    together = [
        [index for part in zip(*step, strict=True) for share in part for index in share]
        for step in zip(*shares, strict=True)
    ]
    assert together == [first, second]
    lengths = {len(share) for rank in shares for step in rank for share in step}
    assert max(lengths) - min(lengths) <= 1


def test_a_step_smaller_than_its_shares_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    be_process(monkeypatch, 0, 4)
    with pytest.raises(TrainingError) as caught:
        of_parts(3)
    assert (caught.value.field, caught.value.found, caught.value.allowed) == ("batch_size", 8, "at least 12")


def test_processes_of_one_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    assert worker_count(Data(folder="x")) == 8
    be_process(monkeypatch, 0, 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert worker_count(Data(folder="x")) == 3


# --- workers that fail ---------------------------------------------------------------------------------

ENDING = """
import os, signal, sys, time, warnings
from PIL import Image
from comkd_cli.data.loaders import Crops, Steps, TrainingLoader, scoring_batches
from comkd_cli.data.source import ImageSet
from comkd_cli.runtime.devices import failures_explained
from comkd_cli.errors import ComkdError
from comkd_cli.edge.images import Preprocessing
from comkd_cli.recipe.model import Augment

SETTINGS = Preprocessing(8, (0.5,) * 3, (0.5,) * 3)

def open_key(key):
    if key == "5" and sys.argv[2] == "raise":
        raise KeyError("a bug")
    if key == "5" and sys.argv[2].startswith("die"):
        os.kill(os.getpid(), signal.SIGKILL)
    return Image.new("RGB", (8, 8))

def batches(images):
    if sys.argv[1] == "scoring":
        return scoring_batches(images, SETTINGS, 2, 2)
    return TrainingLoader(images, [SETTINGS], Crops(Augment(), 1), Steps(2, 1), 2).epoch(0)

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    try:
        with failures_explained():
            for batch in batches(ImageSet(tuple(map(str, range(40))), None, open_key)):
                if sys.argv[2] == "die, noticed elsewhere":
                    time.sleep(2)  # the death is noticed while a batch is used
                if sys.argv[2] == "stop":
                    raise ComkdError("no more of them")
    except ComkdError as error:
        sys.exit(f"error: {error}")
"""


@pytest.mark.slow
@pytest.mark.parametrize("use", ["scoring", "training"])
@pytest.mark.parametrize(
    ("event", "said"),
    [
        ("raise", "KeyError: 'a bug'"),
        ("die", "error: 5: a process that decodes images died while it read this one"),
        ("die, noticed elsewhere", "error: 5: a process that decodes images died while it read this one"),
        ("stop", "error: no more of them"),
    ],
)
def test_a_process_ends_whatever_happens_while_workers_decode(tmp_path: Path, use: str, event: str, said: str) -> None:
    (tmp_path / "ending.py").write_text(ENDING)
    if event == "raise":  # it is the interpreter that ends the workers after an error that nothing catches
        command = [sys.executable, "ending.py", use, event]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=100)
    else:
        done = warm.run(use, event, cwd=tmp_path, module="ending", package=tmp_path, digits=None)
    assert done.returncode == 1
    assert said in done.stderr
    if event.startswith("die"):
        assert "data.workers" in done.stderr
    if event != "raise":
        assert done.stderr.startswith("error: ")
        assert len(done.stderr.splitlines()) == 1


def test_an_image_that_there_is_no_memory_for_is_unreadable(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("comkd_cli.data.batches.scoring_input", no_memory)
    (batch,) = scoring_batches(image_set(2), STUDENT, 4, 0)
    assert len(batch) == 0
    assert batch.unreadable == tuple(f"{key}: there is not enough memory to prepare it" for key in "01")
