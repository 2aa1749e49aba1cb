"""Bundles that cannot be used, as the manifest's readers and the classifier refuse them."""

import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from comkd_cli.edge.classifier import Classifier
from comkd_cli.edge.manifest import BundleProblem, read_manifest
from comkd_cli.errors import ComkdError


def change_manifest(bundle: Path, **fields: Any) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps({**manifest, **fields}))


def sign(bundle: Path, name: str, content: bytes) -> None:
    """Write a file of a bundle, and its sha256 in the manifest."""
    (bundle / name).write_bytes(content)
    files = json.loads((bundle / "manifest.json").read_text())["files"]
    change_manifest(bundle, files={**files, name: {"sha256": hashlib.sha256(content).hexdigest()}})


def problem(bundle: Path) -> BundleProblem:
    with pytest.raises(BundleProblem) as caught:
        Classifier(bundle)
    return caught.value


FIELDS: list[dict[str, Any]] = [
    {},
    {"path": Path("a/manifest.json"), "field": "format", "found": "x/2", "allowed": "x/1", "remedy": "upgrade comkd"},
    {"found": "'owl'", "remedy": "shorten it"},
]


@pytest.mark.parametrize("fields", FIELDS)
def test_a_problem_has_the_text_and_the_fields_of_the_package_errors(fields: dict[str, Any]) -> None:
    error, other = BundleProblem("is wrong", **fields), ComkdError("is wrong", **fields)
    for caught in (error, pickle.loads(pickle.dumps(error))):
        assert (str(caught), vars(caught)) == (str(other), vars(other))


@pytest.mark.parametrize("name", [".", "nowhere"])
def test_a_folder_without_a_manifest_is_no_bundle(colour_bundle: Path, tmp_path: Path, name: str) -> None:
    caught = problem(tmp_path / name)
    assert (caught.path, caught.problem) == (tmp_path / name, "is not a bundle: it has no manifest.json")


@pytest.mark.parametrize(
    ("content", "field", "message"),
    [
        (b"{", None, "could not be read: "),
        (b"", None, "could not be read: "),
        (b"[" * 5000, None, "could not be read: "),
        (b'{"format": "\xff"}', None, "could not be read: "),
        (b"[]", None, "is not a manifest of format comkd-bundle/1"),
        (b"{}", None, "is not a manifest of format comkd-bundle/1"),
        (b'{"format": "comkd-bundle/x", "preprocessing": {}, "files": {}}', None, "is not a manifest"),
        (b'{"format": "other/2", "preprocessing": {}, "files": {}}', None, "is not a manifest"),
        (b'{"format": "comkd-bundle/' + b"9" * 5000 + b'"}', None, "is not a manifest"),
        (b'{"format": ["comkd-bundle/2"]}', None, "is not a manifest"),
        (b'{"format": "comkd-bundle/1"}', "files, precisions, preprocessing", "missing"),
        (b'{"format": "comkd-bundle/1", "preprocessing": {}}', "files, precisions", "missing"),
        (
            b'{"format": "comkd-bundle/1", "preprocessing": {}, "files": {}, "precisions": {}}',
            "precisions",
            "should name the graphs of at least one precision",
        ),
    ],
)
def test_a_file_that_is_no_manifest_is_refused(
    colour_bundle: Path, content: bytes, field: str | None, message: str
) -> None:
    (colour_bundle / "manifest.json").write_bytes(content)
    with pytest.raises(BundleProblem) as caught:
        read_manifest(colour_bundle)
    for error in (caught.value, problem(colour_bundle)):
        assert (error.path, error.field) == (colour_bundle / "manifest.json", field)
        assert error.problem.startswith(message)


def test_a_manifest_of_a_newer_format_is_refused_with_the_remedy(colour_bundle: Path) -> None:
    change_manifest(colour_bundle, format="comkd-bundle/2")
    caught = problem(colour_bundle)
    assert (caught.path, caught.field) == (colour_bundle / "manifest.json", "format")
    assert (caught.found, caught.allowed) == ("comkd-bundle/2", "comkd-bundle/1")
    assert caught.remedy == "upgrade comkd, or run the bundle's own predict.py"


@pytest.mark.parametrize("files", [{}, [], {"classes.txt": {}}, {"classes.txt": {"bytes": 3}}])
def test_a_file_without_a_sha256_in_the_manifest_is_refused(colour_bundle: Path, files: Any) -> None:
    change_manifest(colour_bundle, files=files)
    caught = problem(colour_bundle)
    assert (caught.path, caught.field) == (colour_bundle / "manifest.json", "files")
    assert caught.problem == "has no sha256 of classes.txt"


