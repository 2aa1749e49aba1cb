"""A SigLIP as the teacher of every command: its text tower attends both ways, reads the last token and has a bias."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import comkd_cli as comkd
from comkd_cli.bundles.gates import GATES, Gate
from comkd_cli.data.digits import digits_source
from comkd_cli.edge.classifier import Classifier
from comkd_cli.edge.images import prepare
from comkd_cli.errors import ModelError
from comkd_cli.method.teacher import encode_classes
from comkd_cli.models.backbones import build_clip
from comkd_cli.models.checkpoints import load_student
from comkd_cli.recipe.model import Model
from comkd_cli.teachers.of_student import class_encoder
from comkd_cli.teachers.prompted import prompted_clip
from tests import siglip, tiny

pytestmark = pytest.mark.usefixtures("few_digits")

NAMES = ["red fox", "cat", "two dogs", "a photo", "größe"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """The recipe's section of a SigLIP with weights from a file."""
    folder = tmp_path_factory.mktemp("teacher")
    config = siglip.config(siglip.write_tokenizer(folder / "tokenizer"))
    torch.save(build_clip(Model(config=config), seed=3).model.state_dict(), folder / "siglip.pt")
    return {"config": config, "weights": str(folder / "siglip.pt")}


@pytest.fixture(scope="module")
def run(few_digits: None, teacher: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> comkd.Distilled:
    recipe = tiny.recipe(teacher=teacher, optim={**tiny.OPTIM, "epochs": 1}, data=DATA)
    return comkd.distill(recipe, name="siglip", runs=tmp_path_factory.mktemp("runs"))


DATA = {"dataset": "digits", "template": "a photo of the number {}."}


@pytest.fixture(scope="module")
def bundle(run: comkd.Distilled) -> Path:
    # The features of a teacher with random weights are nearly equal, which the gates of fewer bits are not made for.
    gates = {**GATES, "text": Gate(0.9, 0.0, 100.0)}
    options = comkd.ExportOptions(text=True, check_images=20, text_precisions=("fp32", "fp16", "int8"), gates=gates)
    exported = comkd.export(run.file, options=options)
    assert dict(exported.failed) == {}
    return exported.folder


@pytest.mark.slow
def test_its_student_and_itself_are_scored(run: comkd.Distilled) -> None:
    student, teacher = comkd.evaluate(run.file, runs=run.folder.parents[2]).records
    assert student.top1_percent == pytest.approx(run.metrics["test_top1_percent"])
    assert (teacher.role, teacher.images) == ("teacher", tiny.TEST)


@pytest.mark.slow
def test_its_text_encoder_gives_pytorchs_vectors_at_any_batch_size(run: comkd.Distilled, bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    text = manifest["text"]
    assert (text["merges"], text["tokenizer"]["file"]) == (None, "tokenizer.json")
    assert list(text["precisions"]) == ["fp32", "fp16", "int8"]
    assert "bpe_merges.txt" not in manifest["files"]
    assert "pip install tokenizers" in (bundle / "README.md").read_text()
    student, record = load_student(run.file)
    encoder = class_encoder(record, run.file)
    with torch.no_grad():
        added = encode_classes(encoder.clip.model, encoder.tokens(NAMES))
        images = np.stack([prepare(digits_source().train.open(i), record.preprocessing) for i in range(4)])
        features = student(torch.from_numpy(images)).features
        expected = student.logit_scale * features @ torch.cat([student.class_vectors, added]).T
    for parts in ([NAMES], [NAMES[:1], NAMES[1:3], NAMES[3:]]):
        classifier = Classifier(bundle)
        for names in parts:
            classifier.add_classes(names)
        assert classifier._class_vectors is not None
        np.testing.assert_allclose(classifier._class_vectors[-len(NAMES) :], added.numpy(), atol=1e-5)
        np.testing.assert_allclose(classifier.logits(images), expected.numpy(), atol=1e-3)


@pytest.mark.slow
def test_predict_py_needs_the_tokenizers_library_for_added_classes_alone(bundle: Path, tmp_path: Path) -> None:
    image = tmp_path / "it.png"
    digits_source().train.open(3).save(image)

    def predict(*arguments: str, without: str = "") -> subprocess.CompletedProcess[str]:
        program = f"import sys, runpy; sys.modules.update({{name: None for name in {without.split()!r}}}); "
        program += f"sys.argv = ['predict.py', *{[str(image), *arguments]!r}]; "
        program += f"runpy.run_path({str(bundle / 'predict.py')!r}, run_name='__main__')"
        return subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=False)

    added = predict("--add-class", "red fox", "--json", "--top", "11", without="torch transformers")
    assert added.returncode == 0, added.stderr
    answered = json.loads(added.stdout)["predictions"][0]["classes"]
    assert "red fox" in {entry["class"] for entry in answered}
    refused = predict("--add-class", "red fox", without="tokenizers")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "pip install tokenizers" in refused.stderr
    assert predict(without="tokenizers").returncode == 0


@pytest.mark.slow
def test_the_bias_of_sigmoid_logits_changes_no_probability_over_classes(teacher: dict[str, object]) -> None:
    """open_clip's logits have the bias, the method's do not; a softmax over classes gives the same for both."""
    clip = build_clip(Model(**teacher))  # type: ignore[arg-type]
    tokens = clip.tokenize([f"a photo of the number {i}" for i in range(4)])
    images = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        theirs, _ = clip.model.get_logits(images, tokens)  # type: ignore[operator]
        ready = comkd_teacher(clip, images, tokens)
        assert float(clip.model.logit_bias) == -10  # type: ignore[arg-type]
        assert torch.allclose(theirs.softmax(-1), ready.softmax(-1), atol=1e-6)
        assert torch.allclose(theirs, ready - 10, atol=1e-4)


def comkd_teacher(clip: object, images: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    from comkd_cli.method.teacher import Teacher

    model = clip.model  # type: ignore[attr-defined]
    logits: torch.Tensor = Teacher(model.visual, encode_classes(model, tokens), model.logit_scale.exp())(images).logits
    return logits


def test_prompts_that_follow_a_start_token_are_refused(teacher: dict[str, object]) -> None:
    with pytest.raises(ModelError) as caught:
        prompted_clip(build_clip(Model(**teacher)), vision_depth=1, text_depth=1, tokens=2)  # type: ignore[arg-type]
    assert caught.value.field == "teacher.adapt"
