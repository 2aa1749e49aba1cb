"""A teacher ready to be asked: from a model's own weights, a released checkpoint, or a saved teacher.pt."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from comkd_cli.edge.images import Preprocessing
from comkd_cli.errors import CheckpointError, DataError, ModelError
from comkd_cli.events import Notice, Report, ignore_event
from comkd_cli.files import sha256_of_file
from comkd_cli.method import teacher as method
from comkd_cli.method.prompt_src import INITIAL_CONTEXT, PromptedClip, class_prompt
from comkd_cli.method.student import Student
from comkd_cli.models import downloads
from comkd_cli.models.backbones import (
    Clip,
    build_clip,
    build_image_tower,
    context_length,
    load_clip_state,
    state_sha256,
    tokens_cut,
    weights_sha256,
)
from comkd_cli.models.checkpoints import SavedTeacher, StudentRecord, load_teacher
from comkd_cli.models.weights import check_finite, differences_in_error, first_line
from comkd_cli.recipe.model import Model, Teacher
from comkd_cli.teachers.promptsrc_checkpoint import START_EMBEDDING, WORD_EMBEDDINGS, ReleasedTeacher, read_released

CLASSES_AT_ONCE = 256
MOST_NAMED = 5
# Class vectors of one teacher agree to rounding, whatever the device; those of two teachers do not.
SAME_VECTORS_COSINE = 0.9999
ROUNDING = 2**-8  # of an embedding that was kept in half precision, relative to its largest value


@dataclass(frozen=True)
class ReadyTeacher:
    """A frozen teacher and what is known of it."""

    teacher: method.Teacher
    preprocessing: Preprocessing
    checkpoint: Path | None
    """teacher.pt, for an adapted teacher."""
    sha256: Mapping[str, str] = field(default_factory=dict)
    """Of the files that it was loaded from, as `teacher_sha256` gives them."""


def made_teacher(
    settings: Teacher, class_names: Sequence[str], template: str, device: torch.device, report: Report = ignore_event
) -> ReadyTeacher:
    """A teacher as its weights are: a CLIP with the class vectors of `template`, or a released one with its
    own prompts, which replace the template's words. Raises ModelError or CheckpointError.
    """
    sha256 = teacher_sha256(settings)
    if settings.format == "promptsrc":
        ready = prompted_teacher(released_clip(settings, report), class_names, device, report=report)
    else:
        ready = teacher_of_clip(build_clip(settings, report=report), class_names, template, device, report)
    return replace(ready, sha256=sha256)


def teacher_of_clip(
    clip: Clip, class_names: Sequence[str], template: str, device: torch.device, report: Report = ignore_event
) -> ReadyTeacher:
    """A CLIP that is at hand, as a teacher with the class vectors of these classes."""
    clip.model.to(device)
    vectors = encode_prompts(clip, class_names, template, device, report)
    return _ready(clip, clip.model.visual, vectors, clip.model.logit_scale.detach().exp())  # type: ignore[arg-type,operator]


def _ready(
    clip: Clip, tower: nn.Module, vectors: Tensor, logit_scale: Tensor, checkpoint: Path | None = None
) -> ReadyTeacher:
    """A teacher whose class vectors were just computed. Raises ModelError where they are no numbers."""
    made = {"the class vectors": vectors, "the logit scale": logit_scale}
    check_finite(made, checkpoint or clip.origin.weights or clip.origin.architecture)
    return ReadyTeacher(method.Teacher(tower, vectors, logit_scale), clip.preprocessing, checkpoint)


def teacher_sha256(settings: Teacher, checkpoint: Path | None = None) -> dict[str, str]:
    """The sha256 of each local file that a teacher comes from, by the field of the recipe that names it.

    checkpoint: teacher.pt of an adapted teacher, which is `teacher` then and all that counts. Tags of
    open_clip and repositories of the Hub have none.
    """
    if checkpoint is not None:
        return {"teacher": sha256_of_file(checkpoint)}
    base = Model(arch=settings.arch, config=settings.config, weights=settings.backbone_weights)
    digests = {
        "weights" if settings.weights is not None else "arch": weights_sha256(settings),
        "backbone_weights": weights_sha256(base) if settings.backbone_weights is not None else None,
    }
    return {name: digest for name, digest in digests.items() if digest is not None}


@dataclass(frozen=True)
class Prompted:
    """A CLIP with learned prompts, and what turns its inputs into tensors."""

    module: PromptedClip
    clip: Clip

    def tokens(self, class_names: Sequence[str], report: Report = ignore_event) -> Tensor:
        """Token ids (classes, context) of the class prompts, with placeholders for the learned tokens."""
        return tokenize_apart(self.clip, class_names, class_prompt("{}", self.module.text.count), report)


def prompted_clip(clip: Clip, vision_depth: int, text_depth: int, tokens: int, seed: int = 0) -> Prompted:
    """A frozen CLIP with new prompts, drawn from the seed. Raises ModelError."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        module = PromptedClip(clip.model, clip.tokenize([INITIAL_CONTEXT]), tokens, vision_depth, text_depth)
    return Prompted(module, clip)


