"""CLIPs with learned prompts in both encoders: new ones, those of a teacher.pt, and released checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from comkd_cli.errors import CheckpointError, ModelError
from comkd_cli.events import Notice, Report, ignore_event
from comkd_cli.method.prompt_src import INITIAL_CONTEXT, PromptedClip, class_prompt
from comkd_cli.models.backbones import Clip, build_clip, load_clip_state, state_sha256
from comkd_cli.models.checkpoints import SavedTeacher, TeacherRecord
from comkd_cli.recipe.model import Model, Teacher
from comkd_cli.teachers.class_vectors import CLASSES_AT_ONCE, tokenize_prompts
from comkd_cli.teachers.promptsrc_checkpoint import START_EMBEDDING, WORD_EMBEDDINGS, ReleasedTeacher, read_released

ROUNDING = 2**-8  # of an embedding that was saved in half precision, relative to its largest value


@dataclass(frozen=True)
class Prompted:
    """A CLIP with learned prompts, with its tokenizer and pre-processing."""

    module: PromptedClip
    clip: Clip

    def tokens(self, class_names: Sequence[str], report: Report = ignore_event) -> Tensor:
        """Token ids (classes, context) of the class prompts, with placeholders for the learned tokens."""
        return tokenize_prompts(self.clip, class_names, class_prompt("{}", self.module.text.count), report)


def prompted_clip(clip: Clip, vision_depth: int, text_depth: int, tokens: int, seed: int = 0) -> Prompted:
    """A frozen CLIP with new prompts, drawn from the seed. Raises ModelError."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        module = PromptedClip(clip.model, clip.tokenize([INITIAL_CONTEXT]), tokens, vision_depth, text_depth)
    return Prompted(module, clip)


def frozen_clip(record: TeacherRecord, path: Path) -> Clip:
    """The CLIP that a teacher.pt was adapted on. Raises CheckpointError where it has other weights; ModelError."""
    clip = build_clip(Model(**record.model))
    if (found := state_sha256(clip.model)) != record.backbone_sha256:
        raise CheckpointError(
            f"was adapted on other weights than those of {record.origin.weights or record.origin.architecture} (sha256 "
            f"of the tensors {record.backbone_sha256})",
            path=path,
            found=found,
            remedy="restore the weights that it was trained with",
        )
    return clip


def saved_prompted(saved: SavedTeacher, path: Path) -> Prompted:
    """The prompted CLIP of a teacher.pt. Raises CheckpointError where its backbone has other weights; ModelError."""
    tokens = saved.prompts
    assert tokens is not None  # the caller checked it
    clip = frozen_clip(saved.record, path)
    prompted = prompted_clip(clip, tokens["vision"].shape[0], tokens["text"].shape[0], tokens["text"].shape[1])
    _set_prompts(prompted.module, tokens, path)
    return prompted


def released_prompted(settings: Teacher, report: Report = ignore_event) -> Prompted:
    """A PromptSRC or PromptKD checkpoint on the architecture of the recipe. Raises ModelError, CheckpointError.

    Such a file lacks the table of word embeddings. It comes from another CLIP and is compared with the embeddings of
    the file's own class prompts.
    """
    path = Path(str(settings.weights)).expanduser()
    released = read_released(path)
    base = settings.backbone_weights or ("openai" if settings.arch is not None else None)
    needs_base = "token_embedding.weight" not in released.clip_state
    if needs_base and base is None:
        raise ModelError(
            "lacks the table of word embeddings, as all PromptSRC checkpoints do",
            path=path,
            field="teacher.backbone_weights",
            remedy="set it to the CLIP that the checkpoint was trained on",
        )
    clip = build_clip(Model(arch=settings.arch, config=settings.config, weights=base), load_weights=needs_base)
    if clip.origin.activation != "quick_gelu":
        raise ModelError(
            "PromptSRC's teachers are OpenAI CLIPs, which were trained with QuickGELU and lose accuracy without it",
            field="teacher.arch" if settings.arch else "teacher.config",
            found=clip.origin.architecture,
            remedy=f"use {f'{settings.arch}-quickgelu' if settings.arch else 'quick_gelu: true in its config'}",
        )
    load_clip_state(clip, released.clip_state, path)
    _check_word_embeddings(clip, released, path, str(base) if needs_base else None, report)
    return _with_released_prompts(clip, released, path)


