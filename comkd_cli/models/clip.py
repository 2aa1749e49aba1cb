"""What `backbones` builds: a CLIP or its image tower, with its pre-processing and where its weights come from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from comkd_cli.edge.images import Preprocessing


@dataclass(frozen=True)
class Origin:
    """The architecture and weights that a model started from."""

    architecture: str
    weights: str | None
    """The tag or file, as in the recipe."""
    weights_sha256: str | None
    """Of a local file; None for a tag or random weights."""
    activation: str
    """`quick_gelu` or `gelu`: weights trained with one silently lose accuracy with the other."""

    def __post_init__(self) -> None:
        """Raise TypeError for fields that are not text, as of a damaged checkpoint."""
        for name, value in vars(self).items():
            if value is not None and not isinstance(value, str):
                raise TypeError(f"{name} should be text, not {value!r}")


@dataclass(frozen=True)
class Clip:
    """Both towers of a CLIP, with its tokenizer and pre-processing."""

    model: nn.Module
    """An open_clip model: encode_image, encode_text, logit_scale, visual."""
    tokenize: Callable[[Sequence[str]], Tensor]
    """From texts to token ids (texts, context)."""
    preprocessing: Preprocessing
    origin: Origin


@dataclass(frozen=True)
class ImageTower:
    """The image tower of a CLIP."""

    module: nn.Module
    """From images (batch, 3, size, size) to features (batch, width), not normalised."""
    width: int
    preprocessing: Preprocessing
    origin: Origin
