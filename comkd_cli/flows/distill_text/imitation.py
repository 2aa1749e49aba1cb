"""What a small text encoder minimises, and its figures on names that it is not trained on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from comkd_cli.data.batches import Batch
from comkd_cli.edge.clip_tokenizer import Tokenizer
from comkd_cli.evaluation.text_encoders import name_figures
from comkd_cli.flows.distill_text.prompt_set import PromptSet, padded
from comkd_cli.models.text_student import TextStudent
from comkd_cli.training.task import Objective, StepResult

TEXTS_AT_ONCE = 256


class Imitation(Objective):
    """1 - cos(u, t) + 1 - cos(u - m, t - m): the encoder's vector u of a prompt, the teacher's t, and their mean m.

    The first term is half the squared distance of the unit vectors. Text vectors of CLIP have much in common, and the
    first term alone is small before names are told apart; the second one is not (this project's choice).

    sets: the names to train on and the held-out ones. vectors: the teacher's, of the prompts of each set.
    """

    def __init__(
        self,
        module: TextStudent,
        tokenizer: Tokenizer,
        sets: tuple[PromptSet, PromptSet],
        vectors: Sequence[np.ndarray],
        device: torch.device,
    ) -> None:
        self._module, self._tokenizer, self._device = module, tokenizer, device
        trained, self._held = sets
        self._expected = self._held.name_vectors(vectors[1])
        self._constant = trained.name_vectors(vectors[0]).mean(axis=0)
        self.mean = torch.from_numpy(vectors[0].astype(np.float32).mean(axis=0)).to(device)
        """m: (dim,), of the prompts to train on."""

    def loss(self, model: nn.Module, batch: Batch, probe: bool) -> StepResult:
        """batch: inputs are tokens (prompts, context) and the teacher's vectors (prompts, dim)."""
        tokens, targets = batch.inputs
        found = model(tokens)
        whole = (1 - nn.functional.cosine_similarity(found, targets)).mean()
        centred = (1 - nn.functional.cosine_similarity(found - self.mean, targets - self.mean)).mean()
        return StepResult(whole + centred, {"cosine_loss": whole, "centred_loss": centred})

    def evaluate(self) -> dict[str, float]:
        """Figures of names that are not trained on."""
        found = encode_texts(self._module, self._tokenizer, self._held.prompts, self._device)
        return name_figures(self._held.name_vectors(found), self._expected, self._constant)


@torch.no_grad()
def encode_texts(module: TextStudent, tokenizer: Tokenizer, texts: Sequence[str], device: torch.device) -> np.ndarray:
    """The vectors of texts, float32 (texts, dim)."""
    module.eval().to(device)
    parts = []
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        tokens = padded([tokenizer.encode(text) for text in texts[start : start + TEXTS_AT_ONCE]], tokenizer)
        parts.append(module(tokens.to(device)).cpu().numpy())
    return np.concatenate(parts)