def _with_released_prompts(clip: Clip, released: ReleasedTeacher, path: Path) -> Prompted:
    """The CLIP with the prompts of the file. Raises CheckpointError where they do not fit its architecture."""
    vision_depth, text_depth = released.vision_tokens.shape[0], released.text_tokens.shape[0]
    count, context = released.text_tokens.shape[1], clip.tokenize([""]).shape[1]
    if count + 2 > context:
        raise CheckpointError(
            "its text tokens do not fit into the architecture's context",
            path=path,
            found=count,
            allowed=f"at most {context - 2}",
        )
    try:
        prompted = prompted_clip(clip, vision_depth, text_depth, count)
    except ModelError as error:
        raise CheckpointError(
            f"its prompts are {vision_depth} layers deep in the image encoder and {text_depth} in the text encoder, "
            f"more than {clip.origin.architecture} has",
            path=path,
            remedy="set teacher.arch to the architecture that it was trained on",
        ) from error
    _set_prompts(prompted.module, {"vision": released.vision_tokens, "text": released.text_tokens}, path)
    return prompted


def _check_word_embeddings(clip: Clip, released: ReleasedTeacher, path: Path, base: str | None, report: Report) -> None:
    """Refuse a table of word embeddings other than the one that the prompts of the file were learned with.

    base: the CLIP that the table came from, as the recipe names it; None for the file's own.
    """
    text: Any = getattr(clip.model, "text", clip.model)
    table: Tensor = text.token_embedding.weight.detach()
    start = table[int(clip.tokenize([""])[0, 0])][None]
    for name, embeddings, rows in (
        (START_EMBEDDING, released.start_embedding, start),
        (WORD_EMBEDDINGS, released.word_embeddings, table),
    ):
        if embeddings is not None and (mismatch := _mismatch(embeddings, rows)):
            raise ModelError(
                f"its prompts were learned with other word embeddings than {base or 'its own table'}",
                path=path,
                found=f"{name} {mismatch}",
                remedy="set teacher.backbone_weights to the CLIP that it was trained on",
            )
    if base is not None and released.start_embedding is None:
        report(
            Notice(
                f"{path}: has no {START_EMBEDDING}, so that the word embeddings of {base} cannot be compared with "
                "those that its prompts were learned with; with another CLIP's the teacher answers wrongly"
            )
        )


def _mismatch(embeddings: Tensor, table: Tensor) -> str | None:
    """How the embeddings, (tokens, width), differ from their nearest rows of a table; None where they agree."""
    if embeddings.shape[1] != table.shape[1]:
        return f"is {embeddings.shape[1]} wide, and the table {table.shape[1]}"
    nearest = torch.cat([torch.cdist(part, table).argmin(dim=1) for part in torch.split(embeddings, CLASSES_AT_ONCE)])
    size = embeddings.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
    error = float(((embeddings - table[nearest]).abs().amax(dim=1) / size).max())
    return f"is off by {error:.0%} of its size" if error > ROUNDING else None


def _set_prompts(module: PromptedClip, tokens: Mapping[str, Tensor], path: Path) -> None:
    """Replace the prompts by those of a file; the image encoder may have another number of them than the text's."""
    for name, prompts in (("vision", module.vision), ("text", module.text)):
        found, expected = tokens[name].shape[2], prompts.tokens.shape[2]
        if found != expected:
            raise CheckpointError(
                f"its {name} prompts do not have the width of the architecture's tokens",
                path=path,
                found=found,
                allowed=[expected],
                remedy="set teacher.arch to the architecture that it was trained on",
            )
        prompts.tokens = nn.Parameter(tokens[name].clone(), requires_grad=prompts.tokens.requires_grad)
