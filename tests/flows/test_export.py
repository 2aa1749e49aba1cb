import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from ruamel.yaml import YAML

from comkd_cli.bundles import latency, precisions, text
from comkd_cli.bundles.bundle import Head, check_head
from comkd_cli.bundles.fit_part import NOT_TRAINED_ON, with_fit_part
from comkd_cli.bundles.gates import GATES, Gate, SpeedGate
from comkd_cli.bundles.latency import Contender, Measured, Timing
from comkd_cli.bundles.metadata import metadata_of
from comkd_cli.bundles.parity import measure_parity
from comkd_cli.bundles.parts import Parts
from comkd_cli.bundles.reference import ReferenceWriter
from comkd_cli.bundles.runner import run_graph
from comkd_cli.data.digits import digits_source
from comkd_cli.data.prompts import Prompts
from comkd_cli.edge.classifier import Classifier
from comkd_cli.edge.images import prepare
from comkd_cli.edge.manifest import BundleProblem
from comkd_cli.errors import BundleError, ComkdError, DataError, ExportError, Interrupted, WriteError
from comkd_cli.events import Notice
from comkd_cli.flows import export as export_flow
from comkd_cli.flows.classes import AddOptions, add_classes
from comkd_cli.flows.export import ExportOptions, export
from comkd_cli.flows.predict import predict, self_test
from comkd_cli.method.student import Student
from comkd_cli.method.teacher import encode_classes
from comkd_cli.models.backbones import build_clip, build_image_tower
from comkd_cli.models.checkpoints import load_student, save_student
from comkd_cli.recipe import parse_recipe
from comkd_cli.recipe.model import Model
from comkd_cli.teachers.loading import build_teacher
from comkd_cli.teachers.of_student import class_encoder
from tests import tiny, warm


def quietly(event: object) -> None:
    pass


@pytest.fixture(scope="module")
def bundle_parts() -> list[Parts]:
    """The images of `bundle`, once that is exported."""
    return []


