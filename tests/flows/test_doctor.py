"""Each check of a machine, against machines that are made up, and the whole on this one."""

import json
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from comkd_cli.flows.doctor import machine, packages, storage, torch_build
from comkd_cli.recipe.catalog import CATALOG


@pytest.mark.parametrize(
    ("torch", "torchvision", "state"),
    [
        ("2.9.0", "0.24.0", "ok"),
        ("2.9.1+cu128", "0.24.1+cu128", "ok"),
        ("2.14.1", "0.29.1+cu130", "ok"),
        ("2.10.0a0+git1", "0.25.0a0", "ok"),
        ("2.9.1+cpu", "0.24.1+cu128", "warning"),
        ("2.9.1", "0.23.0", "error"),
        ("2.8.0", "0.24.0", "error"),
    ],
)
def test_torchvision_belongs_to_torch(torch: str, torchvision: str, state: str) -> None:
    check = torch_build.check_pair(torch, torchvision)
    assert check.state == state
    assert bool(check.remedy) == (state != "ok")


def gpus(**changes: Any) -> dict[str, Any]:
    return {"device": "cpu", "cuda_build": "12.8", "devices": [], "problems": [], **changes}


@pytest.mark.parametrize(
    ("facts", "driver", "state"),
    [
        (gpus(devices=[{"name": "H100", "free_bytes": 2**30, "total_bytes": 2**31}]), "580.1", "ok"),
        (gpus(cuda_build=None), None, "ok"),
        (gpus(device="mps", cuda_build=None), None, "ok"),
        (gpus(cuda_build=None), "580.1", "warning"),
        (gpus(problems=["The NVIDIA driver on your system is too old"]), "470.1", "warning"),
    ],
)
def test_a_gpu_that_torch_does_not_use_is_a_warning(facts: dict[str, Any], driver: str | None, state: str) -> None:
    check = torch_build.check_device(facts, driver)
    assert check.state == state
    assert bool(check.remedy) == (state != "ok")
    assert all(problem in check.found for problem in facts["problems"])


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("raise OSError('libcudart.so: not found')", "OSError: libcudart.so: not found"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "signal 4"),
    ],
)
def test_a_torch_that_cannot_be_imported_is_an_error(code: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = subprocess.run

    def broken(command: list[str], **settings: Any) -> subprocess.CompletedProcess[str]:
        assert command[1:] == ["-m", "comkd_cli.flows.doctor.torch_facts"]
        return run([sys.executable, "-S", "-c", code], **settings)

    monkeypatch.setattr(torch_build.subprocess, "run", broken)
    first, *_ = torch_build.check_torch()
    assert (first.name, first.state) == ("torch", "error")
    assert expected in first.found


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Lets some packages be installed, and comkd require others."""

    def make(versions: dict[str, str], requires: list[str] | None) -> None:
        def version(name: str) -> str:
            if name not in versions:
                raise metadata.PackageNotFoundError(name)
            return versions[name]

        def required(name: str) -> list[str] | None:
            version(name)
            return requires

        monkeypatch.setattr(packages.metadata, "version", version)
        monkeypatch.setattr(packages.metadata, "requires", required)

    return make


def test_packages_that_are_missing_or_too_old_are_named(installed: Callable[..., None]) -> None:
    requires = ["torch>=2.9", "numpy>=1.26", "rich", "pytest>=8; extra == 'dev'", "tomli; python_version < '3'"]
    installed({"comkd": "0.1.0", "torch": "2.14.1+cu130", "numpy": "1.25.2"}, requires)
    found = {check.found.split(":")[0]: (check.state, check.remedy) for check in packages.check_requirements()}
    assert found == {
        "numpy>=1.26": ("error", "pip install 'numpy>=1.26'"),
        "rich": ("error", "pip install 'rich'"),
    }
    installed({"comkd": "0.1.0", "torch": "2.9", "numpy": "2.0", "rich": "13"}, requires)
    (check,) = packages.check_requirements()
    assert (check.state, check.found) == ("ok", "comkd 0.1.0 and the 3 packages that it requires")
    installed({}, None)
    assert [check.state for check in packages.check_requirements()] == ["warning"]


def test_packages_that_overwrite_each_other_are_a_warning(installed: Callable[..., None]) -> None:
    installed({"onnxruntime": "1.20", "pillow": "11"}, [])
    assert packages.check_overlaps() == []
    installed({"onnxruntime": "1.20", "onnxruntime-gpu": "1.20"}, [])
    (check,) = packages.check_overlaps()
    assert check.state == "warning"
    assert "onnxruntime onnxruntime-gpu" in check.remedy


def test_the_limits_of_a_container_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    monkeypatch.setattr(machine, "usable_cores", lambda: 8)
    assert (machine.check_cores().state, machine.check_memory().state) == ("ok", "ok")
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    check = machine.check_cores()
    assert (check.state, "1.5 of them" in check.found, "OMP_NUM_THREADS=2" in check.remedy) == ("warning", True, True)
    (tmp_path / "memory.max").write_text(f"{3 * 2**30}\n")
    (tmp_path / "memory.current").write_text(f"{2 * 2**30}\n")
    check = machine.check_memory()
    assert (check.state, check.found) == ("warning", "1.0 GiB free")
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert (machine.check_cores().state, machine.check_memory().state) == ("ok", "ok")


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert machine.check_disk(tmp_path / "file" / "runs").state == "error"
    assert machine.check_disk(tmp_path / "new" / "runs").state == "ok"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_datasets_and_weights_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage.constants, "HF_HUB_CACHE", str(tmp_path))
    assert storage.check_data_root(tmp_path).remedy
    assert storage.check_cached_weights().found == f"{tmp_path}: none"
    name, dataset = next(iter(CATALOG.items()))
    (tmp_path / dataset.folder).mkdir()
    assert f"1 ({name})" in storage.check_data_root(tmp_path).found
    (tmp_path / "models--timm--empty").mkdir()
    (tmp_path / "models--timm--vit/snapshots/1").mkdir(parents=True)
    (tmp_path / "models--timm--vit/snapshots/1/config.json").touch()
    assert storage.check_cached_weights().found == f"{tmp_path}: 1 (timm/vit)"


@pytest.mark.slow
def test_this_machine_can_run_and_one_without_a_place_for_runs_cannot(
    tmp_path: Path, run_comkd: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    (tmp_path / "file").touch()
    done = run_comkd("doctor", "--json", "--runs", tmp_path / "file/runs", cwd=tmp_path, timeout=280)
    document = json.loads(done.stdout)
    states = {check["name"]: check["state"] for check in document["checks"]}
    assert (done.returncode, document["can_run"], states["disk"]) == (1, False, "error")
    assert {name for name, state in states.items() if state == "error"} == {"disk"}
    assert {"python", "packages", "torch", "torchvision", "device", "cores", "memory", "datasets"} <= set(states)
    assert "disk" in done.stderr
