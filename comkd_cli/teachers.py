"""A teacher ready to be asked: from a model's own weights, a released checkpoint, or a saved teacher.pt."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from comkd_cli.backbones import Clip, build_clip, build_image_tower, load_clip_state, state_sha256
from comkd_cli.checkpoints import SavedTeacher, StudentRecord, load_teacher
from comkd_cli.errors import CheckpointError, DataError, ModelError
from comkd_cli.method import teacher as method
from comkd_cli.method.prompt_src import INITIAL_CONTEXT, PromptedClip, class_prompt
from comkd_cli.predictor import Preprocessing
from comkd_cli.recipe.model import Model, Teacher
from comkd_cli.released import read_released

CLASSES_AT_ONCE = 256


@dataclass(frozen=True)
class ReadyTeacher:
    """A frozen teacher and what is known of it."""

    teacher: method.Teacher
    preprocessing: Preprocessing
    checkpoint: Path | None
    """teacher.pt, for an adapted teacher."""


def made_teacher(settings: Teacher, class_names: Sequence[str], template: str, device: torch.device) -> ReadyTeacher:
    """A teacher as its weights are: a CLIP with the class vectors of `template`, or a released one with its
    own prompts, which replace the template's words. Raises ModelError or CheckpointError.
    """
    if settings.format == "promptsrc":
        return prompted_teacher(released_clip(settings), class_names, device)
    return teacher_of_clip(build_clip(settings), [template.replace("{}", name) for name in class_names], device)


def teacher_of_clip(clip: Clip, prompts: Sequence[str], device: torch.device) -> ReadyTeacher:
    """A CLIP that is at hand, as a teacher with the class vectors of these prompts."""
    clip.model.to(device)
    vectors = encode_prompts(clip, prompts, device)
    teacher = method.Teacher(clip.model.visual, vectors, clip.model.logit_scale.detach().exp())  # type: ignore[arg-type,operator]
    return ReadyTeacher(teacher, clip.preprocessing, None)


@dataclass(frozen=True)
class Prompted:
    """A CLIP with learned prompts, and what turns its inputs into tensors."""

    module: PromptedClip
    clip: Clip

    def tokens(self, class_names: Sequence[str]) -> Tensor:
        """Token ids (classes, context) of the class prompts, with placeholders for the learned tokens."""
        return tokenize_apart(self.clip, [class_prompt(name, self.module.text.count) for name in class_names])


def prompted_clip(clip: Clip, vision_depth: int, text_depth: int, tokens: int, seed: int = 0) -> Prompted:
    """A frozen CLIP with new prompts, drawn from the seed. Raises ModelError."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        module = PromptedClip(clip.model, clip.tokenize([INITIAL_CONTEXT]), tokens, vision_depth, text_depth)
    return Prompted(module, clip)


def released_clip(settings: Teacher) -> Prompted:
    """A PromptSRC or PromptKD checkpoint, on the architecture of the recipe. Raises ModelError, CheckpointError."""
    path = Path(str(settings.weights)).expanduser()
    released = read_released(path)
    base = settings.backbone_weights or ("openai" if settings.arch is not None else None)
    needs_base = "token_embedding.weight" not in released.clip_state
    if needs_base and base is None:
        raise ModelError(
            f"{path}: lacks the table of word embeddings, as all PromptSRC checkpoints do; give the CLIP that it was "
            "trained on as teacher.backbone_weights"
        )
    model = Model(arch=settings.arch, config=settings.config, weights=base)
    clip = build_clip(model, load_weights=needs_base)
    if clip.origin.activation != "quick_gelu":
        better = f"{settings.arch}-quickgelu" if settings.arch else "quick_gelu: true in its config"
        raise ModelError(
            f"{clip.origin.architecture}: PromptSRC's teachers are OpenAI CLIPs, which were trained with QuickGELU and "
            f"lose accuracy silently without it; use {better}"
        )
    load_clip_state(clip, released.clip_state, path)
    depths, count = (released.vision_tokens.shape[0], released.text_tokens.shape[0]), released.text_tokens.shape[1]
    if count + 2 > clip.tokenize([""]).shape[1]:
        raise CheckpointError(f"{path}: its {count} text tokens do not fit into the architecture's context")
    try:
        prompted = prompted_clip(clip, *depths, tokens=count)
    except ModelError as error:
        raise CheckpointError(
            f"{path}: its prompts are {depths[0]} layers deep in the image and {depths[1]} in the text encoder, more "
            f"than {clip.origin.architecture} has; teacher.arch is another than its own"
        ) from error
    _set_prompts(prompted.module, {"vision": released.vision_tokens, "text": released.text_tokens}, path)
    return prompted


def _set_prompts(module: PromptedClip, tokens: Mapping[str, Tensor], path: Path) -> None:
    """Replace the prompts by those of a file; the image encoder may have another number of them than the text's."""
    for name, prompts in (("vision", module.vision), ("text", module.text)):
        if tokens[name].shape[2] != prompts.tokens.shape[2]:
            raise CheckpointError(
                f"{path}: its {name} prompts are {tokens[name].shape[2]} wide and the architecture's tokens "
                f"{prompts.tokens.shape[2]}; teacher.arch is another than its own"
            )
        prompts.tokens = nn.Parameter(tokens[name].clone(), requires_grad=prompts.tokens.requires_grad)


def prompted_teacher(
    prompted: Prompted, class_names: Sequence[str], device: torch.device, checkpoint: Path | None = None
) -> ReadyTeacher:
    """A prompted CLIP as a frozen teacher, with the class vectors of any class names."""
    module = prompted.module.to(device)
    with torch.no_grad():
        vectors = module.encode_classes(prompted.tokens(class_names).to(device))
    return ReadyTeacher(
        method.Teacher(module.vision, vectors, module.logit_scale), prompted.clip.preprocessing, checkpoint
    )