@pytest.fixture(scope="module")
def bundle(tiny_student: Path, bundle_parts: list[Parts], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "Bündel für Geräte"

    def divided(*arguments: Any) -> Parts:
        bundle_parts.append(with_fit_part(*arguments))
        return bundle_parts[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_flow, "with_fit_part", divided)
        export(tiny_student, out, Path("data"), quietly)
    return out


@pytest.mark.slow
def test_a_bundle_holds_every_file_and_its_sha256(bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    names = {
        "README.md",
        "class_vectors.npy",
        "classes.txt",
        "classifier.onnx",
        "image_encoder.onnx",
        "predict.py",
    }
    reference = {f"reference/{path.name}" for path in (bundle / "reference").iterdir()}
    assert set(manifest["files"]) == names | reference
    assert len(reference) == 8 + 8 + 1 + 1  # images, tensors, logits of fp32, JSON
    assert {path.name for path in bundle.iterdir()} == names | {"manifest.json", "reference"}
    for name, entry in manifest["files"].items():
        content = (bundle / name).read_bytes()
        assert (hashlib.sha256(content).hexdigest(), len(content)) == (entry["sha256"], entry["bytes"])
    parity = manifest["precisions"]["fp32"]["parity"]
    assert parity["images"] == 180
    assert parity["feature_cosine_min"] >= 0.99999
    assert parity["top1_percent"] == parity["student_top1_percent"]
    assert (manifest["opset"], manifest["memory"], manifest["text"], manifest["failed"]) == (20, "training", None, {})


@pytest.mark.slow
def test_logits_are_the_features_times_the_class_vectors(bundle: Path) -> None:
    import onnxruntime

    manifest = json.loads((bundle / "manifest.json").read_text())
    images = np.random.default_rng(0).normal(size=(3, 3, 16, 16)).astype(np.float32)
    encoder = onnxruntime.InferenceSession(bundle / "image_encoder.onnx", providers=["CPUExecutionProvider"])
    (features,) = encoder.run(["image_features"], {"image": images})
    expected = manifest["logit_scale"] * features @ np.load(bundle / "class_vectors.npy").T
    assert np.allclose(Classifier(bundle).logits(images), expected, atol=1e-4)
    assert np.allclose(np.linalg.norm(features, axis=1), 1, atol=1e-6)


@pytest.mark.slow
def test_the_bundle_classifies_images_as_the_student_does(bundle: Path, tiny_student: Path, tmp_path: Path) -> None:
    student, record = load_student(tiny_student)
    paths = []
    for index in range(5):
        paths.append(str(tmp_path / f"{index}.png"))
        digits_source().train.open(index).save(paths[-1])
    answers = predict(bundle, paths, top=10)
    temperature = json.loads((bundle / "manifest.json").read_text())["calibration"]["temperature"]
    images = np.stack([prepare(digits_source().train.open(index), record.preprocessing) for index in range(5)])
    with torch.no_grad():
        expected = (student(torch.from_numpy(images)).logits / temperature).softmax(1)
    for answer, row in zip(answers, expected, strict=True):
        given = {entry["class"]: entry["probability"] for entry in answer["classes"]}
        assert [given[str(digit)] for digit in range(10)] == pytest.approx(row.tolist(), abs=1e-5)
        assert list(given.values()) == sorted(given.values(), reverse=True)


@pytest.mark.slow
def test_the_bundles_own_predict_gives_the_same_answers(bundle: Path, tmp_path: Path) -> None:
    image = tmp_path / "ein Bild.png"
    digits_source().train.open(3).save(image)
    command = [sys.executable, "-I", str(bundle / "predict.py"), str(image), "--json"]
    finished = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert json.loads(finished.stdout)["predictions"] == predict(bundle, [str(image)], top=5)


@pytest.mark.slow
def test_an_unreadable_image_is_named_and_the_others_are_classified(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no")
    digits_source().train.open(3).save(tmp_path / "fine.png")
    broken, fine = predict(bundle, [str(tmp_path / "broken.png"), str(tmp_path / "fine.png")], top=1)
    assert "broken.png" in broken["error"]
    assert len(fine["classes"]) == 1


def test_a_folder_that_is_no_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError) as caught:
        predict(tmp_path, ["a.png"], top=1)
    assert (caught.value.path, caught.value.problem) == (tmp_path, "is not a bundle: it has no manifest.json")


@pytest.mark.slow
def test_an_existing_bundle_is_kept_without_force(bundle: Path, tiny_student: Path) -> None:
    written = (bundle / "manifest.json").stat().st_ino
    with pytest.raises(ExportError) as caught:
        export(tiny_student, bundle, Path("data"), quietly)
    assert (caught.value.path, caught.value.problem) == (bundle, "already exists")
    assert (bundle / "manifest.json").stat().st_ino == written
    before = {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()}
    export(tiny_student, bundle, Path("data"), quietly, force=True)
    assert (bundle / "manifest.json").stat().st_ino != written
    assert {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()} == before


def failing(*precisions: str):  # type: ignore[no-untyped-def]
    """measure_parity, with the features of these precisions 0.02 off."""

    def measured(encoder: Path, *arguments: object):  # type: ignore[no-untyped-def]
        parity = measure_parity(encoder, *arguments)  # type: ignore[arg-type]
        missed = any(name in encoder.name for name in precisions) or ("fp32" in precisions and "." not in encoder.stem)
        return replace(parity, feature_difference_max=0.02, feature_cosine_min=0.5) if missed else parity

    return measured


@pytest.mark.slow
def test_a_student_that_fails_parity_leaves_no_bundle(
    tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_flow, "measure_parity", failing("fp32"))
    with pytest.raises(ExportError, match=r"no bundle was written: fp32: max .difference. 2\.00e-02") as caught:
        export(tiny_student, tmp_path / "bundle", Path("data"), quietly)
    assert caught.value.remedy is None
    assert list(tmp_path.iterdir()) == []


ALL = ("fp32", "fp16", "int8")
WIDE = {name: Gate(0.9, 90.0, 10.0, gate.difference_max) for name, gate in GATES.items()}
WIDE["text"] = Gate(0.9, 0.0, 100.0)  # the vectors of a teacher that was hardly trained are nearly equal


@pytest.fixture(scope="module")
def whole(tiny_student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with every option but the page."""
    out = tmp_path_factory.mktemp("out") / "whole"
    # So small a student loses more in eight bits than a useful one; the gates are tested elsewhere.
    options = ExportOptions(precisions=ALL, text=True, gates=WIDE, license="apache-2.0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency, "ROUNDS", 1)  # each starts a process for each method of quantisation
        exported = export(tiny_student, out, Path("data"), quietly, options=options)
    assert exported.failed == {}
    return out


@pytest.mark.slow
def test_every_precision_has_its_graphs_and_figures(whole: Path) -> None:
    manifest = json.loads((whole / "manifest.json").read_text())
    assert list(manifest["precisions"]) == list(ALL)
    sizes = {name: (whole / entry["classifier"]).stat().st_size for name, entry in manifest["precisions"].items()}
    assert sizes["fp16"] < sizes["fp32"]
    ways = manifest["precisions"]["int8"]["quantisation"]
    assert len(ways) >= 4
    assert all(way["cosine_mean"] > 0.9 and way["milliseconds"] > 0 for way in ways)
    images = np.stack([prepare(digits_source().train.open(i), Classifier(whole).preprocessing) for i in range(32)])
    exact = Classifier(whole, precision="fp32").logits(images)
    for precision, least in (("fp16", 0.999), ("int8", 0.9)):
        found = Classifier(whole, precision=precision).logits(images)
        assert not np.array_equal(found, exact)
        assert np.corrcoef(found.ravel(), exact.ravel())[0, 1] > least


@pytest.mark.slow
def test_every_graph_says_what_it_is(whole: Path, tiny_student: Path) -> None:
    manifest = json.loads((whole / "manifest.json").read_text())
    digest = hashlib.sha256(tiny_student.read_bytes()).hexdigest()
    assert manifest["student_sha256"] == digest
    for path in whole.glob("*.onnx"):
        found = metadata_of(onnx.load(path))
        assert (found["format"], found["student_sha256"]) == ("comkd-graph/1", digest)
        name, *precision = path.stem.split(".")
        assert found["kind"] == name
        if name == "text_encoder":
            assert found["context_length"] == manifest["text"]["context_length"]
            continue
        assert found["precision"] == (precision[0] if precision else "fp32")
        assert found["classes"] == (whole / "classes.txt").read_text().splitlines()
        assert {name: found[name] for name in ("preprocessing", "logit_scale")} == {
            name: manifest[name] for name in ("preprocessing", "logit_scale")
        }
        assert found["temperature"] == manifest["calibration"]["temperature"]
        assert found["threshold"]["value"] == manifest["threshold"]["value"]


@pytest.mark.slow
def test_every_precision_has_the_confidence_of_its_own_answers(whole: Path) -> None:
    manifest = json.loads((whole / "manifest.json").read_text())
    errors = [entry["confidence"]["calibration_error_percent"] for entry in manifest["precisions"].values()]
    # fp32 rounds other than PyTorch, which the manifest's own figure is of.
    assert errors[0] == pytest.approx(manifest["calibration"]["error_after_percent"], abs=0.01)
    assert len(set(errors)) == len(errors) == 3
    for entry in manifest["precisions"].values():
        low, high = entry["confidence"]["accepted_interval_percent"]
        assert low <= entry["confidence"]["accepted_percent"] <= high


@pytest.mark.slow
def test_the_first_precision_is_the_default(whole: Path) -> None:
    images = np.zeros((1, 3, 16, 16), np.float32)
    assert np.array_equal(Classifier(whole).logits(images), Classifier(whole, precision="fp32").logits(images))
    with pytest.raises(BundleError) as caught:
        predict(whole, ["a.png"], 1, precision="int4")
    assert (caught.value.path, caught.value.field) == (whole / "manifest.json", "precisions")
    assert (caught.value.found, caught.value.allowed) == ("int4", "fp32, fp16, int8")


@pytest.mark.slow
def test_a_class_that_is_added_on_the_device_has_pytorchs_logits(whole: Path, tiny_student: Path) -> None:
    student, record = load_student(tiny_student)
    encoder = class_encoder(record, tiny_student)
    names = ("red fox", "Ü 日")
    with torch.no_grad():
        added = encode_classes(encoder.clip.model, encoder.tokens(names))
        images = np.stack([prepare(digits_source().train.open(i), record.preprocessing) for i in range(6)])
        answered = student(torch.from_numpy(images))
        expected = student.logit_scale * answered.features @ torch.cat([student.class_vectors, added]).T
    classifier = Classifier(whole)
    classifier.add_classes(names[:1])
    classifier.add_classes(names[1:])
    assert classifier.class_names[-2:] == list(names)
    assert np.allclose(classifier.logits(images), expected.numpy(), atol=1e-3)
    with pytest.raises(BundleProblem, match="the class exists already: 'red fox'"):
        classifier.add_classes(["red fox"])


@pytest.mark.slow
def test_a_bundle_of_several_prompts_adds_classes_by_all_templates(weights: Path, tmp_path: Path) -> None:
    """Of a student whose own classes have templates and descriptions, and one of them was added to it."""
    recipe = parse_recipe(tiny.recipe(teacher={"config": tiny.CLIP, "weights": str(weights)}))
    prompts = Prompts(("the {}", "a {}."), {"3": ("three", "number three", "a three")})
    names = digits_source().class_names
    ready = build_teacher(recipe.teacher, names, prompts, torch.device("cpu"))
    tower = build_image_tower(recipe.student, seed=2)
    vectors, scale = ready.teacher.class_vectors, ready.teacher.logit_scale
    student = Student(tower.module, tower.width, vectors, scale, recipe.student, recipe.loss.edu_attention)
    record = tiny.student_record(
        recipe,
        tower,
        source="digits",
        class_names=names,
        template=prompts.templates[0],
        metrics={"test_top1_percent": 100.0, "test_images": 360.0},
        teacher_sha256=dict(ready.sha256),
        templates=prompts.templates,
        descriptions=dict(prompts.descriptions),
    )
    save_student(tmp_path / "student.pt", student, record)
    extended, _ = add_classes(tmp_path / "student.pt", ["fox"], AddOptions(), quietly)
    export(extended, tmp_path / "bundle", Path("data"), quietly, options=ExportOptions(text=True))
    manifest = json.loads((tmp_path / "bundle/manifest.json").read_text())
    assert (manifest["text"]["prompt"], manifest["text"]["templates"]) == ("the {}", ["the {}", "a {}."])
    assert (manifest["classes_added"], manifest["test_top1_changed"]) == (["fox"], None)
    assert "was not trained on these classes, which were added by name: fox" in (
        tmp_path / "bundle/README.md"
    ).read_text().replace("\n", " ")
    classifier = Classifier(tmp_path / "bundle")
    assert classifier.class_names == [*names, "fox"]
    classifier.add_classes(["owl", "bee"])
    clip = build_clip(Model(config=tiny.CLIP, weights=str(weights)))
    images = np.stack([prepare(digits_source().train.open(i), record.preprocessing) for i in range(3)])
    with torch.no_grad():
        features = student.eval()(torch.from_numpy(images)).features
        means = [
            encode_classes(clip.model, clip.tokenize([f"the {n}", f"a {n}."])).mean(0) for n in ("fox", "owl", "bee")
        ]
        added = torch.nn.functional.normalize(torch.stack(means), dim=-1)
        expected = scale * features @ torch.cat([vectors, added]).T
    np.testing.assert_allclose(classifier.logits(images), expected.numpy(), atol=1e-3)
    with pytest.raises(BundleProblem):
        classifier.add_classes([f"{'very ' * 20}long name"])
    del manifest["text"]["templates"]  # as an older version wrote it
    (tmp_path / "bundle/manifest.json").write_text(json.dumps(manifest))
    older = Classifier(tmp_path / "bundle")
    older.add_classes(["owl"])
    single = scale * features @ encode_classes(clip.model, clip.tokenize(["the owl"])).detach()[0]
    np.testing.assert_allclose(older.logits(images)[:, -1], single.numpy(), atol=1e-3)


@pytest.mark.slow
def test_predict_py_is_one_file_with_its_tokenizer(whole: Path, tmp_path: Path) -> None:
    image = tmp_path / "it.png"
    digits_source().train.open(3).save(image)
    arguments = [str(image), "--json", "--precision", "int8", "--add-class", "red fox", "--top", "11"]
    command = [sys.executable, "-I", str(whole / "predict.py"), *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    expected = predict(whole, [str(image)], 11, precision="int8", add_classes=["red fox"])
    assert json.loads(finished.stdout)["predictions"] == expected
    assert "red fox" in {entry["class"] for entry in expected[0]["classes"]}
    assert "comkd_cli" not in (whole / "predict.py").read_text().replace("comkd_cli/", "")


@pytest.mark.slow
def test_the_text_encoder_has_the_precision_of_the_other_graphs(whole: Path, tmp_path: Path) -> None:
    manifest = json.loads((whole / "manifest.json").read_text())
    entries = manifest["text"]["precisions"]
    assert list(entries) == list(ALL)
    assert manifest["text"]["file"] == entries["fp32"]["file"] == "text_encoder.onnx"
    sizes = [manifest["files"][entry["file"]]["bytes"] for entry in entries.values()]
    assert sizes[0] > 1.9 * sizes[1] > 1.9 * 1.4 * sizes[2]
    assert entries["int8"]["cosine_min"] >= 0.9
    vectors = {}
    for precision in ALL:
        classifier = Classifier(whole, precision=precision)
        classifier.add_classes(["red fox"])
        assert classifier._class_vectors is not None
        vectors[precision] = classifier._class_vectors[-1]
    for precision in ("fp16", "int8"):
        assert not np.array_equal(vectors[precision], vectors["fp32"])
        assert vectors[precision] @ vectors["fp32"] > 0.9
    moved = shutil.copytree(whole, tmp_path / "bundle")
    del entries["int8"]
    (moved / "manifest.json").write_text(json.dumps(manifest))
    classifier = Classifier(moved, precision="int8")  # without a text encoder of its own it takes that in fp32
    classifier.add_classes(["red fox"])
    assert classifier._class_vectors is not None
    assert np.array_equal(classifier._class_vectors[-1], vectors["fp32"])


@pytest.mark.slow
def test_a_text_encoder_that_misses_its_gate_is_left_out_with_its_figures(tiny_student: Path, tmp_path: Path) -> None:
    gates = {**WIDE, "text": Gate(1.1, 0.0, 100.0)}
    options = ExportOptions(text=True, text_precisions=("fp16",), gates=gates)
    exported = export(tiny_student, tmp_path / "bundle", Path("data"), quietly, options=options)
    assert set(exported.failed) == set(exported.manifest["failed"]) == {"text fp16"}
    assert "smallest cosine" in exported.failed["text fp16"]
    assert "text fp16 is not in the bundle" in (tmp_path / "bundle/README.md").read_text()
    assert list(exported.manifest["text"]["precisions"]) == ["fp32"]  # rather than none
    assert {path.name for path in (tmp_path / "bundle").glob("text_encoder*")} == {"text_encoder.onnx"}


@pytest.mark.slow
def test_without_fp32_a_bundle_has_the_smaller_text_encoder_alone(tiny_student: Path, tmp_path: Path) -> None:
    options = ExportOptions(text=True, text_precisions=("fp16",), gates=WIDE)
    manifest = export(tiny_student, tmp_path / "bundle", Path("data"), quietly, options=options).manifest
    assert manifest["text"]["file"] == "text_encoder.fp16.onnx"
    assert not (tmp_path / "bundle/text_encoder.onnx").exists()
    classifier = Classifier(tmp_path / "bundle")
    classifier.add_classes(["red fox"])
    assert classifier.class_names[-1] == "red fox"


@pytest.mark.slow
def test_classes_can_be_added_to_a_bundle_with_text_alone(bundle: Path) -> None:
    with pytest.raises(BundleProblem) as caught:
        Classifier(bundle).add_classes(["red fox"])
    assert (caught.value.path, caught.value.field) == (bundle / "manifest.json", "text")
    assert caught.value.remedy == "export it with --text to add classes"


@pytest.mark.slow
def test_the_model_card_has_the_hubs_metadata_and_the_numbers(whole: Path) -> None:
    card = (whole / "README.md").read_text()
    _, metadata, text = card.split("---\n", 2)
    fields = YAML(typ="safe").load(metadata)
    assert (fields["license"], fields["pipeline_tag"]) == ("apache-2.0", "zero-shot-image-classification")
    manifest = json.loads((whole / "manifest.json").read_text())
    (result,) = fields["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == pytest.approx(manifest["test_top1_percent"], abs=0.01)
    for words in ("## Limits", "## Citation", "2408.04145", f"{manifest['parameters']:,} parameters", "int8"):
        assert words in text
    for name in manifest["files"]:
        if name.endswith(".onnx"):
            assert name in text


@pytest.mark.slow
def test_a_precision_that_misses_its_gate_is_left_out_with_its_figures(
    tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_flow, "measure_parity", failing("fp16"))
    exported = export(
        tiny_student, tmp_path / "bundle", Path("data"), quietly, options=ExportOptions(precisions=ALL[:2])
    )
    assert list(exported.manifest["precisions"]) == ["fp32"]
    assert "smallest cosine 0.500000 (limit 0.9995)" in exported.failed["fp16"]
    assert exported.manifest["failed"] == exported.failed
    assert not list((tmp_path / "bundle").glob("*fp16*"))


def test_a_crash_of_onnxruntime_is_a_failed_gate(
    tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crashing(encoder: Path, *arguments: object):  # type: ignore[no-untyped-def]
        if "fp16" in encoder.name:
            raise ExportError("onnxruntime could not run it (signal 11): no message", path=encoder.name)
        return measure_parity(encoder, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(export_flow, "measure_parity", crashing)
    exported = export(
        tiny_student, tmp_path / "bundle", Path("data"), quietly, options=ExportOptions(precisions=ALL[:2])
    )
    assert "signal 11" in exported.failed["fp16"]
    assert list(exported.manifest["precisions"]) == ["fp32"]


@pytest.mark.slow
def test_a_quantisation_method_that_onnxruntime_cannot_run_leaves_the_others(
    tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crashing(graph: Path, *arguments: object):  # type: ignore[no-untyped-def]
        if "static-channel" in graph.name:
            raise ExportError("onnxruntime could not run it (signal 11): no message", path=graph.name)
        return run_graph(graph, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(precisions, "run_graph", crashing)
    monkeypatch.setattr(precisions, "single_thread_timings", without_measurement)
    options = ExportOptions(precisions=("fp32", "int8"), gates=WIDE)
    exported = export(tiny_student, tmp_path / "bundle", Path("data"), quietly, options=options)
    ways = [way["method"] for way in exported.manifest["precisions"]["int8"]["quantisation"]]
    assert sorted(ways) == ["dynamic-signed", "dynamic-unsigned", "static-tensor-percentile"]
    assert len(list((tmp_path / "bundle").glob("*.onnx"))) == 4


def test_text_without_the_teacher_is_refused_before_any_work(tiny_student: Path, tmp_path: Path) -> None:
    (tmp_path / "student.pt").write_bytes(tiny_student.read_bytes())
    with pytest.raises(ExportError, match="--text needs the student's teacher: ") as caught:
        export(tmp_path / "student.pt", tmp_path / "bundle", Path("data"), quietly, options=ExportOptions(text=True))
    assert caught.value.path == tmp_path / "student.pt"
    assert (caught.value.remedy or "").endswith("export without --text")
    assert not (tmp_path / "bundle").exists()


def test_data_with_other_classes_is_refused_as_evaluation_refuses_it(tiny_student: Path, tmp_path: Path) -> None:
    stored = torch.load(tiny_student, weights_only=True)
    torch.save({**stored, "class_names": ["none", *stored["class_names"][1:]]}, tmp_path / "student.pt")
    with pytest.raises(DataError, match=r"digits: its classes .* 10 classes: the student does not know 0; the"):
        export(tmp_path / "student.pt", tmp_path / "bundle", Path("data"), quietly)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.slow
def test_names_that_an_older_version_stored_are_a_line_each(tiny_student: Path, tmp_path: Path) -> None:
    stored = torch.load(tiny_student, weights_only=True)
    ends = ["\n", "\u2028", "\x85", "\x0b", "\r\n", "\x1c", " ", "\t", "\f", ""]
    names = [f"{name}{end}" for name, end in zip(stored["class_names"], ends, strict=True)]
    torch.save({**stored, "class_names": names}, tmp_path / "student.pt")
    export(tmp_path / "student.pt", tmp_path / "bundle", Path("data"), quietly)
    assert (tmp_path / "bundle/classes.txt").read_bytes() == b"".join(b"%d\n" % digit for digit in range(10))
    assert Classifier(tmp_path / "bundle").class_names == [str(digit) for digit in range(10)]


def test_the_text_encoder_of_a_retrained_teacher_is_not_exported(tiny_student: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(tiny_student.parents[3], runs)
    student = runs / tiny_student.relative_to(tiny_student.parents[3])
    (teacher,) = runs.glob("teachers/*/teacher.pt")
    torch.save({**torch.load(teacher, weights_only=True), "metrics": {}}, teacher)
    with pytest.raises(ExportError, match=r"teacher\.pt: is not the teacher that .*sha256") as caught:
        export(student, tmp_path / "bundle", Path("data"), quietly, options=ExportOptions(text=True))
    assert caught.value.path == student


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "problem", "found"),
    [
        (["red fox", "red  fox "], "the class exists already", "'red fox'"),
        (["red_fox", "red fox"], "the class exists already", "'red fox'"),
        ([" 3"], "the class exists already", "'3'"),
        (["  "], "a class to add is empty", "'  '"),
        (["a\nb"], "a class to add has a line break within it", "'a\\nb'"),
        (
            [f"{'very ' * 20}long name {end}" for end in ("alpha", "beta")],
            "the text encoder, which reads 10 tokens of a prompt, cannot distinguish these classes from one another",
            None,
        ),
        (
            ["owl", "Ünïcode, 3½ “wolves”"],
            "too long for the text encoder, which reads 10 tokens",
            "'Ünïcode, 3½ “wolves”'",
        ),
    ],
)
def test_class_names_that_cannot_be_added_are_refused(
    whole: Path, names: list[str], problem: str, found: str | None
) -> None:
    classifier = Classifier(whole)
    with pytest.raises(BundleProblem) as caught:
        classifier.add_classes(names)
    assert caught.value.problem.startswith(problem)
    assert caught.value.found == (found or ", ".join(map(repr, names)))
    assert len(classifier.class_names) == 10


@pytest.mark.slow
def test_a_precision_can_be_exported_without_fp32(tiny_student: Path, tmp_path: Path) -> None:
    export(
        tiny_student,
        tmp_path / "bundle",
        Path("data"),
        quietly,
        options=ExportOptions(precisions=("fp16",), gates=WIDE),
    )
    names = {path.name for path in (tmp_path / "bundle").glob("*.onnx")}
    assert names == {"image_encoder.fp16.onnx", "classifier.fp16.onnx"}
    assert Classifier(tmp_path / "bundle").class_names == [str(digit) for digit in range(10)]


@pytest.mark.slow
def test_latency_and_memory_are_compared_with_pytorch(
    tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency, "ROUNDS", 1)  # each starts a process of PyTorch for each number of threads
    monkeypatch.setattr(latency, "usable_cores", lambda: 1)
    options = ExportOptions(benchmark=True)
    manifest = export(tiny_student, tmp_path / "bundle", Path("data"), quietly, options=options).manifest
    entries = {(entry["name"], entry["threads"]): entry for entry in manifest["latency"]}
    assert {name for name, _ in entries} == {"pytorch", "fp32"}
    assert entries["pytorch", 1]["speed_up"] == 1
    fp32 = entries["fp32", 1]
    assert fp32["speed_up"] == pytest.approx(entries["pytorch", 1]["seconds"] / fp32["seconds"])
    assert fp32["memory_share"] < 0.7  # no torch in that process


# --- checks on another machine -------------------------------------------------------------------------


@pytest.mark.slow
def test_the_machine_that_exported_a_bundle_differs_by_nothing_in_any_precision(whole: Path) -> None:
    tested = self_test(whole)
    assert [check.name for check in tested.checks] == ["tensors", *ALL]
    assert [check.largest for check in tested.checks] == pytest.approx([0, 0, 0, 0], abs=1e-4)
    assert tested.differing == []


@pytest.mark.slow
def test_the_reference_logits_are_the_students_within_the_gate(bundle: Path, tiny_student: Path) -> None:
    student, _ = load_student(tiny_student)
    document = json.loads((bundle / "reference/reference.json").read_text())
    images = np.concatenate([np.load(bundle / "reference" / image["tensor"]) for image in document["images"]])
    with torch.no_grad():
        expected = student(torch.from_numpy(images)).logits.numpy()
    np.testing.assert_allclose(np.float32(document["logits"]["fp32"]["values"]), expected, atol=1e-3)


@pytest.mark.slow
def test_a_graph_that_cannot_run_the_reference_images_is_left_out(
    tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crashing(self: ReferenceWriter, precision: str, *arguments: Any) -> None:
        if precision == "fp16":
            raise ExportError("its logits for a reference image are not finite", path="classifier.fp16.onnx")
        add_precision(self, precision, *arguments)

    add_precision = ReferenceWriter.add_precision
    monkeypatch.setattr(ReferenceWriter, "add_precision", crashing)
    options = ExportOptions(precisions=("fp32", "fp16"), gates=WIDE)
    exported = export(tiny_student, tmp_path / "bundle", Path("data"), quietly, options=options)
    assert exported.failed == {"fp16": "classifier.fp16.onnx: its logits for a reference image are not finite"}
    assert {path.name for path in (tmp_path / "bundle").rglob("*fp16*")} == set()


# --- gates of speed, on given measurements -------------------------------------------------------------


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32 takes 10 ms on one thread, twice as fast as PyTorch, and fp16 4 ms; at two threads each takes half."""

    def stand_in(_student: Path, graphs: list[Contender], *_: object) -> list[Measured]:
        one = {"pytorch": 0.020, "fp32": 0.010, "fp16": 0.004}
        return [
            Measured(name, threads, one[name] / threads, one["pytorch"] / one[name], 10**8, 1.0)
            for threads in (1, 2)
            for name in ("pytorch", *(graph.name for graph in graphs))
        ]

    monkeypatch.setattr(export_flow, "measure_latency", stand_in)


@pytest.mark.slow
@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize(
    ("speed", "reason"),
    [
        (SpeedGate(max_latency_ms=9), "10.00 ms for one image on one thread (limit 9 ms)"),
        (SpeedGate(min_speedup=2.5), "2.00 times as fast as PyTorch on one thread (limit 2.5)"),
    ],
)
def test_a_precision_that_is_too_slow_is_left_out_with_its_figures(
    tiny_student: Path, tmp_path: Path, speed: SpeedGate, reason: str
) -> None:
    options = ExportOptions(precisions=("fp32", "fp16"), gates=WIDE, speed=speed)
    exported = export(tiny_student, tmp_path / "bundle", Path("data"), quietly, options=options)
    assert exported.failed == {"fp32": reason}
    assert list(exported.manifest["precisions"]) == ["fp16"]
    assert {entry["name"] for entry in exported.manifest["latency"]} == {"pytorch", "fp16"}
    names = {path.name for path in (tmp_path / "bundle").rglob("*.onnx")}
    assert names == {"image_encoder.fp16.onnx", "classifier.fp16.onnx"}
    assert not (tmp_path / "bundle/reference/logits.fp32.npy").exists()
    assert f"fp32 is not in the bundle: {reason}" in (tmp_path / "bundle/README.md").read_text()
    assert self_test(tmp_path / "bundle").differing == []


@pytest.mark.slow
@pytest.mark.usefixtures("measured")
def test_precisions_that_are_fast_enough_stay_with_their_measurements(tiny_student: Path, tmp_path: Path) -> None:
    speed = SpeedGate(max_latency_ms=10, min_speedup=2)
    options = ExportOptions(precisions=("fp32", "fp16"), gates=WIDE, speed=speed)
    exported = export(tiny_student, tmp_path / "bundle", Path("data"), quietly, options=options)
    assert exported.failed == {}
    assert len(exported.manifest["latency"]) == 6


@pytest.mark.slow
@pytest.mark.usefixtures("measured")
def test_if_every_precision_is_too_slow_there_is_no_bundle(tiny_student: Path, tmp_path: Path) -> None:
    options = ExportOptions(speed=SpeedGate(max_latency_ms=1))
    with pytest.raises(ExportError, match=r"no exported graph is fast enough.*fp32: 10\.00 ms .*limit 1 ms"):
        export(tiny_student, tmp_path / "bundle", Path("data"), quietly, options=options)
    assert list(tmp_path.iterdir()) == []


def test_images_for_the_check_can_come_from_a_folder(tiny_student: Path, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    with pytest.raises(DataError) as caught:
        export(tiny_student, tmp_path / "bundle", Path("data"), quietly, options=ExportOptions(pictures=pictures))
    assert caught.value.remedy == "provide others with --images"
    for index in range(9):
        digits_source().train.open(index).save(pictures / f"{index}.png")
    manifest = export(
        tiny_student, tmp_path / "bundle", Path("data"), quietly, options=ExportOptions(pictures=pictures)
    ).manifest
    assert manifest["precisions"]["fp32"]["parity"]["images"] == 9
    assert manifest["precisions"]["fp32"]["parity"]["top1_percent"] is None
    gate = {"images": 9, "different": 9, "origin": "given", "labels": False, "held_out": False}
    assert manifest["images"]["gate"] == gate
    card = (tmp_path / "bundle/README.md").read_text()
    assert "compared with PyTorch on 9 images given with --images. No top-1 is reported, because" in card
    # 9 / (9 + 1.96 ** 2)
    assert "| 100.00 % of 9, 95 % interval 70.1 to 100.0 % | no held-out labelled images |" in card
    assert manifest["test_top1_percent"] is not None  # of the training's own test images, whatever is given here


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of 120 images, which are enough to fit on."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(120):
        digits_source().train.open(index).save(folder / f"{index}.png")
    return folder


def test_given_images_are_fitted_on_with_a_notice_even_if_test_images_were_learned_from(
    tiny_student: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_flow, "learns_from_test_images", lambda record: True)
    _, record = load_student(tiny_student)
    events: list[object] = []
    parts = export_flow._read_parts(record, Path("data"), ExportOptions(pictures=pictures), events.append)
    assert (parts.fit is not None, parts.no_fit) == (True, None)
    assert Notice(NOT_TRAINED_ON) in events
    events.clear()
    parts = export_flow._read_parts(record, Path("data"), ExportOptions(), events.append)
    assert (parts.fit is not None, parts.no_fit is not None) == (False, True)
    assert Notice(NOT_TRAINED_ON) not in events


def test_if_int8_alone_has_too_few_images_the_remedy_is_fp32(tiny_student: Path, pictures: Path) -> None:
    for index in range(9, 120):
        (pictures / f"{index}.png").unlink()
    options = ExportOptions(precisions=("int8",), pictures=pictures)
    with pytest.raises(ExportError, match=r"no requested precision could be exported.*: int8: int8 needs") as caught:
        export(tiny_student, pictures.parent / "bundle", Path("data"), quietly, options=options)
    assert caught.value.remedy == "add --precision fp32"
    assert not (pictures.parent / "bundle").exists()


@pytest.mark.slow
def test_force_only_replaces_a_bundle(tiny_student: Path, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "precious.bin").write_bytes(b"x")
    with pytest.raises(ExportError, match="is not a bundle") as caught:
        export(tiny_student, tmp_path / "models", Path("data"), quietly, force=True)
    assert caught.value.path == tmp_path / "models"
    assert (tmp_path / "models" / "precious.bin").exists()
    (tmp_path / "empty").mkdir()
    export(tiny_student, tmp_path / "empty", Path("data"), quietly)
    assert (tmp_path / "empty" / "manifest.json").exists()


# --- which images a figure is of -----------------------------------------------------------------------


def without_measurement(methods: list[Contender], *_: object) -> dict[str, Timing]:
    """Equal timings, in place of the processes that the bundle `whole` starts."""
    return {method.name: Timing(0.001, 0.001, 0.001) for method in methods}


def digests(images: np.ndarray) -> set[bytes]:
    return {hashlib.sha256(image.tobytes()).digest() for image in images}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[set[bytes]]]:
    """What the images showed that went to the gate, to calibration and to the choice, call by call."""
    found: dict[str, list[set[bytes]]] = {"gate": [], "gate of int8": [], "calibrate": [], "choose": []}

    def measured(encoder: Path, classifier: Path, reference: Any, *arguments: Any) -> Any:
        found["gate of int8" if "int8" in encoder.name else "gate"].append(digests(reference.images))
        return measure_parity(encoder, classifier, reference, *arguments)

    def quantiser(images: precisions.QuantisationImages, *arguments: Any) -> Any:
        found["calibrate"].append(digests(images.calibrate))
        found["choose"].append(digests(images.choose))
        return precisions.Quantiser(images, *arguments)

    monkeypatch.setattr(export_flow, "measure_parity", measured)
    monkeypatch.setattr(export_flow, "Quantiser", quantiser)
    monkeypatch.setattr(precisions, "single_thread_timings", without_measurement)
    return found


def assert_three_disjoint_parts(seen: dict[str, list[set[bytes]]], sizes: dict[str, Any]) -> None:
    (gate,), (gate_of_int8,), (calibrate,), (choose,) = seen.values()  # each once
    assert gate == gate_of_int8
    assert not gate & calibrate
    assert not gate & choose
    assert not calibrate & choose
    assert [sizes[name]["images"] for name in ("gate", "calibrate", "choose")] == [
        len(gate),
        len(calibrate),
        len(choose),
    ]


INT8 = ExportOptions(precisions=("fp32", "int8"), gates=WIDE)


@pytest.mark.slow
def test_int8_is_calibrated_and_chosen_on_training_images_and_tested_on_test_images(
    tiny_student: Path, tmp_path: Path, seen: dict[str, list[set[bytes]]]
) -> None:
    manifest = export(tiny_student, tmp_path / "bundle", Path("data"), quietly, options=INT8).manifest
    assert_three_disjoint_parts(seen, manifest["images"])
    assert [manifest["images"][name]["origin"] for name in ("gate", "calibrate", "choose")] == [
        "test",
        "training",
        "training",
    ]
    card = (tmp_path / "bundle/README.md").read_text()
    assert "compared with PyTorch on 180 test images." in card
    assert "int8 was calibrated on 144 training images, and its method was chosen on 48 others" in card
    parity = manifest["precisions"]["int8"]["parity"]
    assert parity["top1_interval_percent"][0] < parity["top1_percent"] < parity["top1_interval_percent"][1]


@pytest.mark.slow
def test_a_folder_with_copies_gives_three_disjoint_parts(
    tiny_student: Path, tmp_path: Path, seen: dict[str, list[set[bytes]]]
) -> None:
    (tmp_path / "pictures").mkdir()
    for index in range(50):
        for name in (f"{index}.png", f"copy of {index}.bmp"):
            digits_source().train.open(index).save(tmp_path / "pictures" / name)
    # So small a student keeps little with so few images to calibrate on.
    open_gate = dict.fromkeys(GATES, Gate(-1, 0, 100))
    options = replace(INT8, pictures=tmp_path / "pictures", gates=open_gate)
    manifest = export(tiny_student, tmp_path / "bundle", Path("data"), quietly, options=options).manifest
    assert_three_disjoint_parts(seen, manifest["images"])
    assert sum(manifest["images"][name]["images"] for name in ("gate", "calibrate", "choose")) == 50
    assert manifest["precisions"]["int8"]["parity"]["top1_percent"] is None


@pytest.mark.slow
def test_temperature_and_threshold_are_fitted_on_images_that_the_gate_does_not_use(
    bundle: Path, bundle_parts: list[Parts], tiny_student: Path
) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    fit, gate = bundle_parts[0].fit, bundle_parts[0].gate
    assert fit is not None
    assert not digests(fit.images) & digests(gate.images)
    assert len(digests(fit.images) | digests(gate.images)) == len(digits_source().test or ()) == 360
    assert (manifest["images"]["fit"]["images"], manifest["images"]["gate"]["images"]) == (180, 180)
    student, _ = load_student(tiny_student)
    with torch.no_grad():
        logits = student(torch.from_numpy(fit.images)).logits.double()
    labels = torch.from_numpy(np.asarray(fit.labels))
    temperature = manifest["calibration"]["temperature"]
    losses = [
        torch.nn.functional.cross_entropy(logits / (temperature * factor), labels) for factor in (0.99, 1.0, 1.01)
    ]
    assert losses[1] < min(losses[0], losses[2])
    assert (manifest["calibration"]["fitted_to"], manifest["calibration"]["images"]) == ("labels", 180)
    scores = (logits / temperature).softmax(dim=1).max(dim=1).values.numpy()
    value = manifest["threshold"]["value"]
    assert (scores >= value).mean() >= 0.95 > (scores >= value + 0.001).mean() - 0.02
    classifier = Classifier(bundle)
    for index in range(20):
        first = classifier.predict(digits_source().train.open(index))[:1]
        own = manifest["threshold"]["classes"].get(first[0].class_name, value)
        assert classifier.is_none_of_these(first) is (first[0].probability < own)


@pytest.mark.slow
def test_unlabelled_images_are_fitted_to_the_teacher_and_negatives_are_scored(
    tiny_student: Path, tmp_path: Path, write_image: Callable[..., Path]
) -> None:
    (tmp_path / "pictures").mkdir()
    for index in range(120):
        digits_source().train.open(index).save(tmp_path / "pictures" / f"{index}.png")
    for seed in range(40):
        write_image(tmp_path / "noise" / f"{seed}.png", seed)
    options = ExportOptions(pictures=tmp_path / "pictures", negatives=tmp_path / "noise", accept_percent=90)
    manifest = export(tiny_student, tmp_path / "bundle", Path("data"), quietly, options=options).manifest
    assert [manifest["calibration"][name] for name in ("fitted_to", "images", "error_of")] == ["teacher", 60, "teacher"]
    threshold = manifest["threshold"]
    assert (threshold["images"], threshold["accept_percent"], threshold["negatives"]["images"]) == (60, 90, 40)
    classifier = Classifier(tmp_path / "bundle")
    answers = [classifier.predict(path, top=1) for path in sorted((tmp_path / "noise").iterdir())]
    accepted = sum(not classifier.is_none_of_these(answer) for answer in answers)
    assert threshold["negatives"]["false_acceptance_percent"] == pytest.approx(100 * accepted / 40)
    assert 0 <= threshold["negatives"]["auroc"] <= 1
    card = (tmp_path / "bundle/README.md").read_text()
    assert "teacher's answers to 60 images given with --images" in card
    assert "Of 40 images that show none of the classes" in card


@pytest.fixture
def without_test_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """The digits as a folder with labelled training images alone."""
    monkeypatch.setattr(export_flow, "reopen_source", lambda *_: replace(digits_source(), test=None))


@pytest.fixture
def unscored_student(tiny_student: Path, tmp_path: Path) -> Path:
    """A student that was never scored, since there were no held-out labelled images."""
    data = torch.load(tiny_student, weights_only=True)
    data["metrics"] = {name: value for name, value in data["metrics"].items() if not name.startswith("test_")}
    torch.save(data, tmp_path / "unscored.pt")
    return tmp_path / "unscored.pt"


@pytest.mark.slow
@pytest.mark.usefixtures("without_test_images")
def test_without_test_images_no_accuracy_is_given(
    unscored_student: Path, tmp_path: Path, seen: dict[str, list[set[bytes]]]
) -> None:
    events: list[object] = []
    manifest = export(unscored_student, tmp_path / "bundle", Path("data"), events.append, options=INT8).manifest
    assert_three_disjoint_parts(seen, manifest["images"])
    assert {manifest["images"][name]["origin"] for name in ("gate", "calibrate", "choose")} == {"training"}
    assert not manifest["images"]["gate"]["labels"]
    assert manifest["test_top1_percent"] is None
    for entry in manifest["precisions"].values():
        assert entry["parity"]["top1_percent"] is entry["parity"]["student_top1_percent"] is None
    card = (tmp_path / "bundle/README.md").read_text()
    _, metadata, text = card.split("---\n", 2)
    assert "model-index" not in metadata
    assert "accuracy" not in metadata
    assert "training images, not held out. No top-1 is reported" in text
    assert "Its accuracy is unknown: there were no held-out labelled images" in text
    rows = [line for line in text.splitlines() if line.startswith(("| fp32 |", "| int8 |"))]
    assert len(rows) == 2
    assert all(row.endswith("| no held-out labelled images |") for row in rows)
    assert any("digits has no test images" in str(event) for event in events)
    assert manifest["calibration"]["temperature"] == 1
    assert manifest["threshold"]["value"] is None
    assert "the student was trained on every image" in manifest["threshold"]["reason"]
    assert "not held out" in str(events[-1])


@pytest.mark.slow
def test_the_card_gives_the_score_of_the_training_with_its_images(tiny_student: Path, tmp_path: Path) -> None:
    data = torch.load(tiny_student, weights_only=True)
    data["metrics"] = {"test_top1_percent": 90.0, "test_images": 10, "test_unreadable": 3}
    data["recipe"]["selection"] = "promptkd"
    torch.save(data, tmp_path / "student.pt")
    manifest = export(tmp_path / "student.pt", tmp_path / "bundle", Path("data"), quietly).manifest
    assert (manifest["test_images"], manifest["test_unreadable"]) == (10, 3)
    card = (tmp_path / "bundle/README.md").read_text()
    # Wilson: (9.5 to 10 of 10 are likely, 59.6 % not unlikely), by scipy.stats.binomtest(9, 10)
    assert (
        "Top-1 on 10 test images, in PyTorch: 90.00 % (95 % interval 59.6 to 98.2 %); 3 more could not be read" in card
    )
    assert "optimistically biased because its epoch was selected on test images" in card
    assert "name: top-1, percent, epoch selected on test images" in card


@pytest.mark.parametrize(("more", "changed"), [(0.0, False), (0.1, False), (5.0, True)])
def test_test_images_with_another_score_than_in_training_are_reported(
    tiny_student: Path, tmp_path: Path, more: float, changed: bool
) -> None:
    data = torch.load(tiny_student, weights_only=True)
    was = data["metrics"]["test_top1_percent"] - more
    data["metrics"] = {"test_top1_percent": was, "test_images": 360, "test_unreadable": 0}
    torch.save(data, tmp_path / "student.pt")
    events: list[object] = []
    export(tmp_path / "student.pt", tmp_path / "bundle", Path("data"), events.append)
    sentence = f"top-1 on its 360 test images was {was:.2f} % when it was trained and is {was + more:.2f} % now"
    assert (sentence in str(events)) is changed
    assert (sentence in (tmp_path / "bundle/README.md").read_text()) is changed


@pytest.mark.slow
def test_int8_that_misses_its_gate_fails_and_no_other_method_is_tried(
    tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoders: list[str] = []

    def counted(encoder: Path, *arguments: Any) -> Any:
        encoders.append(encoder.name)
        return failing("int8")(encoder, *arguments)

    monkeypatch.setattr(export_flow, "measure_parity", counted)
    monkeypatch.setattr(precisions, "single_thread_timings", without_measurement)
    exported = export(tiny_student, tmp_path / "bundle", Path("data"), quietly, options=INT8)
    assert encoders == ["image_encoder.onnx", "image_encoder.int8.onnx"]
    assert "smallest cosine 0.500000 (limit 0.9)" in exported.failed["int8"]
    assert exported.failed["int8"].startswith(("static-", "dynamic-"))
    assert len(list((tmp_path / "bundle").glob("*.onnx"))) == 2


@pytest.mark.usefixtures("without_test_images")
def test_int8_with_too_few_images_is_refused_and_the_others_stay(
    tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = replace(digits_source(), train=digits_source().train.subset(list(range(20))), test=None)
    monkeypatch.setattr(export_flow, "reopen_source", lambda *_: few)
    exported = export(tiny_student, tmp_path / "bundle", Path("data"), quietly, options=INT8)
    assert exported.failed["int8"].startswith("int8 needs at least 32 different images")
    assert "only 20 training images could be read" in exported.failed["int8"]
    assert exported.manifest["precisions"]["fp32"]["parity"]["images"] == 20
    assert exported.manifest["images"]["calibrate"]["images"] == 0
    assert "int8 is not in the bundle: int8 needs at least 32" in (tmp_path / "bundle/README.md").read_text()


# --- students that cannot be exported -------------------------------------------------------------------


def test_a_student_with_weights_that_are_not_finite_is_refused(tiny_student: Path, tmp_path: Path) -> None:
    data = torch.load(tiny_student, weights_only=True)
    name = next(name for name, value in data["state_dict"].items() if name.startswith("projector") and value.ndim == 2)
    data["state_dict"][name][:] = float("nan")
    torch.save(data, tmp_path / "student.pt")
    with pytest.raises(ComkdError, match=r"not finite|NaN") as caught:
        export(tmp_path / "student.pt", tmp_path / "bundle", Path("data"), quietly)
    assert str(caught.value).startswith(f"{tmp_path / 'student.pt'}: ")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("names", "vectors", "scale", "message"),
    [
        (("a", "b\n", "c\u2028"), 3, 1.0, None),
        (("a", "\u2028"), 2, 1.0, "has a class without a name"),
        (("a", "b"), 3, 1.0, "has 2 class names but 3 class vectors"),
        (("a", "b"), 2, float("nan"), "are not finite"),
    ],
)
def test_class_names_and_vectors_go_together(
    names: tuple[str, ...], vectors: int, scale: float, message: str | None
) -> None:
    if message is None:
        check_head(Path("student.pt"), names, Head(np.eye(vectors), scale))
        return
    with pytest.raises(ExportError, match=message) as caught:
        check_head(Path("student.pt"), names, Head(np.eye(vectors), scale))
    assert caught.value.path == Path("student.pt")


@pytest.mark.slow
def test_a_text_encoder_whose_features_are_not_finite_is_refused(
    tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def odd(graph: Path, batches: Any, *arguments: Any) -> Any:
        answers = run_graph(graph, batches, *arguments)
        last = list(answers)[-1]
        return {**answers, last: answers[last] * np.nan}

    monkeypatch.setattr(text, "run_graph", odd)
    with pytest.raises(ExportError, match="its features differ from the student's class vectors") as caught:
        export(tiny_student, tmp_path / "bundle", Path("data"), quietly, options=ExportOptions(text=True))
    assert (caught.value.path, caught.value.found) == ("text_encoder.onnx", "max |difference| nan")


# --- exports that do not end ---------------------------------------------------------------------------


def test_an_unwritable_folder_is_refused_before_any_work(
    tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"x")
    monkeypatch.setattr(export_flow, "read_parts", lambda *_: pytest.fail("images were read first"))
    with pytest.raises(WriteError, match=r"file/bundle: could not be written: .* is a file"):
        export(tiny_student, tmp_path / "file/bundle", Path("data"), quietly)


def test_a_folder_without_the_runtime_is_refused_before_any_work(
    tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_flow, "read_parts", lambda *_: pytest.fail("images were read first"))
    options = ExportOptions(web=True, web_runtime=tmp_path)
    with pytest.raises(ExportError) as caught:
        export(tiny_student, tmp_path / "bundle", Path("data"), quietly, options=options)
    assert caught.value.path == tmp_path
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "step", ["export_image_encoder", "add_classifier", "measure_parity", "to_fp16", "complete_bundle"]
)
def test_a_full_disk_keeps_the_old_bundle(
    bundle: Path, tiny_student: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(export_flow, step, full)
    before = {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()}
    with pytest.raises(WriteError, match=rf"^{bundle}: could not be written: No space left on device; free space"):
        export(
            tiny_student, bundle, Path("data"), quietly, force=True, options=ExportOptions(precisions=("fp32", "fp16"))
        )
    assert {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()} == before
    assert [path.name for path in bundle.parent.iterdir()] == [bundle.name]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_nothing_and_says_so(
    tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, code: int
) -> None:
    def measured(*_: object) -> None:
        os.kill(os.getpid(), number)
        threading.Event().wait(10)

    monkeypatch.setattr(export_flow, "measure_parity", measured)
    with pytest.raises(Interrupted, match="it leaves no unfinished bundle") as caught:
        export(tiny_student, tmp_path / "bundle", Path("data"), quietly)
    assert caught.value.exit_code == code
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_that_stopped_the_graphs_process_first_is_no_missed_gate(
    tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(encoder: Path, *_: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            threading.Event().wait(10)
        except KeyboardInterrupt:  # as code that C calls back loses it
            raise ExportError("onnxruntime could not run it (signal 2): no message", path=encoder.name) from None

    monkeypatch.setattr(export_flow, "measure_parity", measured)
    with pytest.raises(Interrupted):
        export(tiny_student, tmp_path / "bundle", Path("data"), quietly)


def processes_at(folder: Path) -> list[str]:
    """Command lines of the processes that name a folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it has ended
            continue
        if str(folder) in line:
            found.append(line)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["Exporting", "Checking fp32", "Quantising"])
def test_a_terminated_process_leaves_nothing(tiny_student: Path, tmp_path: Path, onnx_files: Path, stage: str) -> None:
    out = tmp_path / "target/bundle"
    options = ["--precision", "fp32", "--precision", "int8", "--out", str(out), "--runs", str(tmp_path / "runs")]
    exported = None if stage == "Exporting" else onnx_files
    with warm.Process("export", tiny_student, *options, cwd=tmp_path, exported=exported) as process:
        assert process.stderr is not None
        assert any(line.startswith(stage) for line in process.stderr)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGTERM)  # as `timeout` does
        rest = process.stderr.read()
    assert (process.returncode, rest.strip().splitlines()[-1]) == (
        143,
        "note: the export was stopped; it leaves no unfinished bundle",
    )
    assert "Traceback" not in rest
    assert list(out.parent.iterdir()) == []
    assert processes_at(out.parent) == []


@pytest.mark.slow
def test_leftovers_of_a_killed_export_are_removed_by_the_next(
    tiny_student: Path, tmp_path: Path, onnx_files: Path
) -> None:
    out = tmp_path / "target/bundle"
    with warm.Process("export", tiny_student, "--out", out, cwd=tmp_path, exported=onnx_files) as process:
        assert process.stderr is not None
        assert any(line.startswith("Checking fp32") for line in process.stderr)
        process.kill()
    left = [path.name for path in out.parent.iterdir()]
    assert left
    assert all(name.startswith(".bundle.") for name in left)
    done = warm.run("export", tiny_student, "--out", out, cwd=tmp_path, exported=onnx_files)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in out.parent.iterdir()] == ["bundle"]
    assert f"gate: {tiny.TEST} test images" in done.stdout
    assert "95.6 to 100.0 %" in done.stdout
