"""Files of weights that a model does not load: the error names what differs, and its remedy works."""

import argparse
import json
import shlex
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from comkd_cli.errors import CheckpointError, ModelError
from comkd_cli.models.backbones import build_clip, build_image_tower, state_sha256
from comkd_cli.models.checkpoints import load_student, load_teacher
from comkd_cli.models.weights import check_finite, is_torchscript, read_weights
from comkd_cli.recipe.model import Model
from comkd_cli.teachers.promptsrc_checkpoint import read_released
from tests import tiny

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def clip() -> torch.nn.Module:
    return build_clip(Model(config=tiny.CLIP), seed=5).model


def prefixed(state: State, prefix: str) -> State:
    return {f"{prefix}{name}": value for name, value in state.items()}


def run_remedy(error: ModelError) -> None:
    """Run what follows `python -c` in a remedy, as a shell would pass it to Python."""
    (program,) = shlex.split(str(error.remedy).partition("python -c ")[2])
    exec(program, {})


# What open_clip loads as it is, and what it does not.
TAKEN: dict[str, Callable[[State], Any]] = {
    "plain": lambda state: state,
    "state_dict": lambda state: {"epoch": 3, "state_dict": state},
    "DataParallel": lambda state: prefixed(state, "module."),
}
WRAPPED: dict[str, Callable[[State], Any]] = {
    "model": lambda state: {"model": state, "epoch": 3},
    "compiled": lambda state: prefixed(state, "_orig_mod."),
    "compiled within": lambda state: {"model": prefixed(state, "_orig_mod.")},
    "compiled and parallel": lambda state: {"state_dict": prefixed(state, "module._orig_mod.")},
    "Lightning": lambda state: {"state_dict": {**prefixed(state, "model."), "loss.weight": torch.ones(1)}},
    "quoted": lambda state: {"it's": state},
}


@pytest.mark.parametrize("kind", TAKEN)
def test_what_open_clip_loads_is_loaded(clip: torch.nn.Module, tmp_path: Path, kind: str) -> None:
    torch.save(TAKEN[kind](clip.state_dict()), tmp_path / "w.pt")
    built = build_clip(Model(config=tiny.CLIP, weights=str(tmp_path / "w.pt")))
    assert state_sha256(built.model) == state_sha256(clip)


