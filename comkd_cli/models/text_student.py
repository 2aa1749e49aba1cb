"""A small text encoder and its file, text_student.pt: plain data, loaded with weights_only=True."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from comkd_cli.edge.clip_tokenizer import BYTE_TOKENS, END, START, Tokenizer
from comkd_cli.errors import CheckpointError, ModelError
from comkd_cli.models.costs import parameters
from comkd_cli.models.plain_data import check_plain, check_tensors, checked_texts, load_plain, reason_of, save_plain

TEXT_FORMAT = "comkd-text/1"
CONTEXT = 77  # CLIP's; the positions are not learned, so no prompt is longer than those of the training
ALWAYS = (*BYTE_TOKENS, START, END)
"""Tokens of every vocabulary: with those of bytes any name can be written."""
MASKED = -1e4  # added to the attention logits of padding; float16 holds it


class Shape(NamedTuple):
    """Sizes of a small text encoder."""

    width: int
    layers: int
    rank: int
    """Of the token embedding, (tokens, rank), which a matrix (rank, width) widens."""


# From large to small; the first that fits is used.
SHAPES = (
    *(Shape(512, 4, 128), Shape(448, 4, 128), Shape(384, 4, 128), Shape(320, 4, 96), Shape(256, 4, 64)),
    *(Shape(192, 4, 64), Shape(128, 3, 48), Shape(96, 2, 32), Shape(64, 2, 32), Shape(48, 1, 24), Shape(32, 1, 16)),
)
HEAD_WIDTH = 64


def choose_shape(most_parameters: int, dim: int) -> tuple[Shape, int]:
    """The largest shape whose transformer has at most half of the parameters, and how many tokens fit into the rest.

    Raises ModelError if none fits with the tokens of ALWAYS.
    """
    for shape in SHAPES:
        with torch.device("meta"):
            body = parameters(TextStudent(shape, 1, dim)) - shape.rank
        tokens = (most_parameters - body) // shape.rank
        if body <= most_parameters / 2 and tokens >= len(ALWAYS):
            return shape, int(tokens)
    raise ModelError(
        "the teacher's text encoder is too small to distil a smaller one",
        found=f"at most {most_parameters:,} parameters for the smaller one",
        remedy="export the teacher's own with --text",
    )


class Block(nn.Module):
    """A pre-norm transformer block in which each token attends to all tokens that are not padding."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = max(1, width // HEAD_WIDTH)
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """x: (texts, tokens, width); bias: (texts, 1, 1, tokens), added to the attention logits."""
        texts, tokens, width = x.shape
        heads = self.qkv(self.norm_1(x)).view(texts, tokens, 3, self.heads, width // self.heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)
        weights = (query @ key.transpose(-2, -1) / math.sqrt(width // self.heads) + bias).softmax(dim=-1)
        x = x + self.out((weights @ value).transpose(1, 2).reshape(texts, tokens, width))
        result: Tensor = x + self.mlp(self.norm_2(x))
        return result


class TextStudent(nn.Module):
    """From token ids of a pruned vocabulary to L2-normalised text features.

    tokens: the size of the vocabulary, whose tokens count from 1; 0 is padding, and the last token ends a text. dim: of
    the features.
    """

    positions: Tensor

    def __init__(self, shape: Shape, tokens: int, dim: int) -> None:
        super().__init__()
        self.end = tokens
        self.embedding = nn.Embedding(tokens, shape.rank)
        self.widen = nn.Linear(shape.rank, shape.width, bias=False)
        self.register_buffer("positions", sinusoids(CONTEXT, shape.width), persistent=False)
        self.blocks = nn.ModuleList(Block(shape.width) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        self.project = nn.Linear(shape.width, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: int64 (texts, tokens), at most CONTEXT. Returns float32 (texts, dim)."""
        real = tokens > 0
        x = self.widen(self.embedding((tokens - 1).clamp(min=0))) + self.positions[: tokens.shape[1]]
        bias = (~real)[:, None, None, :].to(x.dtype) * MASKED
        for block in self.blocks:
            x = block(x, bias)
        last = (x * (tokens == self.end)[:, :, None].to(x.dtype)).sum(dim=1)
        return nn.functional.normalize(self.project(self.norm(last)).float(), dim=-1)


def sinusoids(count: int, width: int) -> Tensor:
    """The position encodings of "Attention Is All You Need" (arXiv 1706.03762, section 3.5), (count, width).

    The sines come first, then the cosines.
    """
    rates = torch.exp(-math.log(10_000) * torch.arange(0, width, 2) / width)
    angles = torch.arange(count)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)


@dataclass(frozen=True)
class TextRecord:
    """The content of text_student.pt, except the weights."""

    shape: Shape
    vocabulary: tuple[int, ...]
    """The tokens of CLIP that it has, ascending."""
    merges: str
    """Of CLIP's tokenizer, a pair of symbols per line."""
    templates: tuple[str, ...]
    """Prompts of the teacher, with `{}` for the class name."""
    class_names: tuple[str, ...]
    """Of the run."""
    class_vectors: Tensor
    """(classes, dim), L2-normalised: the teacher's vectors of these classes, by which the teacher is recognised."""
    teacher_parameters: int
    """Of the teacher's text encoder."""
    parameters: int
    metrics: dict[str, float]
    """Of held-out names, and of images."""
    context_length: int = CONTEXT

    def tokenizer(self) -> Tokenizer:
        """From texts to the encoder's tokens."""
        return Tokenizer(self.merges, self.context_length, self.vocabulary)


def new_text_student(shape: Shape, vocabulary: Sequence[int], dim: int, seed: int) -> TextStudent:
    """A text encoder with random weights, drawn from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return TextStudent(shape, len(vocabulary), dim)


@torch.no_grad()
def copy_embedding(module: TextStudent, table: Tensor, vocabulary: Sequence[int]) -> None:
    """Start each token at the teacher's vector of it, along the principal axes of the vocabulary's vectors.

    A token of few names then has a meaning before it is trained. table: (tokens of CLIP, width). The coordinates are
    scaled to a standard deviation of 1; those beyond the teacher's width are 0.
    """
    rows = table[list(vocabulary)].float()
    rows = rows - rows.mean(dim=0)
    _, axes = torch.linalg.eigh(rows.T @ rows)  # ascending
    coordinates = rows @ axes.flip(1)[:, : module.embedding.embedding_dim]
    weight = torch.zeros_like(module.embedding.weight)
    weight[:, : coordinates.shape[1]] = coordinates / coordinates.std()
    module.embedding.weight.copy_(weight)


def save_text_student(path: Path, module: TextStudent, record: TextRecord) -> None:
    """Write text_student.pt atomically. Raises ComkdError."""
    plain = {name: value for name, value in asdict(record).items() if name not in ("shape", "vocabulary")}
    save_plain(
        path,
        {
            "format": TEXT_FORMAT,
            **plain,
            "templates": list(record.templates),
            "class_names": list(record.class_names),
            "class_vectors": record.class_vectors.cpu(),
            "shape": record.shape._asdict(),
            "vocabulary": torch.tensor(record.vocabulary, dtype=torch.int32),
            "state_dict": {name: value.cpu() for name, value in module.state_dict().items()},
        },
    )


def load_text_student(path: Path) -> tuple[TextStudent, TextRecord]:
    """The text encoder of a text_student.pt, on the CPU and in evaluation mode. Raises CheckpointError."""
    record, state = load_text_state(path)
    try:
        module = TextStudent(record.shape, len(record.vocabulary), record.class_vectors.shape[1])
        module.load_state_dict(state)
    except Exception as error:  # any shape of damaged content
        raise _damaged(path, error) from error
    return module.eval(), record


def load_text_state(path: Path) -> tuple[TextRecord, dict[str, Tensor]]:
    """The record and the weights of a text_student.pt, without building the encoder. Raises CheckpointError."""
    data = load_plain(path, TEXT_FORMAT, "a text encoder")
    try:
        record = TextRecord(
            shape=Shape(**data["shape"]),
            vocabulary=tuple(data["vocabulary"].tolist()),
            merges=data["merges"],
            templates=checked_texts(data["templates"]),
            class_names=checked_texts(data["class_names"]),
            class_vectors=data["class_vectors"],
            teacher_parameters=int(data["teacher_parameters"]),
            parameters=int(data["parameters"]),
            metrics=data["metrics"],
            context_length=int(data["context_length"]),
        )
        check_plain(data, ("merges",), ())
        check_tensors(path, {**data, "logit_scale": torch.ones(())}, record.class_names)
        _check_vocabulary(record)
    except CheckpointError:
        raise
    except Exception as error:  # any shape of damaged content
        raise _damaged(path, error) from error
    return record, data["state_dict"]


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"is a damaged text encoder: {reason_of(error)}", path=path)


def _check_vocabulary(record: TextRecord) -> None:
    """Raise ValueError for tokens that CLIP does not have, or merges that are not CLIP's."""
    if list(record.vocabulary) != sorted(set(record.vocabulary)) or not record.vocabulary[0] >= 0:
        raise ValueError("its vocabulary should be ascending tokens")
    if record.vocabulary[-1] != END or not record.templates:
        raise ValueError("its vocabulary should end with the token that ends a text, and it should have templates")
    record.tokenizer()
