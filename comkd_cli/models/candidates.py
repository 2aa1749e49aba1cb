"""Teachers and compact students that `comkd init` proposes, and which of their weights are on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import open_clip
import timm
from huggingface_hub import try_to_load_from_cache

from comkd_cli.recipe.model import Model

OPEN_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
TIMM_FILES = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class TeacherCandidate:
    """A CLIP of open_clip with weights."""

    arch: str
    weights: str


@dataclass(frozen=True)
class StudentCandidate:
    """An image tower of timm."""

    timm_name: str
    pool: str
    """How open_clip pools its output, `avg` or `token`."""
    proj: str
    """`linear` projects to embed_dim; `none` keeps the tower's own width, which embed_dim then is."""
    embed_dim: int
    any_size: bool
    """Whether it accepts images of any size, as convolutional networks do; others use FIXED_SIZE."""

    def config(self, image_size: int, pretrained: bool) -> dict[str, Any]:
        """open_clip's config of the tower. image_size: in pixels."""
        vision: dict[str, Any] = {
            "timm_model_name": self.timm_name,
            "timm_model_pretrained": pretrained,
            "timm_pool": self.pool,
            "timm_proj": self.proj,
            "image_size": image_size if self.any_size else FIXED_SIZE,
        }
        return {"embed_dim": self.embed_dim, "vision_cfg": vision}

    @property
    def base_name(self) -> str:
        """The name of the architecture, without that of its weights."""
        return self.timm_name.partition(".")[0]


FIXED_SIZE = 224

# From the smallest. Both have the activation function and the sizes that the paper's own pairs have.
TEACHERS = (TeacherCandidate("ViT-B-16-quickgelu", "openai"), TeacherCandidate("ViT-L-14-quickgelu", "openai"))

# From the largest. All are trained on ImageNet and free for any use (Apache-2.0).
STUDENTS = (
    StudentCandidate("vit_small_patch16_224.augreg_in21k_ft_in1k", "token", "linear", 512, any_size=False),
    StudentCandidate("mobilenetv4_conv_medium.e500_r224_in1k", "avg", "none", 1280, any_size=True),
    StudentCandidate("vit_tiny_patch16_224.augreg_in21k_ft_in1k", "token", "linear", 512, any_size=False),
    StudentCandidate("mobilenetv4_conv_small.e2400_r224_in1k", "avg", "none", 1280, any_size=True),
    StudentCandidate("mobilenetv3_small_100.lamb_in1k", "avg", "none", 1024, any_size=True),
    StudentCandidate("mobilenetv4_conv_small_050.e3000_r224_in1k", "avg", "none", 1280, any_size=True),
    StudentCandidate("mobilenetv3_small_050.lamb_in1k", "avg", "none", 1024, any_size=True),
    StudentCandidate("test_efficientnet.r160_in1k", "avg", "none", 256, any_size=True),
)


def untrained_teacher(image_size: int) -> dict[str, Any]:
    """The config of a small CLIP that learns only from labelled images, as in recipes/cifar10.yaml.

    image_size: in pixels, a multiple of 32.
    """
    return {
        "embed_dim": 64,
        "vision_cfg": {"image_size": image_size, "layers": [1, 1, 1, 1], "width": 16, "head_width": 32},
        "text_cfg": {"context_length": 32, "width": 64, "heads": 2, "layers": 2},
    }


def teacher_is_local(candidate: TeacherCandidate) -> bool:
    """Whether the weights of a teacher are in the cache of the Hugging Face Hub, where open_clip looks first."""
    tag: Mapping[str, Any] = open_clip.get_pretrained_cfg(candidate.arch, candidate.weights)
    repository, _, name = str(tag.get("hf_hub", "")).rpartition("/")
    return _is_cached(repository, (name,) if name else OPEN_CLIP_FILES)


def student_is_local(candidate: StudentCandidate) -> bool:
    """Whether the weights of a student are in the cache of the Hugging Face Hub."""
    settings = timm.get_pretrained_cfg(candidate.timm_name)
    return settings is not None and _is_cached(str(settings.hf_hub_id or ""), TIMM_FILES)


def teacher_model(candidate: TeacherCandidate) -> Model:
    """A candidate as a recipe names it."""
    return Model(arch=candidate.arch, weights=candidate.weights)


def _is_cached(repository: str, names: tuple[str, ...]) -> bool:
    # The cache also remembers files that the Hub does not have, as an object that is not a path.
    return bool(repository) and any(isinstance(try_to_load_from_cache(repository, name), str) for name in names)