@pytest.mark.parametrize("kind", WRAPPED)
def test_the_remedy_for_a_wrapped_file_is_a_command_that_works(
    clip: torch.nn.Module, tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "my weights.pt"
    torch.save(WRAPPED[kind](clip.state_dict()), path)
    with pytest.raises(ModelError, match="does not hold weights of") as caught:
        build_clip(Model(config=tiny.CLIP, weights=str(path)))
    assert caught.value.path == path
    assert "\n" not in str(caught.value)
    run_remedy(caught.value)
    fixed = Model(config=tiny.CLIP, weights=str(tmp_path / "my weights-plain.pt"))
    assert state_sha256(build_clip(fixed).model) == state_sha256(clip)


def test_a_wrapped_safetensors_file_has_a_remedy_that_works(clip: torch.nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file(prefixed({name: value.clone() for name, value in clip.state_dict().items()}, "clip."), path)
    with pytest.raises(ModelError, match=r"with the prefix `clip\.`") as caught:
        build_clip(Model(config=tiny.CLIP, weights=str(path)))
    run_remedy(caught.value)
    fixed = Model(config=tiny.CLIP, weights=str(tmp_path / "w-plain.pt"))
    assert state_sha256(build_clip(fixed).model) == state_sha256(clip)


def test_a_wrapped_file_of_a_tower_has_a_remedy_too(clip: Any, tmp_path: Path) -> None:
    torch.save({"model": prefixed(clip.visual.state_dict(), "_orig_mod.")}, tmp_path / "w.pt")
    alone = {key: value for key, value in tiny.CLIP.items() if key != "text_cfg"}
    with pytest.raises(ModelError, match=r"under the key `model` with the prefix `_orig_mod\.`"):
        build_image_tower(Model(config=alone, weights=str(tmp_path / "w.pt")))


@pytest.mark.parametrize(
    ("content", "problem", "remedy"),
    [
        (
            {"vision_model.embeddings.class_embedding": torch.ones(3), "logit_scale": torch.ones(())},
            "transformers library",
            "hf-hub:ORG/NAME",
        ),
        ({"state_dict": {"prompt_learner.ctx": torch.ones(4, 16)}}, "PromptSRC", "teacher.format: promptsrc"),
        ({"format": "comkd-student/1", "state_dict": {"backbone.x": torch.ones(2)}}, "a student", "weights of a CLIP"),
        (
            {n: torch.ones(1) for n in ("x", "input_resolution", "context_length", "vocab_size")},
            "OpenAI's own code",
            "-quickgelu, or remove",
        ),
        ({"something": torch.ones(1)}, "has something, which the model does not have", "the architecture"),
        ([torch.ones(1)], "it holds list, not tensors by name", "state_dict()"),
        (torch.ones(1), "it holds Tensor, not tensors by name", "state_dict()"),
        ({}, "holds no tensors", "state_dict()"),
        ({"args": argparse.Namespace(lr=1), "state_dict": {}}, "more than plain tensors; save only the state_dict", ""),
    ],
)
def test_another_kind_of_file_is_recognised(tmp_path: Path, content: object, problem: str, remedy: str) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(ModelError) as caught:
        build_clip(Model(config=tiny.CLIP, weights=str(tmp_path / "w.pt")))
    assert caught.value.path == tmp_path / "w.pt"
    assert problem in caught.value.problem
    assert remedy in (caught.value.remedy or "")
    assert "\n" not in str(caught.value)
    assert "Error(s) in loading" not in str(caught.value)


def test_an_image_tower_alone_is_no_teacher(clip: Any, tmp_path: Path) -> None:
    torch.save(clip.visual.state_dict(), tmp_path / "w.pt")
    with pytest.raises(ModelError, match="only an image tower"):
        build_clip(Model(config=tiny.CLIP, weights=str(tmp_path / "w.pt")))


def test_a_torchscript_archive_is_refused_with_a_remedy(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(tmp_path / "ViT-B-32.pt"))
    for build, config in ((build_clip, tiny.CLIP), (build_image_tower, tiny.TOWER)):
        with pytest.raises(ModelError, match="is a TorchScript archive") as caught:
            build(Model(config=config, weights=str(tmp_path / "ViT-B-32.pt")))
        assert caught.value.path == tmp_path / "ViT-B-32.pt"
        assert "weights: openai" in str(caught.value.remedy)


def test_a_folder_is_not_a_file_of_weights(tmp_path: Path) -> None:
    def failure(model: Model) -> ModelError:
        with pytest.raises(ModelError) as caught:
            build_clip(model)
        return caught.value

    model, of_folder = Model(config=tiny.CLIP, weights=str(tmp_path)), Model(arch=f"local-dir:{tmp_path}")
    plain = failure(model)
    assert (plain.field, plain.found) == ("weights", str(tmp_path))
    assert "open_clip_config.json" in str(plain.remedy)
    file = str(tmp_path / "model.safetensors")
    for architecture, remedy in (("Siglip2Model", "hf-hub:"), ("SiglipModel", file), ("CLIPModel", file)):
        (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture]}))
        for given, field in ((model, "weights"), (of_folder, "arch")):
            error = failure(given)
            assert error.field == field
            assert "transformers library" in error.problem
            assert remedy in str(error.remedy)
    (tmp_path / "open_clip_config.json").write_text("{}")
    assert failure(model).remedy == f"use arch: local-dir:{tmp_path} without weights"
    absent = failure(Model(arch=f"local-dir:{tmp_path / 'absent'}"))
    assert (absent.path, absent.problem) == (tmp_path / "absent", "no such folder")


