"""From a student's teacher to a small text encoder: vocabulary, the teacher's vectors, training, figures, file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from comkd_cli.data.vocabulary import Vocabulary, build_vocabulary
from comkd_cli.edge.clip_tokenizer import BYTE_TOKENS, Tokenizer
from comkd_cli.errors import DataError, Interrupted, MisuseError
from comkd_cli.evaluation.text_encoders import image_figures
from comkd_cli.events import Notice, Report, Stage
from comkd_cli.files import sha256_of_data
from comkd_cli.flows.distill_text.images import read_image_features
from comkd_cli.flows.distill_text.imitation import Imitation, encode_texts
from comkd_cli.flows.distill_text.prompt_set import PromptLoader, PromptSet
from comkd_cli.flows.distill_text.teacher import TextTeacher, fits
from comkd_cli.models.costs import parameters
from comkd_cli.models.text_student import (
    ALWAYS,
    CONTEXT,
    Shape,
    TextRecord,
    TextStudent,
    choose_shape,
    copy_embedding,
    new_text_student,
    save_text_student,
)
from comkd_cli.recipe.identity import Identity
from comkd_cli.recipe.model import AdamW
from comkd_cli.runtime import ranks
from comkd_cli.runtime.locks import sole_writer
from comkd_cli.runtime.signals import stop_requests
from comkd_cli.teachers.prompt_vectors import PromptVectors
from comkd_cli.training.checkpoint import delete_checkpoint
from comkd_cli.training.loop import Trainer
from comkd_cli.training.task import Task

DEFAULT_NAME = "text_student.pt"
SHARE = 1 / 8
"""Of the parameters of the teacher's text encoder, at most."""


@dataclass(frozen=True)
class DistillTextOptions:
    """What a text encoder is distilled on, and how."""

    out: Path | None = None
    """The new file; None: DEFAULT_NAME beside the student."""
    name_files: tuple[Path, ...] = ()
    """Names to train on, one a line."""
    own_names_only: bool = False
    """Use only the run's classes and `name_files`."""
    held_out_percent: float = 10.0
    """Of the names."""
    epochs: int = 30
    batch_size: int = 256
    """Prompts of a step."""
    learning_rate: float = 1e-3
    seed: int = 1
    fresh: bool = False
    """Discard an existing file and checkpoint."""
    data_root: Path = Path("data")
    runs: Path = Path("runs")
    allow_download: bool = False
    """Download files that student.pt refers to and this machine lacks."""
    resume_line: str = "the same command"
    """The command that resumes an interrupted run."""

    @property
    def optim(self) -> AdamW:
        """The optimizer and its schedule."""
        return AdamW(learning_rate=self.learning_rate, batch_size=self.batch_size, epochs=self.epochs, warmup_epochs=1)


@dataclass(frozen=True)
class DistilledText:
    """A text encoder that was distilled."""

    path: Path
    record: TextRecord
    origins: Mapping[str, int]
    """How many names come from where."""


def distill_text(
    student_file: Path, accelerator: Accelerator, options: DistillTextOptions, report: Report
) -> DistilledText:
    """Distil the text encoder of a student's teacher, and write text_student.pt.

    Beside that file a folder `NAME.training` keeps the teacher's vectors, metrics.jsonl and, until it is finished, the
    checkpoint. Raises MisuseError for a file that exists; CheckpointError or ModelError if the teacher is not
    available; DataError for too few names; InUseError if another process writes the file; Interrupted.
    """
    if ranks.world_size() > 1:
        raise MisuseError("distill-text runs in one process", remedy="start it without torchrun")
    target = options.out or student_file.with_name(DEFAULT_NAME)
    with sole_writer(target):
        if target.exists() and not options.fresh:
            raise MisuseError("already exists", path=target, remedy="replace it with --fresh, or choose another --out")
        report(Stage(f"Loading the teacher of {student_file}"))
        teacher = TextTeacher.load(student_file, accelerator.device, options.allow_download, report)
        return _Distillation(teacher, target, accelerator, options, report).run()