def released_clip(settings: Teacher, report: Report = ignore_event) -> Prompted:
    """A PromptSRC or PromptKD checkpoint, on the architecture of the recipe. Raises ModelError, CheckpointError.

    The table of word embeddings that such a file lacks comes from another CLIP, which is compared with the
    embeddings of the file's own class prompts.
    """
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
    _check_word_embeddings(clip, released, path, str(base) if needs_base else None, report)
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


def _check_word_embeddings(clip: Clip, released: ReleasedTeacher, path: Path, base: str | None, report: Report) -> None:
    """Refuse a table of word embeddings that is not the one which the prompts of a file were learned with.

    base: the CLIP that the table came from, as the recipe names it; None for the file's own.
    """
    text: Any = getattr(clip.model, "text", clip.model)
    table: Tensor = text.token_embedding.weight.detach()
    known = {START_EMBEDDING: released.start_embedding, WORD_EMBEDDINGS: released.word_embeddings}
    start = table[int(clip.tokenize([""])[0, 0])][None]
    for name, kept in known.items():
        if kept is None:
            continue
        if kept.shape[1] == table.shape[1]:
            gap = _farthest(kept, start if name == START_EMBEDDING else table)
            if gap <= ROUNDING:
                continue
            what = f"{name} is off by {gap:.0%} of its size"
        else:
            what = f"{name} is {kept.shape[1]} wide, and the table {table.shape[1]}"
        where = "its own table of word embeddings is" if base is None else f"the word embeddings of {base} are"
        raise ModelError(
            f"{path}: {where} not those that its prompts were learned with ({what}); give the CLIP that it was trained "
            "on as teacher.backbone_weights"
        )
    if base is not None and released.start_embedding is None:
        report(
            Notice(
                f"{path}: keeps no {START_EMBEDDING}, so nothing tells whether its prompts were learned with the word "
                f"embeddings of {base}; with another CLIP's it answers wrongly"
            )
        )


def _farthest(embeddings: Tensor, table: Tensor) -> float:
    """How far the one that fits worst is from its nearest row of a table, relative to its largest value."""
    nearest = torch.cat([torch.cdist(part, table).argmin(dim=1) for part in torch.split(embeddings, CLASSES_AT_ONCE)])
    size = embeddings.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
    return float(((embeddings - table[nearest]).abs().amax(dim=1) / size).max())


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
    prompted: Prompted,
    class_names: Sequence[str],
    device: torch.device,
    checkpoint: Path | None = None,
    report: Report = ignore_event,
) -> ReadyTeacher:
    """A prompted CLIP as a frozen teacher, with the class vectors of any class names."""
    module = prompted.module.to(device)
    with torch.no_grad():
        vectors = module.encode_classes(prompted.tokens(class_names, report).to(device))
    return _ready(prompted.clip, module.vision, vectors, module.logit_scale, checkpoint)


def saved_teacher(
    path: Path,
    class_names: Sequence[str],
    device: torch.device,
    key: str | None = None,
    report: Report = ignore_event,
) -> ReadyTeacher:
    """The teacher of a teacher.pt, with the class vectors of these names.

    Raises CheckpointError, also where its key is not the given one, or where it can't name other classes
    than its own; ModelError where the backbone that its prompts stand on could not be loaded.
    """
    saved = load_teacher(path)
    if key is not None and saved.record.key != key:
        raise CheckpointError(
            f"{path}: is another teacher than its folder says; remove {path.parent} to train it again"
        )
    sha256 = {"teacher": sha256_of_file(path)}
    if saved.prompts is not None:
        ready = prompted_teacher(_saved_prompted(saved, path), class_names, device, path, report)
        return replace(ready, sha256=sha256)
    if tuple(class_names) != saved.record.class_names:
        raise CheckpointError(f"{path}: was taught {len(saved.record.class_names)} classes, other than the data's")
    return ReadyTeacher(_restored(saved, path), saved.record.preprocessing, path, sha256)


