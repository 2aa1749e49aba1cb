"""A bundle's check of another machine: what passes, and each thing that does not."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from comkd_cli.edge import classifier, self_test
from comkd_cli.edge.classifier import Classifier
from comkd_cli.edge.images import Preprocessing, load_prepared
from comkd_cli.edge.manifest import BundleProblem
from comkd_cli.edge.self_test import Check, run_self_test
from tests.referenced import sign

NAMES = ["odd", "portrait", "rotated", "grey", "palette", "cmyk", "deep", "photo"]


def test_the_machine_that_made_it_differs_by_nothing(referenced_once: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert classifier.main(["--bundle", str(referenced_once), "--self-test"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["tensors", "fp32", "int8"]
    assert all(line.split()[1:4] == ["largest", "difference", "0"] or "difference 0," in line for line in lines)
    assert all(line.endswith(": ok") for line in lines)


def test_one_precision_is_checked_by_itself(referenced_once: Path) -> None:
    tested = run_self_test(referenced_once, "int8", Classifier)
    assert [check.name for check in tested.checks] == ["tensors", "int8"]
    with pytest.raises(BundleProblem) as caught:
        run_self_test(referenced_once, "int4", Classifier)
    assert (caught.value.field, caught.value.allowed) == ("precisions", "fp32, int8")


def test_another_way_to_resize_is_named_with_its_images(
    referenced_once: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stretched(content: Any, preprocessing: Preprocessing) -> np.ndarray:
        return load_prepared(content, replace(preprocessing, resize_mode="squash"))

    monkeypatch.setattr(self_test, "load_prepared", stretched)
    assert classifier.main(["--bundle", str(referenced_once), "--self-test", "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    tensors, fp32, int8 = document["checks"]
    assert not document["passed"]
    assert {"portrait", "photo", "rotated"} <= set(tensors["differing"])
    assert tensors["largest"] == max(tensors["differences"].values())
    assert tensors["largest"] > tensors["limits"]["photo"]
    assert (fp32["differing"], int8["differing"]) == ([], [])  # the reference's tensors went into the graph
    assert document["runs_with"] == document["reference_made_with"]


@pytest.mark.parametrize("shift", [0.5, float("nan")])
def test_a_runtime_with_other_logits_is_named(referenced: Path, shift: float, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = Classifier.logits
    monkeypatch.setattr(Classifier, "logits", lambda self, images: logits(self, images) + np.float32(shift))
    tensors, fp32, int8 = run_self_test(referenced, None, Classifier).checks
    assert tensors.differing == []
    assert fp32.differing == int8.differing == NAMES
    assert fp32.document()["largest"] == (None if np.isnan(shift) else pytest.approx(0.5, abs=1e-3))
    json.dumps(fp32.document(), allow_nan=False)
    assert f"FAILED for {', '.join(NAMES)}" in fp32.text()


def test_a_difference_within_the_limit_passes() -> None:
    check = Check("fp32", {"odd": 0.1, "photo": 0.2}, {"odd": 0.1, "photo": 0.19}, {})
    assert (check.differing, check.largest) == (["photo"], 0.2)
    assert check.text().startswith("fp32     largest difference 0.2 (limit 0.1 to 0.19): FAILED for photo")


def test_an_image_that_this_machine_cannot_decode_is_named_with_the_reason(
    referenced: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (referenced / "reference/cmyk.tif").write_bytes(b"II no TIFF")
    sign(referenced)
    assert classifier.main(["--bundle", str(referenced), "--self-test"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("FAILED for cmyk")
    assert lines[1].startswith("  cmyk: ")
    assert "not a readable image; the supported formats are" in lines[1]


def test_logits_of_another_shape_differ(referenced: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Classifier, "logits", lambda self, images: np.zeros((1, 2), np.float32))
    _, fp32 = run_self_test(referenced, "fp32", Classifier).checks
    assert (fp32.differing, fp32.largest) == (NAMES, float("inf"))


# --- bundles that cannot be checked --------------------------------------------------------------------


def test_an_older_bundle_has_nothing_to_check_against(colour_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BundleProblem) as caught:
        run_self_test(colour_bundle, None, Classifier)
    assert (caught.value.path, caught.value.field) == (colour_bundle / "manifest.json", "files")
    assert caught.value.remedy == "export the bundle again"
    assert classifier.main(["--bundle", str(colour_bundle), "--self-test"]) == 1
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    assert "an older comkd exported the bundle" in printed.err


def test_a_removed_reference_is_one_error_with_the_remedy(referenced: Path) -> None:
    shutil.rmtree(referenced / "reference")
    with pytest.raises(BundleProblem) as caught:
        run_self_test(referenced, None, Classifier)
    assert caught.value.path == referenced / "reference/reference.json"
    assert caught.value.remedy == "export the bundle again"


@pytest.mark.parametrize("name", ["reference.json", "odd.npy", "photo.jpg", "logits.int8.npy"])
def test_a_file_that_was_changed_is_refused(referenced: Path, name: str) -> None:
    path = referenced / "reference" / name
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(BundleProblem, match="its sha256 differs") as caught:
        run_self_test(referenced, None, Classifier)
    assert caught.value.path == path


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"format": "comkd-reference/1"}', b'{"images": []}'])
def test_a_damaged_document_is_refused(referenced: Path, content: bytes) -> None:
    (referenced / "reference/reference.json").write_bytes(content)
    with pytest.raises(BundleProblem, match="is damaged") as caught:
        run_self_test(sign(referenced), None, Classifier)
    assert caught.value.path == referenced / "reference/reference.json"


def test_a_damaged_array_is_refused(referenced: Path) -> None:
    (referenced / "reference/odd.npy").write_bytes(b"\x93NUMPY\x01\x00")
    with pytest.raises(BundleProblem, match="is damaged") as caught:
        run_self_test(sign(referenced), None, Classifier)
    assert caught.value.path == referenced / "reference/odd.npy"


def change(bundle: Path, **fields: Any) -> Path:
    path = bundle / "reference/reference.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return sign(bundle)


def test_another_format_is_refused(referenced: Path) -> None:
    with pytest.raises(BundleProblem) as caught:
        run_self_test(change(referenced, format="comkd-reference/2"), None, Classifier)
    assert (caught.value.field, caught.value.found) == ("format", "comkd-reference/2")
    assert caught.value.allowed == "comkd-reference/1"


def test_a_precision_without_reference_logits_is_refused(referenced: Path) -> None:
    with pytest.raises(BundleProblem) as caught:
        run_self_test(change(referenced, logits={}), "int8", Classifier)
    assert (caught.value.problem, caught.value.field) == ("missing", "logits.int8")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--self-test", "a.png"],
        ["--self-test", "--benchmark"],
        ["--self-test", "--add-class", "fox"],
        ["--benchmark", "--csv", "a.csv", "folder"],
        ["--benchmark", "a.png", "b.png"],
        ["--benchmark", "-"],
        ["--self-test", "--no-threshold"],
        ["--benchmark", "--top", "5"],
        ["a.png", "--seconds", "1"],
        ["--self-test", "--seconds", "1"],
        ["--benchmark", "--seconds", "-1"],
        ["--benchmark", "--seconds", "nan"],
        [],
    ],
)
def test_options_that_do_not_go_together_are_refused(
    referenced_once: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        classifier.main(["--bundle", str(referenced_once), *arguments])
    assert caught.value.code == 2
    assert "predict.py: error:" in capsys.readouterr().err.splitlines()[-1]