@pytest.mark.parametrize("name", ["classes.txt", "classifier.onnx"])
@pytest.mark.parametrize("position", [0, -1, 5])
def test_one_flipped_bit_is_found_and_its_file_named(colour_bundle: Path, name: str, position: int) -> None:
    content = bytearray((colour_bundle / name).read_bytes())
    content[position] ^= 1
    (colour_bundle / name).write_bytes(content)
    caught = problem(colour_bundle)
    assert (caught.path, caught.remedy) == (colour_bundle / name, "export the bundle again")
    assert "sha256 differs" in caught.problem


@pytest.mark.parametrize("name", ["classes.txt", "classifier.onnx"])
def test_a_missing_file_is_named(colour_bundle: Path, name: str) -> None:
    (colour_bundle / name).unlink()
    caught = problem(colour_bundle)
    assert (caught.path, caught.problem) == (colour_bundle / name, "could not be read: No such file or directory")


@pytest.mark.parametrize("content", ["red\n\ngreen\nblue\n", "red\u2028\ngreen\nblue\n", "red\ngreen\n"])
def test_class_names_that_are_not_a_line_each_are_refused(colour_bundle: Path, content: str) -> None:
    """As a bundle of an older version may have them: every later name would be another class's."""
    sign(colour_bundle, "classes.txt", content.encode())
    change_manifest(colour_bundle, classes=3)
    caught = problem(colour_bundle)
    assert (caught.path, caught.remedy) == (colour_bundle / "classes.txt", "export the bundle again")
    assert caught.problem == f"has {len(content.splitlines())} lines, but manifest.json has 3 classes"


def test_class_names_that_are_not_utf8_are_refused(colour_bundle: Path) -> None:
    sign(colour_bundle, "classes.txt", b"caf\xe9\n")
    caught = problem(colour_bundle)
    assert caught.path == colour_bundle / "classes.txt"
    assert caught.problem.startswith("is not UTF-8")


def test_a_graph_that_onnxruntime_refuses_is_named(colour_bundle: Path) -> None:
    sign(colour_bundle, "classifier.onnx", b"no graph")
    caught = problem(colour_bundle)
    assert caught.path == colour_bundle / "classifier.onnx"
    assert caught.problem.startswith("onnxruntime could not load it: ")


def test_a_precision_without_one_of_its_graphs_is_refused(colour_bundle: Path) -> None:
    change_manifest(colour_bundle, precisions={"fp32": {"classifier": "classifier.onnx"}})
    caught = problem(colour_bundle)
    assert caught.path == colour_bundle / "manifest.json"
    assert (caught.field, caught.problem) == ("precisions.fp32.image_encoder", "missing")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ([8], "argument after \\*\\* must be a mapping"),
        ({"mean": None}, "mean"),
        ({"crop": 3}, "crop"),
        ({"size": "16"}, "size should be a number of pixels, not '16'"),
        ({"size": 0}, "size should be a number of pixels, not 0"),
        ({"mean": [0.5, 0.5]}, "mean should be three numbers"),
        ({"std": [0.5, 0.5, "x"]}, "std should be three numbers"),
        ({"interpolation": "lanczos"}, "interpolation should be bicubic or bilinear, not 'lanczos'"),
        ({"interpolation": ["bicubic"]}, "interpolation should be bicubic or bilinear"),
        ({"resize_mode": "wide"}, "resize_mode should be shortest or squash, not 'wide'"),
    ],
)
def test_preprocessing_that_is_not_valid_is_refused(colour_bundle: Path, fields: Any, message: str) -> None:
    valid = json.loads((colour_bundle / "manifest.json").read_text())["preprocessing"]
    change_manifest(colour_bundle, preprocessing={**valid, **fields} if isinstance(fields, dict) else fields)
    with pytest.raises(BundleProblem, match=message) as caught:
        Classifier(colour_bundle)
    assert (caught.value.path, caught.value.field) == (colour_bundle / "manifest.json", "preprocessing")


def test_preprocessing_without_a_field_is_refused(colour_bundle: Path) -> None:
    change_manifest(colour_bundle, preprocessing={"size": 8})
    with pytest.raises(BundleProblem, match="missing 2 required positional arguments: 'mean' and 'std'") as caught:
        Classifier(colour_bundle)
    assert caught.value.field == "preprocessing"
