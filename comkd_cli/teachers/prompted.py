"""CLIPs with learned prompts in both encoders: new ones, those of a teacher.pt, and released checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
    context: str = INITIAL_CONTEXT
    """The words that the learned text tokens started from."""

    @property
    def template(self) -> str:
        """The prompt of a class, with `{}` for its name and placeholders for the learned tokens."""
        return class_prompt("{}", self.module.text.count, self.context)

    def tokens(self, class_names: Sequence[str], report: Report = ignore_event) -> Tensor:
        """Token ids (classes, context) of the class prompts, with placeholders for the learned tokens."""
        return tokenize_prompts(self.clip, class_names, self.template, report)


def prompted_clip(clip: Clip, vision_depth: int, text_depth: int, tokens: int, seed: int = 0) -> Prompted:
    """A frozen CLIP with new prompts, drawn from the seed. Raises ModelError."""
    _check_start_token(clip)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        module = PromptedClip(clip.model, clip.tokenize([INITIAL_CONTEXT]), tokens, vision_depth, text_depth)
    return Prompted(module, clip)


def _check_start_token(clip: Clip) -> None:
    """Refuse a tokenizer without a start token, such as SigLIP's: learned tokens would replace a part of the name."""
    with torch.device("cpu"):
        empty, words = clip.tokenize(["", INITIAL_CONTEXT])
    if int(empty[0]) != int(words[0]):
        raise ModelError(
            f"prompts cannot be learned for {clip.origin.architecture}, because its tokenizer adds no start token",
            field="teacher.adapt",
            remedy="use another teacher.adapt method, or adapt: none",
        )


def frozen_clip(record: TeacherRecord, path: Path) -> Clip:
    """The CLIP that a teacher.pt was adapted on. Raises CheckpointError if it has other weights; ModelError."""
    clip = build_clip(Model(**record.model))
    if (found := state_sha256(clip.model)) != record.backbone_sha256:
        raise CheckpointError(
            f"was adapted on different weights from those of {record.origin.weights or record.origin.architecture} "
            f"(sha256 of their tensors: {record.backbone_sha256})",
            path=path,
            found=found,
            remedy="restore the weights that it was trained with",
        )
    return clip


def saved_prompted(saved: SavedTeacher, path: Path) -> Prompted:
    """The prompted CLIP of a teacher.pt. Raises CheckpointError if its backbone has other weights; ModelError."""
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
    prompted = _with_released_prompts(clip, released, path)
    if settings.context is not None:
        prompted = replace(prompted, context=settings.context)
    _check_context(prompted, released, path, report)
    return prompted


def _check_context(prompted: Prompted, released: ReleasedTeacher, path: Path, report: Report) -> None:
    """Refuse a context whose words after the learned tokens are not those of the file's own class prompts.

    If it has no such words and every class of the file continues with the same token, report a Notice.
    """
    if released.following is None:
        return
    clip, count = prompted.clip, prompted.module.text.count
    text: Any = getattr(clip.model, "text", clip.model)
    words = clip.tokenize([prompted.template.replace("{}", "")])[0]
    # Without a name, the prompt ends in a full stop and the end token; the words before them follow the learned tokens.
    length = int((words == words.max()).nonzero()[0, 0]) - 1
    left = words[1 + count : min(length, 1 + count + released.following.shape[1])]
    expected = text.token_embedding.weight.detach()[left]
    found = released.following[:, : len(left)]
    if len(left) and float((found - expected).abs().max()) > ROUNDING * float(expected.abs().max()):
        raise CheckpointError(
            "its prompts were learned with different words after the learned tokens",
            path=path,
            field="teacher.context",
            found=repr(prompted.context),
            remedy="set it to the CTX_INIT of the run that wrote the file",
        )
    first = released.following[:, 0]
    if not len(left) and len(first) > 2 and bool((first == first[0]).all()):
        report(
            Notice(
                f"{path}: every class prompt of the file continues with the same word after the {count} learned tokens"
                "; if its CTX_INIT was not 'a photo of a', set teacher.context to it"
            )
        )


def _with_released_prompts(clip: Clip, released: ReleasedTeacher, path: Path) -> Prompted:
    """The CLIP with the prompts of the file. Raises CheckpointError if they do not fit its architecture."""
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
            f"its prompts ({vision_depth} layers in the image encoder, {text_depth} in the text encoder) do not fit "
            f"{clip.origin.architecture}: {error.problem}",
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
                f"its prompts were learned with word embeddings that differ from those of {base or 'its own table'}",
                path=path,
                found=f"{name} {mismatch}",
                remedy="set teacher.backbone_weights to the CLIP that it was trained on",
            )
    if base is not None and released.start_embedding is None:
        report(
            Notice(
                f"{path}: has no {START_EMBEDDING}, so the word embeddings of {base} cannot be compared with those "
                "that its prompts were learned with; with those of another CLIP, the teacher's answers are wrong"
            )
        )


def _mismatch(embeddings: Tensor, table: Tensor) -> str | None:
    """How the embeddings, (tokens, width), differ from their nearest rows of a table; None if they agree."""
    if embeddings.shape[1] != table.shape[1]:
        return f"has width {embeddings.shape[1]}, but the table has width {table.shape[1]}"
    nearest = torch.cat([torch.cdist(part, table).argmin(dim=1) for part in torch.split(embeddings, CLASSES_AT_ONCE)])
    size = embeddings.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
    error = float(((embeddings - table[nearest]).abs().amax(dim=1) / size).max())
    return f"differs by {error:.0%} of its size" if error > ROUNDING else None


def _set_prompts(module: PromptedClip, tokens: Mapping[str, Tensor], path: Path) -> None:
    """Replace the prompts by those of a file; the two encoders may have different numbers of prompts."""
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
