"""Students as PromptKD's code saves them, built here by the names of its format."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from comkd_cli.errors import CheckpointError, ModelError
from comkd_cli.models.backbones import build_clip
from comkd_cli.models.weights import read_weights
from comkd_cli.recipe.model import Model
from comkd_cli.teachers.promptkd_checkpoint import read_released_student
from comkd_cli.teachers.promptsrc_checkpoint import read_released
from tests.method.test_prompt_src import unit
from tests.method.test_prompts import prompted_by_hand

DIM = 24  # of the teacher's embedding
CONFIG = {
    "embed_dim": 12,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "head_width": 16, "layers": 3},
}
TEXT = {"text_cfg": {"context_length": 12, "width": 12, "heads": 2, "layers": 1}}


class Projector(nn.Module):
    """The shape of PromptKD's: two 1 x 1 convolutions with a batch norm between them, in a Sequential `conv1`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(12, DIM, 1), nn.BatchNorm2d(DIM), nn.ReLU(), nn.Conv2d(DIM, DIM, 1))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        projected: torch.Tensor = self.conv1(features[:, :, None, None])
        return projected[:, :, 0, 0]


def projector() -> Projector:
    made = Projector()
    made(torch.randn(64, 12))  # running statistics of its own
    return made.eval()


def released_student(depth: int, seed: int = 1) -> tuple[dict[str, torch.Tensor], nn.Module, Projector]:
    """The tensors of a file, float32, and the tower and the projector that they come from. depth: 0 for no prompts."""
    torch.manual_seed(seed)
    clip = build_clip(Model(config={**CONFIG, **TEXT}), seed=seed).model
    own = projector()
    state = {f"image_encoder.{name}": value for name, value in clip.visual.state_dict().items()}  # type: ignore[union-attr]
    state |= {f"VPT_image_trans.{name}": value for name, value in own.state_dict().items()}
    state["logit_scale"] = torch.tensor(3.5)
    if depth:
        state["image_encoder.VPT"] = torch.randn(4, 32)
    for layer in range(1, depth):
        state[f"image_encoder.transformer.resblocks.{layer}.VPT_shallow"] = torch.randn(4, 32)
    return state, clip.visual, own  # type: ignore[return-value]


def features_by_hand(
    state: dict[str, torch.Tensor], tower: nn.Module, own: Projector, images: torch.Tensor
) -> torch.Tensor:
    """The normalised features of PromptKD's wrapper, (images, dim)."""
    layers = [v for n, v in state.items() if n.endswith(("image_encoder.VPT", "VPT_shallow"))]
    prompts = torch.stack(layers) if layers else torch.zeros(1, 0, 32)
    with torch.no_grad():
        return unit(own(prompted_by_hand(tower, prompts, images)))


def write(path: Path, state: dict[str, Any]) -> Path:
    torch.save({"state_dict": state, "epoch": 20, "val_result": None}, path)
    return path


@pytest.mark.parametrize(("depth", "prefix"), [(0, ""), (1, ""), (3, "module.")])
def test_every_tensor_of_the_file_is_found(tmp_path: Path, depth: int, prefix: str) -> None:
    state, tower, own = released_student(depth)
    named = {f"{prefix}{name}": value.half() if value.is_floating_point() else value for name, value in state.items()}
    read = read_released_student(write(tmp_path / "model-best.pth.tar", named))
    assert set(read.tower_state) == set(tower.state_dict())
    assert read.vision_tokens.shape == ((depth, 4, 32) if depth else (1, 0, 32))
    linear = own.state_dict()["conv1.0.weight"][:, :, 0, 0]
    torch.testing.assert_close(read.projector_state["0.weight"], linear, atol=1e-3, rtol=0)
    assert float(read.log_scale) == 3.5
    assert {value.dtype for value in read.tower_state.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("removed", "changes", "message"),
    [
        ("VPT_image_trans", {}, "no VPT_image_trans"),
        ("logit_scale", {}, "no logit_scale"),
        ("image_encoder.class_embedding", {}, "no vision transformer as image encoder"),
        ("nothing", {"image_encoder.proj": torch.full((32, 12), torch.nan)}, "NaN or infinite"),
    ],
)
def test_a_file_without_its_parts_is_refused(
    tmp_path: Path, removed: str, changes: dict[str, torch.Tensor], message: str
) -> None:
    state, _, _ = released_student(0)
    kept = {name: value for name, value in state.items() if not name.startswith(removed)} | changes
    path = write(tmp_path / "odd.pt", kept)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_released_student(path)
    assert caught.value.path == path


def test_a_student_is_not_taken_for_a_teacher_or_for_clip(tmp_path: Path) -> None:
    path = write(tmp_path / "student.pt", released_student(2)[0])
    with pytest.raises(CheckpointError) as caught:
        read_released(path)
    assert "import-student" in str(caught.value.remedy)
    with pytest.raises(ModelError) as refused:
        build_clip(Model(config={**CONFIG, **TEXT}, weights=str(path)))
    assert "import-student" in str(refused.value.remedy)
    assert set(read_weights(path)) == {"state_dict", "epoch", "val_result"}