def teacher_of_student(
    student_file: Path,
    student: Student,
    record: StudentRecord,
    device: torch.device,
    allow_download: bool = False,
    report: Report = ignore_event,
) -> ReadyTeacher:
    """The teacher that a student learned from, with the class vectors of the student's classes.

    allow_download: fetch what student.pt names and this machine lacks. Raises CheckpointError or ModelError,
    also where the teacher that is found is not the one that the student learned from.
    """
    check_teacher_files(record, student_file)
    with downloads.forbidden(unless=allow_download):
        if record.teacher is not None:
            ready = saved_teacher(teacher_file(record, student_file), record.class_names, device, report=report)
        else:
            ready = made_teacher(record.recipe.teacher, record.class_names, record.template, device, report)
    _check_taught(ready.teacher, student, _teacher_name(record, student_file))
    if record.teacher_sha256 is None and ready.sha256:
        report(
            Notice(
                f"{student_file}: an earlier version did not record the sha256 of its teacher; that it is the same one "
                "is known from its class vectors alone"
            )
        )
    return ready


def teacher_file(record: StudentRecord, student_file: Path) -> Path:
    """teacher.pt of a student whose teacher was adapted."""
    assert record.teacher is not None  # as the caller made sure
    return Path(os.path.normpath(student_file.parent / record.teacher))


def check_teacher_files(record: StudentRecord, student_file: Path) -> None:
    """Refuse a teacher whose files are not those that the student learned from; raises CheckpointError.

    Files that are not there are left to whoever reads them.
    """
    settings = record.recipe.teacher
    checkpoint = None if record.teacher is None else teacher_file(record, student_file)
    if not record.teacher_sha256 or (checkpoint is not None and not checkpoint.is_file()):
        return
    found = teacher_sha256(settings, checkpoint)
    for name, digest in record.teacher_sha256.items():
        if found.get(name, digest) != digest:
            named = str(checkpoint) if name == "teacher" else str(getattr(settings, name))
            raise CheckpointError(
                f"{named.removeprefix('local-dir:')}: is not the teacher that {student_file} learned from: it was "
                f"changed since (its sha256 is {found[name]}, and was {digest}); put the old file back, or distil again"
            )


def _teacher_name(record: StudentRecord, student_file: Path) -> str:
    if record.teacher is not None:
        return str(teacher_file(record, student_file))
    settings = record.recipe.teacher
    return ":".join(part for part in (settings.arch, settings.weights) if part)


def _check_taught(teacher: method.Teacher, student: Student, name: str) -> None:
    """Refuse a teacher that names the student's classes by other vectors than those which the student was taught."""
    theirs, own = teacher.class_vectors.cpu(), student.class_vectors.cpu()
    what = None
    if theirs.shape != own.shape:
        what = f"its class vectors are {tuple(theirs.shape)}, and the student's {tuple(own.shape)}"
    elif (cosine := float(nn.functional.cosine_similarity(theirs, own).min())) < SAME_VECTORS_COSINE:
        what = f"its class vectors differ from the student's, with a cosine of {cosine:.4f} at the least"
    elif not torch.allclose(teacher.logit_scale.cpu(), student.logit_scale.cpu(), rtol=1e-3):
        what = (
            f"its logit scale is {float(teacher.logit_scale):.4g}, and the student's {float(student.logit_scale):.4g}"
        )
    if what is not None:
        raise CheckpointError(f"{name}: is not the teacher that the student learned from: {what}")


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

    def tokens(self, class_names: Sequence[str], report: Report = ignore_event) -> Tensor:
        """Token ids (classes, context) of the class prompts."""
        return tokenize_apart(self.clip, class_names, self.prompt, report)


def class_encoder(
    record: StudentRecord, student_file: Path, allow_download: bool = False, report: Report = ignore_event
) -> ClassEncoder:
    """The text half of a student's teacher, on the CPU. Raises CheckpointError or ModelError.

    allow_download: as in `teacher_of_student`.
    """
    check_teacher_files(record, student_file)
    with downloads.forbidden(unless=allow_download):
        return _class_encoder(record, student_file, report)