@dataclass
class _Distillation:
    """One text encoder in the making."""

    teacher: TextTeacher
    target: Path
    accelerator: Accelerator
    options: DistillTextOptions
    report: Report
    folder: Path = field(init=False)

    def __post_init__(self) -> None:
        self.folder = self.target.with_name(f"{self.target.stem}.training")

    def run(self) -> DistilledText:
        """Train and write the file."""
        vocabulary, trained, held = self._names()
        vectors = self._teacher_vectors((trained, held))
        shape, tokens = self._shape(trained, vectors[0].shape[1])
        tokenizer = Tokenizer(self.teacher.merges, CONTEXT, tokens)
        module = new_text_student(shape, tokens, vectors[0].shape[1], self.options.seed)
        if (table := self.teacher.token_embedding) is not None:
            copy_embedding(module, table, tokens)
        objective = Imitation(module, tokenizer, (trained, held), vectors, self.accelerator.device)
        with torch.no_grad():  # the mean is most of every vector, and would take the first epochs to learn
            module.project.bias.copy_(objective.mean)
        self._train(module, objective, PromptLoader(trained.prompts, vectors[0], tokenizer, *self._order), trained)
        module.eval().cpu()
        record = TextRecord(
            shape=shape,
            vocabulary=tuple(tokens),
            merges=self.teacher.merges,
            templates=self.teacher.encoder.prompts.templates,
            class_names=self.teacher.record.trained_classes,
            class_vectors=torch.from_numpy(self.teacher.class_vectors),
            teacher_parameters=self.teacher.parameters,
            parameters=parameters(module),
            metrics={
                "trained_names": float(len(trained.names)),
                **objective.evaluate(),
                **self._class_figures(module, tokenizer, trained),
            },
        )
        if record.metrics["held_out_cosine_mean"] <= record.metrics["constant_cosine_mean"]:
            self.report(
                Notice(
                    "on held-out names the text encoder is no closer to the teacher than one vector for all names; "
                    "train it on more names or for more epochs"
                )
            )
        save_text_student(self.target, module, record)
        delete_checkpoint(self.folder)
        return DistilledText(self.target, record, vocabulary.origins)

    @property
    def _order(self) -> tuple[int, int]:
        """The size of a batch, and the seed of the order."""
        return self.options.batch_size, self.options.seed

    def _names(self) -> tuple[Vocabulary, PromptSet, PromptSet]:
        """The names whose prompts all fit the teacher's context, and the prompts to train on and to hold out."""
        options, encoder = self.options, self.teacher.encoder
        data_root = None if options.own_names_only else options.data_root
        own = self.teacher.record.trained_classes
        found = build_vocabulary(own, options.name_files, data_root, self.report)
        vocabulary = found.where(lambda name: fits(encoder, name))
        if lost := len(found.names) - len(vocabulary.names):
            self.report(Notice(f"{lost:,} of {len(found.names):,} names are too long for the teacher and are left out"))
        trained, held = vocabulary.divided(options.held_out_percent)
        if len(trained) < 2 or len(held) < 2:
            raise DataError(
                "too few names to train on and to hold out",
                found=f"{len(trained)} and {len(held)}",
                allowed="at least 2 each",
                remedy="provide more with --names",
            )
        return vocabulary, PromptSet.of(trained, encoder.prompts), PromptSet.of(held, encoder.prompts)

    def _teacher_vectors(self, sets: Sequence[PromptSet]) -> list[np.ndarray]:
        """The teacher's vectors of the prompts of each set, (prompts, dim). Raises Interrupted."""
        self.report(Stage(f"Encoding {sum(len(each.prompts) for each in sets):,} prompts with the teacher"))
        device, clip = self.accelerator.device, self.teacher.encoder.clip
        store = PromptVectors(clip, self.teacher.key, self.folder / "vectors", device, self.report)
        with stop_requests() as code:
            check_stop = _stopper(code, self.options.resume_line)
            return [store.of(each.prompts, check_stop) for each in sets]

    def _shape(self, trained: PromptSet, dim: int) -> tuple[Shape, list[int]]:
        """The size of the encoder and its tokens: those met most often. Raises ModelError."""
        shape, most = choose_shape(int(self.teacher.parameters * SHARE), dim)
        full = Tokenizer(self.teacher.merges, CONTEXT)
        met = Counter(token for text in trained.prompts for token in full.clip_tokens(text) if token not in BYTE_TOKENS)
        kept = sorted({*ALWAYS, *(token for token, _ in met.most_common(most - len(ALWAYS)))})
        of_all = f"{len(kept):,} of the {len(met) + len(ALWAYS):,} tokens that are needed"
        self.report(Notice(f"the text encoder has {shape.layers} layers of width {shape.width} and {of_all}"))
        return shape, kept

    def _train(self, module: TextStudent, objective: Imitation, loader: PromptLoader, trained: PromptSet) -> None:
        options = self.options
        if options.fresh:
            delete_checkpoint(self.folder)
        self.report(Stage(f"Distilling the text encoder into {parameters(module):,} parameters"))
        parts = {
            "teacher": self.teacher.key,
            "prompts": sha256_of_data(list(trained.prompts)),
            "optim": options.optim.model_dump(mode="json"),
            "seed": options.seed,
        }
        task = Task(
            model=module,
            objective=objective,
            loader=loader,
            optim=options.optim,
            folder=self.folder,
            identity=Identity(parts),
            seed=options.seed,
            label="text encoder",
            resume_line=options.resume_line,
            unreadable_limit_percent=100.0,
            evaluate_every_epochs=max(1, options.epochs // 5),
            uses_all_parameters=True,
            unit="prompts",
        )
        Trainer(task, self.accelerator, self.report).fit()

    def _class_figures(self, module: TextStudent, tokenizer: Tokenizer, trained: PromptSet) -> dict[str, float]:
        """The run's classes: how many were trained on, and images classified with the encoder's vectors of them."""
        teacher, options, classes = self.teacher, self.options, self.teacher.record.class_names
        known = set(trained.names)
        new = [label for label, name in enumerate(classes) if name not in known]
        counts = {"classes": float(len(classes)), "classes_trained_on": float(len(classes) - len(new))}
        device = self.accelerator.device
        images = read_image_features(
            teacher.student, teacher.record, options.data_root, options.runs, device, self.report
        )
        if images is None:
            return counts
        prompts = teacher.encoder.prompts
        every = PromptSet.of(classes, prompts, most=None)
        found = every.name_vectors(encode_texts(module, tokenizer, every.prompts, torch.device("cpu")))
        expected = teacher.student.class_vectors.cpu().numpy()
        return {**counts, **image_figures(images.features, images.labels, expected, found, new)}


def _stopper(code: Callable[[], int | None], resume_line: str) -> Callable[[], None]:
    """A function that raises Interrupted once a stop was requested."""

    def check() -> None:
        if (number := code()) is not None:
            raise Interrupted(f"stopped; the teacher's vectors so far are kept. To resume:\n  {resume_line}", number)

    return check
