import os
import random
from pathlib import Path

import pytest

from comkd_cli.data.same_files import END_BYTES, same_contents
from comkd_cli.events import Event, Progress


def groups(folder: Path, contents: dict[str, bytes], events: list[Event] | None = None) -> list[set[str]]:
    """The names of files with the same content, group by group."""
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    names = list(contents)
    paths = [str(folder / name) for name in names]
    sizes = [os.stat(path).st_size for path in paths]  # noqa: PTH116
    report = (lambda event: None) if events is None else events.append
    return [{names[i] for i in group} for group in same_contents(paths, sizes, report)]


@pytest.mark.parametrize("size", [1, 2 * END_BYTES, 2 * END_BYTES + 1, 5 * END_BYTES])
def test_files_are_the_same_where_every_byte_is(tmp_path: Path, size: int) -> None:
    whole = random.Random(size).randbytes(size)
    others = {f"byte {at}": whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in {0, size // 2, size - 1}}
    contents = {"a": whole, **others, "b": whole, "longer": whole + b"x", "empty": b"", "also empty": b""}
    assert groups(tmp_path, contents) == [{"a", "b"}]


def test_each_content_is_a_group_and_the_work_is_reported(tmp_path: Path) -> None:
    events: list[Event] = []
    contents = {f"{i}": bytes([i % 300 % 256]) * 10 for i in range(600)}
    found = groups(tmp_path, contents, events)
    assert len(found) == 256
    assert {"0", "256", "300", "556"} in found
    assert isinstance(events[-1], Progress)
    assert any(isinstance(event, Progress) and event.done == event.total == 600 for event in events)


def test_a_file_that_is_gone_is_left_out(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / name).write_bytes(b"same")
    paths = [str(tmp_path / name) for name in "abc"]
    (tmp_path / "b").unlink()
    assert same_contents(paths, [4, 4, 4], lambda event: None) == [[0, 2]]
