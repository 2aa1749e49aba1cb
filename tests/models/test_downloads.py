"""Nothing is fetched where that is forbidden, whichever library tries, and from whichever thread."""

import json
import shutil
import socket
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
from huggingface_hub import constants

from comkd_cli.models import downloads
from comkd_cli.models.backbones import build_clip
from comkd_cli.recipe.model import Model
from tests import tiny, warm
from tests.hub import Hub, hub

CLIP_ON_THE_HUB = json.dumps({"model_cfg": tiny.CLIP, "preprocess_cfg": {}}).encode()


@pytest.fixture
def served() -> Iterator[tuple[str, type[Hub]]]:
    with hub() as (url, handler):
        handler.files["some/thing/file"] = b"content"
        yield f"{url}/some/thing/resolve/main/file", handler


def test_no_request_leaves_the_process(served: tuple[str, type[Hub]]) -> None:
    address, handler = served
    with downloads.forbidden():
        with pytest.raises(OSError, match="forbidden") as caught:
            urllib.request.urlopen(address)
        assert downloads.was_refused(caught.value)
        met: list[BaseException] = []

        def fetch() -> None:
            try:
                urllib.request.urlopen(address)
            except OSError as error:
                met.append(error)

        thread = threading.Thread(target=fetch)
        thread.start()
        thread.join()
        assert len(met) == 1
        with pytest.raises(downloads.DownloadRefused):
            socket.getaddrinfo("localhost", 80)
    assert handler.requests == []
    with urllib.request.urlopen(address) as response:
        assert response.read() == b"content"


def test_it_ends_with_the_outermost_block_and_can_be_left_out(served: tuple[str, type[Hub]]) -> None:
    address, handler = served
    before = constants.HF_HUB_OFFLINE
    with downloads.forbidden():
        with downloads.forbidden():
            pass
        assert downloads.are_forbidden()
        assert constants.HF_HUB_OFFLINE
        with pytest.raises(OSError, match="forbidden"):
            urllib.request.urlopen(address)
    assert not downloads.are_forbidden()
    assert before == constants.HF_HUB_OFFLINE
    with downloads.forbidden(unless=True):
        urllib.request.urlopen(address).close()
    assert len(handler.requests) == 1


def test_processes_of_one_machine_can_still_be_joined(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client, downloads.forbidden():
        server.bind(str(tmp_path / "s"))
        server.listen()
        client.connect(str(tmp_path / "s"))


def test_another_error_is_not_taken_for_a_refusal() -> None:
    with downloads.forbidden():
        assert not downloads.was_refused(FileNotFoundError("weights.pt"))
    assert not downloads.was_refused(downloads.DownloadRefused("of an earlier block"))


@pytest.fixture
def hub_with_a_clip(tmp_path: Path) -> Iterator[tuple[dict[str, str], type[Hub]]]:
    """The environment of a process that finds the Hub, and what the Hub was asked."""
    torch.save(build_clip(Model(config=tiny.CLIP), seed=1).model.state_dict(), tmp_path / "w.bin")
    with hub() as (url, handler):
        handler.files["someone/tiny/open_clip_config.json"] = CLIP_ON_THE_HUB
        handler.files["someone/tiny/open_clip_pytorch_model.bin"] = (tmp_path / "w.bin").read_bytes()
        yield (
            {
                "HF_ENDPOINT": url,
                "HF_HOME": str(tmp_path / "hub"),
                "HF_HUB_OFFLINE": "0",
                "HF_HUB_DISABLE_XET": "1",
            },
            handler,
        )


@pytest.mark.slow
def test_what_a_student_names_is_fetched_only_where_that_is_allowed(
    tmp_path: Path,
    hub_with_a_clip: tuple[dict[str, str], type[Hub]],
) -> None:
    """A student whose backbone and whose teacher are repositories of the Hub, on a machine with an empty cache."""
    environment, handler = hub_with_a_clip
    on_the_hub = {"arch": "hf-hub:someone/tiny"}
    student = {**on_the_hub, "train": "prompts", "prompts": {"tokens": 1, "depth": 1}}
    recipe = tiny.recipe(teacher=on_the_hub, student=student, optim={**tiny.OPTIM, "epochs": 1})
    (tmp_path / "far.yaml").write_text(json.dumps(recipe))

    def comkd(*arguments: object) -> CompletedProcess[str]:
        handler.requests.clear()
        return warm.run(*arguments, cwd=tmp_path, env=environment, hub=True)

    assert comkd("distill", "far.yaml").returncode == 0  # a recipe that the user gave may fetch
    assert handler.requests
    shutil.rmtree(environment["HF_HOME"])
    path = tmp_path / "runs/far/digits/seed1/student.pt"

    refused = comkd("evaluate", path)
    assert (refused.returncode, handler.requests) == (1, [])
    assert "someone/tiny" in refused.stderr
    assert "--allow-download" in refused.stderr
    refused = comkd("export", path, "--text")
    assert (refused.returncode, handler.requests) == (1, [])
    assert "--allow-download" in refused.stderr

    def roles(done: CompletedProcess[str]) -> list[Any]:
        assert done.returncode == 0, done.stderr
        return [record["role"] for record in json.loads(done.stdout)["records"]]

    assert roles(comkd("evaluate", path, "--json", "--allow-download")) == ["student", "teacher"]
    assert handler.requests
    assert roles(comkd("evaluate", path, "--json")) == ["student", "teacher"]  # from the cache
    assert handler.requests == []
