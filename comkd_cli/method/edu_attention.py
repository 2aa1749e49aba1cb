"""EduAttention: the student's image features attend to the teacher's class vectors."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class EduAttention(nn.Module):
    """f_e = u_s + alpha * softmax(q K^T / sqrt(c)) V (ComKD-CLIP, arXiv 2408.04145, EduAttention).

    q = FC_q(n(u_s)) from the image features, K = FC_k(W) and V = FC_v(W) from the class vectors; n is
    L2-normalisation, alpha the learned gate. dim: d, the width of the teacher's embedding. scale: c; None uses d,
    which is this project's choice. gate_start: alpha at step 0; at 0 the student is exactly the one without
    EduAttention.
    """

    def __init__(self, dim: int, scale: float | None = None, gate_start: float = 0.0) -> None:
        super().__init__()
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.gate = nn.Parameter(torch.tensor(gate_start))
        self.sqrt_c = (dim if scale is None else scale) ** 0.5

    def forward(self, features: Tensor, class_vectors: Tensor) -> Tensor:
        """features: u_s, (batch, dim), as the projector returns them; class_vectors: (classes, dim), L2-normalised.

        Returns (batch, dim), not normalised.
        """
        query = self.query(nn.functional.normalize(features, dim=-1))
        attention = (query @ self.key(class_vectors).T / self.sqrt_c).softmax(dim=-1)
        attended: Tensor = features + self.gate * (attention @ self.value(class_vectors))
        return attended
