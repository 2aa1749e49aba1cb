import hashlib
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ruamel.yaml import YAML

from comkd_cli.checkpoints import load_student
from comkd_cli.data.digits import digits_source
from comkd_cli.errors import BundleError, DataError, ExportError
from comkd_cli.flows import export as export_flow
from comkd_cli.flows.export import Wishes, export
from comkd_cli.flows.predict import predict
from comkd_cli.method.teacher import encode_classes
from comkd_cli.packaging import precisions
from comkd_cli.packaging.parity import GATES, Gate, measure_parity
from comkd_cli.packaging.runner import run_graph
from comkd_cli.predictor import BundleProblem, Classifier, prepare
from comkd_cli.teachers import class_encoder


def quietly(event: object) -> None:
    pass


@pytest.fixture(scope="module")
def bundle(tiny_student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "Bündel für Geräte"
    export(tiny_student, out, Path("data"), quietly)
    return out


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
    assert set(manifest["files"]) == names
    assert {path.name for path in bundle.iterdir()} == names | {"manifest.json"}
    for name, entry in manifest["files"].items():
        content = (bundle / name).read_bytes()
        assert (hashlib.sha256(content).hexdigest(), len(content)) == (entry["sha256"], entry["bytes"])
    parity = manifest["precisions"]["fp32"]["parity"]
    assert parity["images"] == 360
    assert parity["feature_cosine_min"] >= 0.99999
    assert parity["top1_percent"] == parity["student_top1_percent"]
    assert (manifest["opset"], manifest["memory"], manifest["text"], manifest["failed"]) == (20, "training", None, {})


def test_logits_are_the_features_times_the_class_vectors(bundle: Path) -> None:
    import onnxruntime

    manifest = json.loads((bundle / "manifest.json").read_text())
    images = np.random.default_rng(0).normal(size=(3, 3, 16, 16)).astype(np.float32)
    encoder = onnxruntime.InferenceSession(bundle / "image_encoder.onnx", providers=["CPUExecutionProvider"])
    (features,) = encoder.run(["image_features"], {"image": images})
    expected = manifest["logit_scale"] * features @ np.load(bundle / "class_vectors.npy").T
    assert np.allclose(Classifier(bundle).logits(images), expected, atol=1e-4)
    assert np.allclose(np.linalg.norm(features, axis=1), 1, atol=1e-6)


def test_the_bundle_names_images_as_the_student_does(bundle: Path, tiny_student: Path, tmp_path: Path) -> None:
    student, record = load_student(tiny_student)
    paths = []
    for index in range(5):
        paths.append(str(tmp_path / f"{index}.png"))
        digits_source().train.open(index).save(paths[-1])
    answers = predict(bundle, paths, top=10)
    images = np.stack([prepare(digits_source().train.open(index), record.preprocessing) for index in range(5)])
    with torch.no_grad():
        expected = student(torch.from_numpy(images)).logits.softmax(1)
    for answer, row in zip(answers, expected, strict=True):
        given = {entry["class"]: entry["probability"] for entry in answer["classes"]}
        assert [given[str(digit)] for digit in range(10)] == pytest.approx(row.tolist(), abs=1e-5)
        assert list(given.values()) == sorted(given.values(), reverse=True)


def test_the_bundles_own_predict_gives_the_same_answers(bundle: Path, tmp_path: Path) -> None:
    image = tmp_path / "ein Bild.png"
    digits_source().train.open(3).save(image)
    command = [sys.executable, "-I", str(bundle / "predict.py"), str(image), "--json"]
    finished = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert json.loads(finished.stdout)["predictions"] == predict(bundle, [str(image)], top=5)


def test_an_unreadable_image_is_told_and_the_others_answered(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no")
    digits_source().train.open(3).save(tmp_path / "fine.png")
    broken, fine = predict(bundle, [str(tmp_path / "broken.png"), str(tmp_path / "fine.png")], top=1)
    assert "broken.png" in broken["error"]
    assert len(fine["classes"]) == 1


def test_a_folder_that_is_no_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"no manifest\.json"):
        predict(tmp_path, ["a.png"], top=1)


def test_a_bundle_that_is_there_stays_unless_forced(bundle: Path, tiny_student: Path) -> None:
    written = (bundle / "manifest.json").stat().st_ino
    with pytest.raises(ExportError, match="--force"):
        export(tiny_student, bundle, Path("data"), quietly)
    assert (bundle / "manifest.json").stat().st_ino == written
    export(tiny_student, bundle, Path("data"), quietly, force=True)
    assert (bundle / "manifest.json").stat().st_ino != written


def failing(*precisions: str):  # type: ignore[no-untyped-def]
    """measure_parity, with the features of these precisions 0.02 off."""

    def measured(encoder: Path, *arguments: object):  # type: ignore[no-untyped-def]
        parity = measure_parity(encoder, *arguments)  # type: ignore[arg-type]
        missed = any(name in encoder.name for name in precisions) or ("fp32" in precisions and "." not in encoder.stem)
        return replace(parity, feature_difference_max=0.02, feature_cosine_min=0.5) if missed else parity

    return measured


def test_a_student_that_fails_parity_leaves_no_bundle(
    tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_flow, "measure_parity", failing("fp32"))
    with pytest.raises(ExportError, match=r"no bundle was made: fp32: max .difference. 2\.00e-02"):
        export(tiny_student, tmp_path / "bundle", Path("data"), quietly)
    assert list(tmp_path.iterdir()) == []


ALL = ("fp32", "fp16", "int8")
WIDE = {name: Gate(0.9, 90.0, 10.0, gate.difference_max) for name, gate in GATES.items()}


@pytest.fixture(scope="module")
def whole(tiny_student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with all that one can have, but for the page."""
    out = tmp_path_factory.mktemp("out") / "whole"
    # So small a student is worse in eight bits than one of use: the gates are tested elsewhere.
    wishes = Wishes(precisions=ALL, text=True, gates=WIDE, license="apache-2.0")
    exported = export(tiny_student, out, Path("data"), quietly, wishes=wishes)
    assert exported.failed == {}
    return out


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


def test_the_first_precision_is_the_one_that_is_taken(whole: Path) -> None:
    images = np.zeros((1, 3, 16, 16), np.float32)
    assert np.array_equal(Classifier(whole).logits(images), Classifier(whole, precision="fp32").logits(images))
    with pytest.raises(BundleProblem, match=r"manifest\.json: the bundle has no int4; it has fp32, fp16, int8"):
        Classifier(whole, precision="int4")


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
    with pytest.raises(BundleProblem, match="'red fox' is one of the classes already"):
        classifier.add_classes(["red fox"])


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


def test_classes_can_be_added_to_a_bundle_with_text_alone(bundle: Path) -> None:
    with pytest.raises(BundleProblem, match="export it with --text"):
        Classifier(bundle).add_classes(["red fox"])


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


def test_a_precision_that_misses_its_gate_is_left_out_and_told(
    tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_flow, "measure_parity", failing("fp16"))
    exported = export(tiny_student, tmp_path / "bundle", Path("data"), quietly, wishes=Wishes(precisions=ALL[:2]))
    assert list(exported.manifest["precisions"]) == ["fp32"]
    assert "least cosine 0.500000 (limit 0.9995)" in exported.failed["fp16"]
    assert exported.manifest["failed"] == exported.failed
    assert not list((tmp_path / "bundle").glob("*fp16*"))


def test_a_crash_of_onnxruntime_is_a_failed_gate(
    tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crashing(encoder: Path, *arguments: object):  # type: ignore[no-untyped-def]
        if "fp16" in encoder.name:
            raise ExportError(f"{encoder.name}: onnxruntime can't run it (signal 11): no message")
        return measure_parity(encoder, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(export_flow, "measure_parity", crashing)
    exported = export(tiny_student, tmp_path / "bundle", Path("data"), quietly, wishes=Wishes(precisions=ALL[:2]))
    assert "signal 11" in exported.failed["fp16"]
    assert list(exported.manifest["precisions"]) == ["fp32"]


def test_a_way_to_int8_that_onnxruntime_cannot_run_leaves_the_others(
    tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crashing(graph: Path, *arguments: object):  # type: ignore[no-untyped-def]
        if "static-channel" in graph.name:
            raise ExportError(f"{graph.name}: onnxruntime can't run it (signal 11): no message")
        return run_graph(graph, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(precisions, "run_graph", crashing)
    wishes = Wishes(precisions=("fp32", "int8"), gates=WIDE)
    exported = export(tiny_student, tmp_path / "bundle", Path("data"), quietly, wishes=wishes)
    ways = [way["method"] for way in exported.manifest["precisions"]["int8"]["quantisation"]]
    assert sorted(ways) == ["dynamic-signed", "dynamic-unsigned", "static-tensor-percentile"]
    assert len(list((tmp_path / "bundle").glob("*.onnx"))) == 4


def test_text_without_the_teacher_is_told_before_anything_is_made(tiny_student: Path, tmp_path: Path) -> None:
    (tmp_path / "student.pt").write_bytes(tiny_student.read_bytes())
    with pytest.raises(ExportError, match=r"student\.pt: --text needs the student's teacher(.|\n)*without --text"):
        export(tmp_path / "student.pt", tmp_path / "bundle", Path("data"), quietly, wishes=Wishes(text=True))
    assert not (tmp_path / "bundle").exists()


def test_data_with_other_classes_is_refused_as_evaluation_refuses_it(tiny_student: Path, tmp_path: Path) -> None:
    stored = torch.load(tiny_student, weights_only=True)
    torch.save({**stored, "class_names": ["none", *stored["class_names"][1:]]}, tmp_path / "student.pt")
    with pytest.raises(DataError, match=r"digits: the student was trained on 10 classes, and it does not know 0; the"):
        export(tmp_path / "student.pt", tmp_path / "bundle", Path("data"), quietly)
    assert not (tmp_path / "bundle").exists()


def test_names_that_an_older_version_stored_are_a_line_each(tiny_student: Path, tmp_path: Path) -> None:
    stored = torch.load(tiny_student, weights_only=True)
    ends = ["\n", "\u2028", "\x85", "\x0b", "\r\n", "\x1c", " ", "\t", "\f", ""]
    names = [f"{name}{end}" for name, end in zip(stored["class_names"], ends, strict=True)]
    torch.save({**stored, "class_names": names}, tmp_path / "student.pt")
    export(tmp_path / "student.pt", tmp_path / "bundle", Path("data"), quietly)
    assert (tmp_path / "bundle/classes.txt").read_bytes() == b"".join(b"%d\n" % digit for digit in range(10))
    assert Classifier(tmp_path / "bundle").class_names == [str(digit) for digit in range(10)]


def test_text_of_a_teacher_that_was_trained_again_is_not_exported(tiny_student: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(tiny_student.parents[3], runs)
    student = runs / tiny_student.relative_to(tiny_student.parents[3])
    (teacher,) = runs.glob("teachers/*/teacher.pt")
    torch.save({**torch.load(teacher, weights_only=True), "metrics": {}}, teacher)
    with pytest.raises(ExportError, match=r"teacher\.pt: is not the teacher that \S+student\.pt learned from.*sha256"):
        export(student, tmp_path / "bundle", Path("data"), quietly, wishes=Wishes(text=True))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["red fox", "red  fox "], "'red fox' is one of the classes already"),
        (["red_fox", "red fox"], "'red fox' is one of the classes already"),
        ([" 3"], "'3' is one of the classes already"),
        (["  "], "a class to add is empty"),
        (["a\nb"], "a class to add has a line break within it"),
        ([f"{'very ' * 20}long name {end}" for end in ("alpha", "beta")], "can't tell them apart"),
        (
            ["owl", "Ünïcode, 3½ “wolves”"],
            "'Ünïcode, 3½ “wolves”': too long for the text encoder, which reads 10 tokens",
        ),
    ],
)
def test_class_names_that_cannot_be_added_are_told(whole: Path, names: list[str], message: str) -> None:
    classifier = Classifier(whole)
    with pytest.raises(BundleProblem, match=message):
        classifier.add_classes(names)
    assert len(classifier.class_names) == 10


def test_a_precision_can_be_had_without_fp32(tiny_student: Path, tmp_path: Path) -> None:
    export(tiny_student, tmp_path / "bundle", Path("data"), quietly, wishes=Wishes(precisions=("fp16",), gates=WIDE))
    names = {path.name for path in (tmp_path / "bundle").glob("*.onnx")}
    assert names == {"image_encoder.fp16.onnx", "classifier.fp16.onnx"}
    assert Classifier(tmp_path / "bundle").class_names == [str(digit) for digit in range(10)]


def test_latency_and_memory_stand_beside_pytorchs(tiny_student: Path, tmp_path: Path) -> None:
    wishes = Wishes(benchmark=True)
    manifest = export(tiny_student, tmp_path / "bundle", Path("data"), quietly, wishes=wishes).manifest
    entries = {(entry["name"], entry["threads"]): entry for entry in manifest["latency"]}
    assert {name for name, _ in entries} == {"pytorch", "fp32"}
    assert entries["pytorch", 1]["speed_up"] == 1
    fp32 = entries["fp32", 1]
    assert fp32["speed_up"] == pytest.approx(entries["pytorch", 1]["seconds"] / fp32["seconds"])
    assert fp32["memory_share"] < 0.7  # no torch in that process


def test_pictures_for_the_check_can_come_from_a_folder(tiny_student: Path, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    with pytest.raises(DataError, match="--images"):
        export(tiny_student, tmp_path / "bundle", Path("data"), quietly, wishes=Wishes(pictures=pictures))
    for index in range(9):
        digits_source().train.open(index).save(pictures / f"{index}.png")
    manifest = export(
        tiny_student, tmp_path / "bundle", Path("data"), quietly, wishes=Wishes(pictures=pictures)
    ).manifest
    assert manifest["precisions"]["fp32"]["parity"]["images"] == 9
    assert manifest["precisions"]["fp32"]["parity"]["top1_percent"] is None


def test_force_never_replaces_what_is_no_bundle(tiny_student: Path, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "precious.bin").write_bytes(b"x")
    with pytest.raises(ExportError, match="is no bundle"):
        export(tiny_student, tmp_path / "models", Path("data"), quietly, force=True)
    assert (tmp_path / "models" / "precious.bin").exists()
    (tmp_path / "empty").mkdir()
    export(tiny_student, tmp_path / "empty", Path("data"), quietly)
    assert (tmp_path / "empty" / "manifest.json").exists()