def test_weights_of_another_architecture_name_what_differs(clip: torch.nn.Module, tmp_path: Path) -> None:
    torch.save(clip.state_dict(), tmp_path / "w.pt")
    text = {**tiny.CLIP["text_cfg"], "width": 32}  # type: ignore[dict-item]
    with pytest.raises(
        ModelError,
        match=r"positional_embedding of the shape \(10, 16\) instead of \(10, 32\).* \d+ more",
    ) as caught:
        build_clip(Model(config={**tiny.CLIP, "text_cfg": text}, weights=str(tmp_path / "w.pt")))
    assert "architecture" in str(caught.value.remedy)
    deeper = {**tiny.CLIP["vision_cfg"], "layers": 3}  # type: ignore[dict-item]
    with pytest.raises(ModelError, match=r"it lacks visual\.transformer\.resblocks\.2\.\S+, .* and \d+ more"):
        build_clip(Model(config={**tiny.CLIP, "vision_cfg": deeper}, weights=str(tmp_path / "w.pt")))
    folder = tmp_path / "folder"
    folder.mkdir()
    torch.save(clip.state_dict(), folder / "open_clip_pytorch_model.bin")
    config = {"model_cfg": {**tiny.CLIP, "vision_cfg": deeper}, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"its file lacks visual\.transformer\.resblocks\.2"):
        build_clip(Model(arch=f"local-dir:{folder}"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_with_nan_or_infinity_are_refused(clip: torch.nn.Module, tmp_path: Path, value: float) -> None:
    state = {name: tensor.clone() for name, tensor in clip.state_dict().items()}
    state["visual.proj"][0, 0] = value
    torch.save(state, tmp_path / "w.pt")
    alone = {key: value for key, value in tiny.CLIP.items() if key != "text_cfg"}
    path = str(tmp_path / "w.pt")
    with pytest.raises(ModelError, match=r"first in visual\.proj:") as caught:
        build_clip(Model(config=tiny.CLIP, weights=path))
    assert caught.value.path == path
    with pytest.raises(ModelError, match=r"first in proj:") as caught:
        build_image_tower(Model(config=alone, weights=path))
    assert caught.value.path == path


@pytest.mark.parametrize(
    ("tensor", "problem"),
    [
        (torch.zeros(1).expand(10**6, 10**6), "states the shape (1000000, 1000000), but stores 4 bytes"),
        (torch.empty(3, device="meta"), "without values"),
        (torch.zeros(3).to_sparse(), "without values"),
        (torch.zeros(3, dtype=torch.float8_e4m3fn), "has the type torch.float8_e4m3fn"),
    ],
)
def test_tensors_whose_values_cannot_be_read_are_refused(tensor: torch.Tensor, problem: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        check_finite({"a": torch.zeros(2).expand(3, 2), "b": tensor}, "w.pt", CheckpointError)
    assert caught.value.problem.startswith("b ")
    assert problem in caught.value.problem


def test_an_archive_that_torch_cannot_open_is_no_program(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "w.pt", "w") as archive:
        archive.writestr("a/data.pkl", b"")
    assert not is_torchscript(tmp_path / "w.pt")
    torch.save({"named": torch.zeros(1)}, tmp_path / "w.pt")
    (tmp_path / "w.pt").write_bytes((tmp_path / "w.pt").read_bytes().replace(b"w/data/0", b"w/data/\xff"))
    assert not is_torchscript(tmp_path / "w.pt")


@pytest.mark.parametrize("read", [load_student, load_teacher, read_released, build_clip])
def test_a_file_without_read_permission_is_named(
    read: Callable[[Any], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file.pt"
    torch.save({"a": torch.ones(1)}, path)

    def refuse(*_arguments: object, **_options: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(torch, "load", refuse)
    given: object = Model(config=tiny.CLIP, weights=str(path)) if read is build_clip else path
    with pytest.raises((CheckpointError, ModelError), match="permission denied") as caught:
        read(given)
    if read is not read_released:
        assert caught.value.path == path  # type: ignore[attr-defined]


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize(
    ("content", "remedy"),
    [
        (b"", "copy or download it again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "git lfs pull"),
    ],
)
def test_a_placeholder_of_weights_is_refused_with_a_remedy(
    tmp_path: Path, suffix: str, content: bytes, remedy: str
) -> None:
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    with pytest.raises(ModelError) as caught:
        build_clip(Model(config=tiny.CLIP, weights=str(path)))
    assert caught.value.path == path
    assert remedy in str(caught.value.remedy)


def test_a_training_checkpoint_with_numbers_of_numpy_gives_its_weights(tmp_path: Path) -> None:
    model = build_clip(Model(config=tiny.CLIP), seed=4).model
    path = tmp_path / "epoch_3.pt"
    torch.save({"epoch": np.int64(3), "loss": np.float64(0.5), "state_dict": model.state_dict()}, path)
    loaded = build_clip(Model(config=tiny.CLIP, weights=str(path))).model
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_other_objects_in_a_file_of_weights_are_still_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "where": Path("x")}, tmp_path / "odd.pt")
    with pytest.raises(ModelError, match="more than plain tensors"):
        read_weights(tmp_path / "odd.pt")
