import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from comkd_cli.checkpoints import load_student
from comkd_cli.data.digits import digits_source
from comkd_cli.errors import BundleError, DataError, ExportError
from comkd_cli.flows import export as export_flow
from comkd_cli.flows.export import export
from comkd_cli.flows.predict import predict
from comkd_cli.packaging.parity import measure_parity
from comkd_cli.predictor import Classifier, prepare


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
    assert manifest["parity"]["images"] == 64
    assert manifest["parity"]["feature_cosine_min"] >= 0.99999


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


def test_a_student_that_fails_parity_leaves_no_bundle(
    tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shifted(*arguments: np.ndarray):  # type: ignore[no-untyped-def]
        return replace(measure_parity(*arguments), feature_difference_max=0.02)  # type: ignore[arg-type]

    monkeypatch.setattr(export_flow, "measure_parity", shifted)
    with pytest.raises(ExportError, match=r"no bundle was made: max .difference. 2\.00e-02"):
        export(tiny_student, tmp_path / "bundle", Path("data"), quietly)
    assert list(tmp_path.iterdir()) == []


def test_pictures_for_the_check_can_come_from_a_folder(tiny_student: Path, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    with pytest.raises(DataError, match="--images"):
        export(tiny_student, tmp_path / "bundle", Path("data"), quietly, pictures=pictures)
    for index in range(9):
        digits_source().train.open(index).save(pictures / f"{index}.png")
    manifest = export(tiny_student, tmp_path / "bundle", Path("data"), quietly, pictures=pictures)
    assert manifest["parity"]["images"] == 9


def test_force_never_replaces_what_is_no_bundle(tiny_student: Path, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "precious.bin").write_bytes(b"x")
    with pytest.raises(ExportError, match="is no bundle"):
        export(tiny_student, tmp_path / "models", Path("data"), quietly, force=True)
    assert (tmp_path / "models" / "precious.bin").exists()
    (tmp_path / "empty").mkdir()
    export(tiny_student, tmp_path / "empty", Path("data"), quietly)
    assert (tmp_path / "empty" / "manifest.json").exists()