def _class_encoder(record: StudentRecord, student_file: Path, report: Report) -> ClassEncoder:
    settings = record.recipe.teacher
    if record.teacher is None:
        if settings.format == "promptsrc":
            return _prompted_encoder(released_clip(settings, report))
        return ClassEncoder(build_clip(settings, report=report), record.template)
    path = teacher_file(record, student_file)
    saved = load_teacher(path)
    if saved.prompts is not None:
        return _prompted_encoder(_saved_prompted(saved, path))
    clip = build_clip(Model(**saved.record.model), load_weights=False)
    load_clip_state(clip, saved.state_dict, path)
    return ClassEncoder(clip, saved.record.template)


def _prompted_encoder(prompted: Prompted) -> ClassEncoder:
    return ClassEncoder(prompted.clip, class_prompt("{}", prompted.module.text.count))


@torch.no_grad()
def encode_prompts(
    clip: Clip, class_names: Sequence[str], template: str, device: torch.device, report: Report = ignore_event
) -> Tensor:
    """Class vectors (classes, dim) of the classes' prompts, L2-normalised, a part of them at a time."""
    tokens = tokenize_apart(clip, class_names, template, report).to(device)
    return torch.cat([method.encode_classes(clip.model, part) for part in torch.split(tokens, CLASSES_AT_ONCE)])


def tokenize_apart(clip: Clip, class_names: Sequence[str], template: str, report: Report = ignore_event) -> Tensor:
    """Token ids (classes, context) of the prompts of classes. Raises DataError where two become the same.

    template: `{}` stands for the name. open_clip cuts a prompt at the context's length without a word: a
    notice names the classes, and classes that differ only beyond it, which could never be told apart, are
    refused.
    """
    prompts = [template.replace("{}", name) for name in class_names]
    tokens = clip.tokenize(prompts)
    first: dict[tuple[int, ...], str] = {}
    for prompt, row in zip(prompts, tokens.tolist(), strict=True):
        if (other := first.setdefault(tuple(row), prompt)) != prompt:
            raise DataError(
                f"the prompts {other!r} and {prompt!r} are the same to {clip.origin.architecture} (it sees "
                f"{tokens.shape[1]} tokens); shorten `data.template` or the class names, or raise context_length"
            )
    report_cut(clip, class_names, [template], report)
    return tokens


def report_cut(clip: Clip, class_names: Sequence[str], templates: Sequence[str], report: Report) -> None:
    """Say which prompts lose words because they are longer than what the text encoder reads."""
    cut: Counter[str] = Counter()
    nameless: dict[str, None] = {}
    for template in templates:
        lost = tokens_cut(clip, [template.replace("{}", name) for name in class_names])
        shortened = [name for name, tokens in zip(class_names, lost, strict=True) if tokens]
        cut.update(shortened)
        # What stands up to the end of the name, which is lost in part where this alone is too long.
        heads = [f"{template.partition('{}')[0]}{name}" for name in shortened]
        lost = tokens_cut(clip, heads)
        nameless |= dict.fromkeys(name for name, tokens in zip(shortened, lost, strict=True) if tokens)
    if not cut:
        return
    of = f"of {len(class_names)} classes"
    prompts = "the prompts" if len(templates) == 1 else f"{cut.total()} of {len(templates) * len(class_names)} prompts"
    told = (
        f"{clip.origin.architecture} reads {context_length(clip)} tokens of a prompt: {prompts} of {len(cut)} {of} are "
        f"cut ({_named(list(cut))})"
    )
    if nameless:
        told += f", and the name itself loses words in {len(nameless)} ({_named(list(nameless))})"
    report(Notice(f"{told}; shorten `data.template` or the class names, or use a model with a longer context"))


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(repr(name) for name in names[:MOST_NAMED]) + more


@torch.no_grad()
def encode_ensemble(
    clip: Clip,
    class_names: Sequence[str],
    templates: Sequence[str],
    device: torch.device,
    report: Report = ignore_event,
) -> Tensor:
    """Class vectors (classes, dim) of a prompt ensemble: of each class the mean of its prompts' vectors,
    normalised again (openai/CLIP, Prompt_Engineering_for_ImageNet.ipynb).
    """
    report_cut(clip, class_names, templates, report)
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
        raise CheckpointError(
            f"{path}: its weights do not fit {saved.record.origin.architecture}: it "
            f"{differences_in_error(error) or first_line(error)}; train the teacher again"
        ) from error
    return method.Teacher(tower.module, saved.class_vectors, saved.logit_scale)
