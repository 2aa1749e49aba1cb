"""A text encoder is distilled from the teacher of a tiny run, and works in a bundle."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from accelerate import Accelerator
from torch import nn

from comkd_cli.bundles.gates import GATES, Gate
from comkd_cli.bundles.metadata import metadata_of
from comkd_cli.bundles.text import against_teacher
from comkd_cli.data.batches import Batch
from comkd_cli.data.digits import digits_source
from comkd_cli.data.prompts import Prompts
from comkd_cli.data.vocabulary import is_held_out
from comkd_cli.edge.classifier import Classifier
from comkd_cli.edge.clip_tokenizer import END, START, Tokenizer
from comkd_cli.edge.images import prepare
from comkd_cli.edge.manifest import BundleProblem
from comkd_cli.errors import CheckpointError, DataError, Interrupted, MisuseError
from comkd_cli.events import Epoch, Event, Notice, Progress, ignore_event
from comkd_cli.flows.distill_text import DistilledText, DistillTextOptions, distill_text
from comkd_cli.flows.distill_text.imitation import Imitation
from comkd_cli.flows.distill_text.prompt_set import PromptLoader, PromptSet, padded
from comkd_cli.flows.distill_text.teacher import fits
from comkd_cli.flows.export import ExportOptions, export
from comkd_cli.models.backbones import bpe_merges, build_clip
from comkd_cli.models.checkpoints import load_student, save_student
from comkd_cli.models.text_student import ALWAYS, Shape, TextStudent, load_text_student, save_text_student
from comkd_cli.recipe.model import Model
from comkd_cli.teachers.of_student import ClassEncoder, class_encoder
from comkd_cli.training.accelerator import make_accelerator
from tests import tiny

ANIMALS = (
    *("fox", "owl", "bee", "cat", "dog", "cow", "pig", "hen", "ant", "bat"),
    *("bug", "cod", "eel", "elk", "emu", "ape", "jay", "rat", "ram", "yak"),
)
NAMES = [f"{colour} {animal}" for colour in ("red", "big") for animal in ANIMALS]


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return make_accelerator("fp32")


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> DistillTextOptions:
    folder = tmp_path_factory.mktemp("text")
    (folder / "names.txt").write_text("\n".join(NAMES), encoding="utf-8")
    return DistillTextOptions(
        out=folder / "small.pt",
        name_files=(folder / "names.txt",),
        own_names_only=True,
        held_out_percent=25,
        epochs=4,
        batch_size=8,
        learning_rate=0.003,
    )


@pytest.fixture(scope="module")
def made(tiny_student: Path, options: DistillTextOptions, accelerator: Accelerator) -> DistilledText:
    return distill_text(tiny_student, accelerator, options, ignore_event)


def test_the_text_encoder_is_small_and_its_figures_are_of_names_that_it_never_saw(
    made: DistilledText, tiny_student: Path
) -> None:
    record, figures = made.record, made.record.metrics
    assert record.parameters <= record.teacher_parameters / 8
    assert made.origins == {"the run": 10, str(made.path.with_name("names.txt")): len(NAMES)}
    assert figures["trained_names"] + figures["held_out_names"] == 10 + len(NAMES)
    assert 5 <= figures["held_out_names"] <= 20
    assert figures["images"] == 360
    assert {"image_top1_percent", "teacher_vectors_top1_percent"} <= set(figures)
    lines = (made.path.parent / "small.training/metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    # The figures again, by other code: cosines of normalised vectors of both encoders.
    module, read = load_text_student(made.path)
    encoder = class_encoder(load_student(tiny_student)[1], tiny_student)
    tokenizer = read.tokenizer()
    cosines = []
    names = [name for name in [*map(str, range(10)), *NAMES] if is_held_out(name, 25)]
    with torch.no_grad():
        for name in names:
            (own,) = module(torch.from_numpy(tokenizer([encoder.prompts.of(name)[0]])))
            (theirs,) = encoder.vectors([name])
            cosines.append(float(own @ theirs))
    assert len(names) == figures["held_out_names"]
    assert figures["held_out_cosine_mean"] == pytest.approx(np.mean(cosines), abs=1e-3)
    assert figures["held_out_cosine_min"] == pytest.approx(min(cosines), abs=1e-3)


@pytest.mark.slow
def test_a_bundle_adds_classes_with_it(made: DistilledText, tiny_student: Path, tmp_path: Path) -> None:
    gates = {**GATES, "text": Gate(0.9, 0.0, 100.0)}
    wanted = ExportOptions(text=True, text_student=made.path, text_precisions=("fp32", "int8"), gates=gates)
    data = torch.load(tiny_student, weights_only=True)
    torch.save({**data, "template": "only the student's {}", "templates": []}, tmp_path / "student.pt")
    events: list[Event] = []
    manifest = export(
        tmp_path / "student.pt", tmp_path / "bundle", Path("data"), events.append, options=wanted
    ).manifest
    text = manifest["text"]
    assert Notice(against_teacher(text["distilled"])) in events
    for precision, entry in text["precisions"].items():
        found = metadata_of(onnx.load(tmp_path / "bundle" / entry["file"]))
        assert (found["templates"], found["precision"]) == (list(made.record.templates), precision)
    assert text["vocabulary"] == "text_vocabulary.npy"
    assert text["parameters"] == made.record.parameters
    assert text["distilled"]["held_out_cosine_mean"] == made.record.metrics["held_out_cosine_mean"]
    assert 0 <= text["distilled"]["gate_agreement_percent"] <= 100
    assert "It was distilled from the teacher's" in (tmp_path / "bundle/README.md").read_text()
    student, record = load_student(tiny_student)
    images = np.stack([prepare(digits_source().train.open(i), record.preprocessing) for i in range(4)])
    names = ["red ox", "Ü 日"]
    module, read = load_text_student(made.path)
    tokens = torch.from_numpy(read.tokenizer()([read.templates[0].replace("{}", name) for name in names]))
    with torch.no_grad():
        features = student(torch.from_numpy(images)).features
        expected = student.logit_scale * features @ torch.cat([student.class_vectors, module(tokens)]).T
    classifier = Classifier(tmp_path / "bundle")
    classifier.add_classes(names)
    np.testing.assert_allclose(classifier.logits(images), expected.numpy(), atol=1e-3)
    image = tmp_path / "it.png"
    digits_source().train.open(3).save(image)
    command = [sys.executable, "-I", str(tmp_path / "bundle/predict.py"), str(image), "--json", "--add-class", "red ox"]
    answer = subprocess.run([*command, "--top", "11"], capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    assert "red ox" in {entry["class"] for entry in json.loads(answer)["predictions"][0]["classes"]}
    (tmp_path / "bundle/text_vocabulary.npy").write_bytes(b"")
    with pytest.raises(BundleProblem) as caught:
        Classifier(tmp_path / "bundle").add_classes(["owl"])
    assert caught.value.path == tmp_path / "bundle/text_vocabulary.npy"


@pytest.mark.parametrize(("constant", "useless"), [(0.5, True), (0.4, False)])
def test_a_bundle_says_how_close_a_distilled_encoder_is_to_the_teacher(constant: float, useless: bool) -> None:
    figures = {"gate_agreement_percent": 12.34, "classes_cosine_min": 0.5678, "held_out_cosine_mean": 0.5}
    text = against_teacher({**figures, "constant_cosine_mean": constant})
    assert "12.3 % of the gate's images keep their class, worst class cosine 0.568" in text
    assert ("no closer to the teacher's than one constant vector" in text) is useless


@pytest.mark.slow
def test_an_encoder_of_another_teacher_is_refused(made: DistilledText, tiny_student: Path, tmp_path: Path) -> None:
    module, record = load_text_student(made.path)
    for changed in (
        replace(record, class_vectors=record.class_vectors.flip(0)),
        replace(record, class_names=("x", *record.class_names[1:])),
    ):
        save_text_student(tmp_path / "other.pt", module, changed)
        wanted = ExportOptions(text=True, text_student=tmp_path / "other.pt")
        with pytest.raises(CheckpointError) as caught:
            export(tiny_student, tmp_path / "bundle", Path("data"), ignore_event, options=wanted)
        assert (caught.value.path, caught.value.remedy is None) == (tmp_path / "other.pt", False)


@pytest.mark.slow
def test_an_interrupted_run_ends_with_the_same_weights(
    made: DistilledText, tiny_student: Path, options: DistillTextOptions, accelerator: Accelerator, tmp_path: Path
) -> None:
    """Stopped while the teacher encodes, then while it trains; the teacher encodes no prompt twice."""
    stopped_at: list[str] = []

    def stop_once(kind: type, event: Event) -> None:
        if isinstance(event, kind) and kind.__name__ not in stopped_at:
            stopped_at.append(kind.__name__)
            os.kill(os.getpid(), signal.SIGTERM)

    again = replace(options, out=tmp_path / "small.pt", resume_line="comkd distill-text again")
    with pytest.raises(Interrupted) as caught:
        distill_text(tiny_student, accelerator, again, lambda event: stop_once(Progress, event))
    assert "comkd distill-text again" in str(caught.value)
    with pytest.raises(Interrupted) as caught:
        distill_text(tiny_student, accelerator, again, lambda event: stop_once(Epoch, event))
    assert caught.value.exit_code == 143
    assert not (tmp_path / "small.pt").exists()
    stored = {path: path.stat().st_mtime_ns for path in (tmp_path / "small.training/vectors").iterdir()}
    resumed = distill_text(tiny_student, accelerator, again, ignore_event)
    assert stored == {path: path.stat().st_mtime_ns for path in (tmp_path / "small.training/vectors").iterdir()}
    assert not (tmp_path / "small.training/state").exists()
    states = [load_text_student(path)[0].state_dict() for path in (made.path, resumed.path)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_finished_file_is_kept_without_fresh(
    made: DistilledText, tiny_student: Path, options: DistillTextOptions, accelerator: Accelerator
) -> None:
    with pytest.raises(MisuseError) as caught:
        distill_text(tiny_student, accelerator, options, ignore_event)
    assert caught.value.path == made.path


def test_too_few_names_are_refused(
    tiny_student: Path, options: DistillTextOptions, accelerator: Accelerator, tmp_path: Path
) -> None:
    few = replace(options, out=tmp_path / "small.pt", name_files=(), held_out_percent=0.001)
    with pytest.raises(DataError) as caught:
        distill_text(tiny_student, accelerator, few, ignore_event)
    assert caught.value.found == "10 and 0"


def test_class_vectors_that_no_text_encoder_gives_are_refused(
    tiny_student: Path, options: DistillTextOptions, accelerator: Accelerator
) -> None:
    student, record = load_student(tiny_student)
    student.class_vectors.copy_(student.class_vectors.flip(0))
    path = tiny_student.with_name("flipped.pt")
    save_student(path, student, record)
    with pytest.raises(CheckpointError) as caught:
        distill_text(path, accelerator, replace(options, out=path.with_name("small.pt")), ignore_event)
    path.unlink()
    assert caught.value.path == path


def test_a_name_fits_if_every_prompt_does_whichever_has_the_most_characters() -> None:
    descriptions = {"few tokens": ("photograph photograph",), "many": ("photograph photograph", "a b c d e f g h i")}
    encoder = ClassEncoder(build_clip(Model(config=tiny.CLIP)), Prompts(("a {}",), descriptions))
    assert [fits(encoder, name) for name in ("owl", "few tokens", "many")] == [True, True, False]


# --- batches of prompts --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vocabulary(merges: str) -> list[int]:
    """Ascending: the tokens of NAMES, and those that each vocabulary has."""
    full = Tokenizer(merges, 77)
    return sorted({*ALWAYS, *(token for name in NAMES for token in full.encode(name))})


@pytest.fixture(scope="module")
def merges(tiny_student: Path) -> str:
    return bpe_merges(class_encoder(load_student(tiny_student)[1], tiny_student).clip)


def spelled(row: list[int], vocabulary: list[int], pruned: Tokenizer) -> list[int]:
    """The tokens of a row without start, end and padding, each split to bytes."""

    def bytes_of(token: int) -> list[int]:
        parts = pruned.split(token)
        return [token] if len(parts) == 1 else [one for part in parts for one in bytes_of(part)]

    tokens = [vocabulary[token - 1] for token in row if token]
    assert (tokens[0], tokens[-1]) == (START, END)
    return [one for token in tokens[1:-1] for one in bytes_of(token)]


def test_an_epoch_has_each_prompt_once_with_its_vector_and_the_same_spelling(
    merges: str, vocabulary: list[int]
) -> None:
    pruned = Tokenizer(merges, 77, vocabulary)
    prompts = [f"a {name}" for name in NAMES]
    vectors = np.arange(len(prompts), dtype=np.float16)[:, None]
    loader = PromptLoader(prompts, vectors, pruned, 4, seed=1)
    batches = [batch for (batch,) in loader.epoch(0)]
    assert len(batches) == loader.steps_per_epoch == 10
    order = torch.cat([batch.indices for batch in batches])
    assert sorted(order.tolist()) == list(range(40))
    assert torch.equal(torch.cat([batch.inputs[1] for batch in batches])[:, 0], order.float())
    whole = padded([pruned.encode(text) for text in prompts], pruned)
    split = 0
    for batch in batches:
        for row, index in zip(batch.inputs[0].tolist(), batch.indices.tolist(), strict=True):
            plain = whole[index].tolist()
            assert spelled(row, vocabulary, pruned) == spelled(plain, vocabulary, pruned)
            split += [token for token in row if token] != [token for token in plain if token]
    assert 0 < split < 40
    resumed = [batch for (batch,) in loader.epoch(0, first_step=7)]
    assert all(torch.equal(a.inputs[0], b.inputs[0]) for a, b in zip(batches[7:], resumed, strict=True))
    assert not torch.equal(order, torch.cat([batch.indices for (batch,) in loader.epoch(1)]))


def test_of_many_templates_a_name_has_a_few_and_all_are_used() -> None:
    templates = tuple(f"{number} {{}}" for number in range(9))
    prompts = PromptSet.of(NAMES, Prompts(templates))
    assert len(prompts.prompts) == len(set(prompts.prompts)) == 4 * len(NAMES)
    assert {text.split()[0] for text in prompts.prompts} == {str(number) for number in range(9)}
    assert PromptSet.of(NAMES[:3], Prompts(templates)).prompts == prompts.prompts[:12]
    every = PromptSet.of(NAMES[:2], Prompts(templates), most=None)
    assert every.prompts == tuple(template.replace("{}", name) for name in NAMES[:2] for template in templates)


def test_the_vector_of_a_name_is_the_normalised_mean_of_its_prompts() -> None:
    prompts = PromptSet.of(["x", "y"], Prompts(("{}", "a {}"), {"y": ("why",)}))
    found = prompts.name_vectors(np.array([[1, 0], [0, 1], [0, 3]], np.float16))
    np.testing.assert_allclose(found, [[0.5**0.5, 0.5**0.5], [0, 1]], atol=1e-6)


def test_the_loss_by_hand() -> None:
    """In the plane, with a mean of (1, 0): the second vector is right but for its length."""
    trained = PromptSet.of(["x", "y", "z"], Prompts(("{}",)))
    vectors = np.array([[1, 1], [1, -1], [1, 0]], np.float16)
    module = TextStudent(Shape(16, 1, 8), 20, 2)
    pruned: Any = None  # no text is encoded
    objective = Imitation(module, pruned, (trained, trained), [vectors, vectors], torch.device("cpu"))
    found, targets = torch.tensor([[1.0, -1], [2, -2]]), torch.tensor([[1.0, 1], [1, -1]])
    batch = Batch(inputs=(found, targets), labels=None, indices=torch.arange(2))
    result = objective.loss(nn.Identity(), batch, probe=False)
    # (1, -1) and (1, 1) are at a right angle, and opposite from (1, 0); cos((1, -2), (0, -1)) is 2 / sqrt(5).
    centred = (2 + 1 - 2 / 5**0.5) / 2
    assert result.figures["cosine_loss"].item() == pytest.approx(0.5, abs=1e-6)
    assert result.figures["centred_loss"].item() == pytest.approx(centred, abs=1e-6)
    assert result.loss.item() == pytest.approx(0.5 + centred, abs=1e-6)
