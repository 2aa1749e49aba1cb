"""`comkd inspect`: what it says of each kind of file, and of files that are hostile or of no kind."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from click.testing import CliRunner, Result

from comkd_cli.bundles.metadata import write_metadata
from comkd_cli.cli.app import main
from comkd_cli.cli.inspected import escaped, escaped_json, rows
from comkd_cli.data.holdout import Holdout
from comkd_cli.edge.images import Preprocessing
from comkd_cli.models.checkpoints import SavedTeacher, StudentRecord, TeacherRecord, save_teacher
from comkd_cli.models.clip import Origin
from comkd_cli.models.plain_data import save_plain
from comkd_cli.models.text_student import new_text_student, save_text_student
from comkd_cli.recipe import parse_recipe
from tests import tiny
from tests.models.test_text_student import record as text_record

HOSTILE = "\x1b]0;owned\x07\x9b31m\u202ecat"
ESCAPED = r"\x1b]0;owned\x07\x9b31m\u202ecat"
ORIGIN = Origin("ViT-B-32", "openai", None, "gelu")
PIXELS = Preprocessing(16, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def inspect(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["inspect", *map(str, arguments)])


def document(path: Path) -> dict[str, Any]:
    result = inspect(path, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.output)
    return found


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    record = TeacherRecord(
        "key of it",
        {"arch": "ViT-B-32"},
        ("cat", HOSTILE),
        "a {}",
        PIXELS,
        ORIGIN,
        {"test_top1_percent": 81.5},
    )
    path = tmp_path / "teacher.pt"
    vectors = torch.nn.functional.normalize(torch.ones(2, 4), dim=1)
    save_teacher(path, SavedTeacher(record, vectors, torch.tensor(30.0), {"w": torch.zeros(3, 5)}))
    return path


@pytest.fixture
def student(tmp_path: Path) -> Path:
    record = StudentRecord(
        recipe=parse_recipe(tiny.recipe()),
        recipe_name="pets",
        source="photos",
        class_names=("cat", HOSTILE),
        template="a {}",
        preprocessing=PIXELS,
        backbone=ORIGIN,
        backbone_sha256=None,
        teacher=None,
        identity="12ab",
        metrics={"test_top1_percent": 97.5},
        holdout=Holdout(10.0),
    )
    plain = {**vars(record), "recipe": record.recipe.model_dump(mode="json"), "class_names": list(record.class_names)}
    plain |= {"preprocessing": vars(PIXELS), "backbone": vars(record.backbone), "holdout": vars(record.holdout)}
    tensors = {"class_vectors": torch.ones(2, 4), "logit_scale": torch.tensor(30.0), "state_dict": {"w": torch.ones(7)}}
    save_plain(tmp_path / "student.pt", {"format": "comkd-student/1", **plain, **tensors})
    return tmp_path / "student.pt"


def test_a_student_has_its_classes_metrics_and_the_size_of_its_tensors(student: Path) -> None:
    found = document(student)
    assert (found["kind"], found["recipe"], found["data"]) == ("student", "pets", "photos")
    assert (found["classes"], found["templates"]) == (["cat", HOSTILE], ["a {}"])
    assert (found["tensors"]["numbers"], found["bytes"]) == (7, student.stat().st_size)
    assert (found["held_out_percent"], found["metrics"]) == (10.0, {"test_top1_percent": 97.5})
    printed = inspect(student).output
    assert "97.5" in printed
    assert f"2: cat, {ESCAPED}" in printed


def test_a_teacher_has_what_it_was_adapted_from(teacher: Path) -> None:
    found = document(teacher)
    assert (found["kind"], found["adapted"], found["key"]) == ("teacher", "all weights", "key of it")
    assert found["tensors"]["numbers"] == 15
    assert ESCAPED in inspect(teacher).output


@pytest.mark.slow
def test_a_text_student_has_its_size_beside_its_teachers(tmp_path: Path) -> None:
    made = text_record(class_names=("cat", HOSTILE))
    path = tmp_path / "text_student.pt"
    save_text_student(path, new_text_student(made.shape, made.vocabulary, 12, seed=1), made)
    found = document(path)
    assert (found["kind"], found["parameters"], found["teacher_parameters"]) == ("text student", 10, 100)
    assert (found["tokens"], found["classes"]) == (len(made.vocabulary), ["cat", HOSTILE])
    assert (found["templates"], found["metrics"]) == (["a photo of a {}."], {"held_out_names": 2.0})
    printed = inspect(path).output
    assert "10, of the teacher's 100" in printed
    assert ESCAPED in printed


def test_a_graph_has_its_inputs_outputs_and_metadata(colour_bundle: Path) -> None:
    path = colour_bundle / "classifier.onnx"
    bare = document(path)
    assert bare["inputs"] == [{"name": "image", "type": "float", "shape": ["batch", 3, 8, 8]}]
    assert bare["outputs"] == [{"name": "logits", "type": "float", "shape": ["batch", 3]}]
    assert (bare["weights"], bare["opsets"], bare["metadata"]) == (12, {"ai.onnx": 17}, {})
    write_metadata(path, {"kind": "classifier", "classes": ["cat", HOSTILE], "temperature": 1.5})
    assert document(path)["metadata"]["classes"] == ["cat", HOSTILE]
    printed = inspect(path).output
    assert "graph (classifier)" in printed
    assert f"2: cat, {ESCAPED}" in printed
    assert "image float (batch, 3, 8, 8)" in printed


def test_a_bundle_has_its_manifests_facts_and_the_state_of_its_files(
    write_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    bundle = write_bundle(tmp_path / "b", ("red", HOSTILE.replace("\x1b", "").replace("\x9b", ""), "blue"))
    found = document(bundle)
    assert (found["kind"], found["format"], len(found["classes"])) == ("bundle", "comkd-bundle/1", 3)
    assert (found["files"]["count"], found["files"]["changed"], found["files"]["missing"]) == (2, [], [])
    (bundle / "classifier.onnx").write_bytes(b"other")
    changed = inspect(bundle)
    assert changed.exit_code == 1
    assert "1 changed" in changed.output
    assert "classifier.onnx" in changed.stderr


def test_a_removed_reference_is_no_fault_but_a_part_of_it_is(referenced: Path) -> None:
    (referenced / "reference/odd.npy").unlink()
    assert inspect(referenced).exit_code == 1
    shutil.rmtree(referenced / "reference")
    files = document(referenced)["files"]
    assert (files["reference"], files["missing"]) == ("removed", [])


def test_a_manifest_cannot_make_it_read_files_elsewhere(colour_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    path = colour_bundle / "manifest.json"
    fields = json.loads(path.read_text())
    too_long = "a/" * 5000
    fields["files"] |= {name: {"sha256": "0"} for name in ("../secret", str(tmp_path / "secret"), too_long)}
    path.write_text(json.dumps({**fields, "opset": [HOSTILE], "recipe": HOSTILE}))
    result = inspect(colour_bundle, "--json")
    assert result.exit_code == 1
    files = json.loads(result.stdout)["files"]
    assert (files["count"], len(files["missing"]), files["changed"]) == (2, 3, [])
    assert "opset" not in json.loads(result.stdout)  # not of the type that comkd writes


def test_nothing_that_a_terminal_interprets_is_printed(teacher: Path, student: Path, colour_bundle: Path) -> None:
    path = colour_bundle / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "recipe": HOSTILE, "failed": {HOSTILE: HOSTILE}}))
    write_metadata(colour_bundle / "classifier.onnx", {"kind": HOSTILE, "classes": [HOSTILE], HOSTILE: 1})
    for file in (teacher, student, colour_bundle, colour_bundle / "classifier.onnx"):
        for arguments in ((file,), (file, "--json")):
            assert all(line.isprintable() for line in inspect(*arguments).output.split("\n"))


OTHERS: dict[str, bytes] = {
    "empty": b"",
    "text.onnx": b"no graph",
    "cut.onnx": b"\x08\x08\x12\x07pyto",
    "no nodes.onnx": onnx.ModelProto(ir_version=8).SerializeToString(),
    "cut.pt": b"PK\x03\x04 cut",
    "image.png": b"\x89PNG\r\n\x1a\n",
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_file_of_no_known_kind_is_one_error(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(OTHERS[name])
    result = inspect(tmp_path / name)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert "student.pt, teacher.pt, text_student.pt, an exported .onnx, a bundle" in result.stderr


def test_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"format": "comkd-student/1", "x": Harmful()}, tmp_path / "student.pt")
    result = inspect(tmp_path / "student.pt")
    assert (result.exit_code, result.stdout) == (1, "")
    assert not (tmp_path / "ran").exists()


def test_folders_and_pipes_are_of_no_kind(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        assert inspect(path).exit_code == 1
    assert inspect(tmp_path / "absent").exit_code == 2


@pytest.mark.slow
def test_graphs_and_bundles_need_no_torch(colour_bundle: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from comkd_cli.cli.app import main; "
        "[main(['inspect', path], standalone_mode=False) for path in sys.argv[1:]]; "
        "sys.exit('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", script, str(colour_bundle), str(colour_bundle / "classifier.onnx")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr


def test_escaped_text_is_printable_and_plain_text_stays() -> None:
    assert escaped(f"{HOSTILE}\n\udce9 é 狐") == f"{ESCAPED}\\n\\udce9 é 狐"
    assert json.loads(escaped_json({"a": HOSTILE})) == {"a": HOSTILE}
    assert escaped_json({"a": "é 狐"}) == '{\n  "a": "é 狐"\n}'


def test_a_bundles_precisions_and_text_encoders_have_their_files_and_units() -> None:
    parity = {"feature_cosine_min": 0.9889634, "top1_agreement_percent": 98.046875, "top1_percent": 70, "images": 512}
    text = {"precisions": {"fp32": {"file": "text.onnx"}, "int8": {"file": "text.int8.onnx"}}, "parameters": 3_267_328}
    precisions = {"int8": {"classifier": "it.int8.onnx", "parity": parity}}
    found = rows({"kind": "bundle", "sha256": "0", "precisions": precisions, "text": text})
    assert (
        found["precision int8"]
        == "it.int8.onnx: smallest cosine 0.988963, top-1 agreement 98.05 %, top-1 70.00 %, images 512"
    )
    assert found["text encoder"] == "text.onnx (fp32), text.int8.onnx (int8), 3,267,328 parameters"
    earlier = rows({"kind": "bundle", "sha256": "0", "precisions": {}, "text": {"file": "text_encoder.onnx"}})
    assert earlier["text encoder"] == "text_encoder.onnx"