def saved_teacher(path: Path, class_names: Sequence[str], device: torch.device, key: str | None = None) -> ReadyTeacher:
    """The teacher of a teacher.pt, with the class vectors of these names.

    Raises CheckpointError, also where its key is not the given one, or where it can't name other classes
    than its own; ModelError where the backbone that its prompts stand on can't be had.
    """
    saved = load_teacher(path)
    if key is not None and saved.record.key != key:
        raise CheckpointError(f"{path}: is another teacher than its folder says; remove {path.parent} to train it anew")
    if saved.prompts is not None:
        return prompted_teacher(_saved_prompted(saved, path), class_names, device, path)
    if tuple(class_names) != saved.record.class_names:
        raise CheckpointError(f"{path}: was taught {len(saved.record.class_names)} classes, other than the data's")
    return ReadyTeacher(_restored(saved, path), saved.record.preprocessing, path)


def _saved_prompted(saved: SavedTeacher, path: Path) -> Prompted:
    record, tokens = saved.record, saved.prompts
    assert tokens is not None  # as the caller made sure
    clip = build_clip(Model(**record.model))
    if state_sha256(clip.model) != record.backbone_sha256:
        raise CheckpointError(
            f"{path}: its prompts were learned on other weights than "
            f"{record.origin.weights or record.origin.architecture} holds now (sha256 of its tensors "
            f"{record.backbone_sha256}); give it those it was trained with"
        )
    prompted = prompted_clip(clip, tokens["vision"].shape[0], tokens["text"].shape[0], tokens["text"].shape[1])
    _set_prompts(prompted.module, tokens, path)
    return prompted


@dataclass(frozen=True)
class ClassEncoder:
    """The text half of a teacher: what makes class vectors of class names."""

    clip: Clip
    """Its text encoder holds the learned prompts, where there are some."""
    prompt: str
    """`{}` stands for the name; learned prompts replace the words before it."""

    def tokens(self, class_names: Sequence[str]) -> Tensor:
        """Token ids (classes, context) of the class prompts."""
        return tokenize_apart(self.clip, [self.prompt.replace("{}", name) for name in class_names])


def class_encoder(record: StudentRecord, student_file: Path) -> ClassEncoder:
    """The text half of a student's teacher, on the CPU. Raises CheckpointError or ModelError."""
    settings = record.recipe.teacher
    if record.teacher is None:
        if settings.format == "promptsrc":
            return _prompted_encoder(released_clip(settings))
        return ClassEncoder(build_clip(settings), record.template)
    path = Path(os.path.normpath(student_file.parent / record.teacher))
    saved = load_teacher(path)
    if saved.prompts is not None:
        return _prompted_encoder(_saved_prompted(saved, path))
    clip = build_clip(Model(**saved.record.model), load_weights=False)
    load_clip_state(clip, saved.state_dict, path)
    return ClassEncoder(clip, saved.record.template)


def _prompted_encoder(prompted: Prompted) -> ClassEncoder:
    return ClassEncoder(prompted.clip, class_prompt("{}", prompted.module.text.count))


@torch.no_grad()
def encode_prompts(clip: Clip, prompts: Sequence[str], device: torch.device) -> Tensor:
    """Class vectors (classes, dim) of prompts, L2-normalised, a part of them at a time."""
    tokens = tokenize_apart(clip, prompts).to(device)
    return torch.cat([method.encode_classes(clip.model, part) for part in torch.split(tokens, CLASSES_AT_ONCE)])


def tokenize_apart(clip: Clip, prompts: Sequence[str]) -> Tensor:
    """Token ids (prompts, context) of prompts that differ. Raises DataError where two become the same.

    open_clip cuts a prompt at the context's length without a word; classes that differ only beyond it could
    never be told apart.
    """
    tokens = clip.tokenize(list(prompts))
    first: dict[tuple[int, ...], str] = {}
    for prompt, row in zip(prompts, tokens.tolist(), strict=True):
        if (other := first.setdefault(tuple(row), prompt)) != prompt:
            raise DataError(
                f"the prompts {other!r} and {prompt!r} are the same to {clip.origin.architecture} (it sees "
                f"{tokens.shape[1]} tokens); shorten `data.template` or the class names, or raise context_length"
            )
    return tokens


@torch.no_grad()
def encode_ensemble(clip: Clip, class_names: Sequence[str], templates: Sequence[str], device: torch.device) -> Tensor:
    """Class vectors (classes, dim) of a prompt ensemble: of each class the mean of its prompts' vectors,
    normalised again (openai/CLIP, Prompt_Engineering_for_ImageNet.ipynb).
    """
    vectors = []
    for name in class_names:
        tokens = clip.tokenize([template.replace("{}", name) for template in templates])
        vectors.append(method.encode_classes(clip.model, tokens.to(device)).mean(0))
    return torch.nn.functional.normalize(torch.stack(vectors), dim=-1)


def _restored(saved: SavedTeacher, path: Path) -> method.Teacher:
    tower = build_image_tower(Model(**saved.record.model), load_weights=False)
    visual = {
        name.removeprefix("visual."): value for name, value in saved.state_dict.items() if name.startswith("visual.")
    }
    try:
        tower.module.load_state_dict(visual)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: its weights do not fit {saved.record.origin.architecture}") from error
    return method.Teacher(tower.module, saved.class_vectors, saved.logit_scale)
