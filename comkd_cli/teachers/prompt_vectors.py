"""A teacher's vectors of many prompts: computed once, stored block by block, so that an interrupted run resumes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from comkd_cli.events import Progress, Report
from comkd_cli.files import atomic_write, sha256_of_data
from comkd_cli.method.teacher import encode_classes
from comkd_cli.models.backbones import Clip

BLOCK = 512  # prompts of a file
AT_ONCE = 128  # prompts of a forward pass


@dataclass(frozen=True)
class PromptVectors:
    """The vectors of prompts by one teacher, kept in a folder."""

    clip: Clip
    """The text half of the teacher, on `device`."""
    teacher_key: str
    """A digest of what the teacher was made of; vectors of another one are not read."""
    folder: Path
    device: torch.device
    report: Report

    def of(self, prompts: Sequence[str], check_stop: Callable[[], None]) -> np.ndarray:
        """L2-normalised vectors, float16 (prompts, dim): their rounding changes a cosine by less than 1e-6.

        check_stop: called before each block is computed; it may raise. Raises WriteError.
        """
        blocks = []
        for start in range(0, len(prompts), BLOCK):
            texts = list(prompts[start : start + BLOCK])
            path = self.folder / f"{sha256_of_data([self.teacher_key, texts])}.npy"
            stored = _read(path, len(texts))
            if stored is None:
                check_stop()
                stored = self._encode(texts)
                with atomic_write(path) as unfinished, unfinished.open("wb") as stream:
                    np.save(stream, stored)
            blocks.append(stored)
            self.report(Progress("teacher's vectors", start + len(texts), len(prompts), unit="prompts"))
        return np.concatenate(blocks)

    @torch.inference_mode()
    def _encode(self, texts: Sequence[str]) -> np.ndarray:
        parts = torch.split(self.clip.tokenize(texts).to(self.device), AT_ONCE)
        vectors = torch.cat([encode_classes(self.clip.model, part) for part in parts])
        return np.asarray(vectors.half().cpu().numpy())


def _read(path: Path, rows: int) -> np.ndarray | None:
    """A stored block; None if there is none or it is damaged."""
    try:
        block = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    usable = block.dtype == np.float16 and block.ndim == 2 and len(block) == rows and np.isfinite(block).all()
    return np.asarray(block) if usable else None
