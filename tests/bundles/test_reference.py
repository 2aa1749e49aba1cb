"""What is written into reference/, against the arrays and formulas that it should hold."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from comkd_cli.bundles import reference
from comkd_cli.bundles.gates import GATES
from comkd_cli.bundles.reference import ReferenceWriter, logit_limit
from comkd_cli.bundles.reference_images import reference_images
from comkd_cli.edge.images import open_image
from comkd_cli.errors import ExportError
from tests.conftest import COLOUR_BIAS, COLOUR_WEIGHTS, PIXELS
from tests.referenced import LOGIT_SCALE, preprocessing_of


@pytest.fixture
def document(referenced_once: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((referenced_once / "reference/reference.json").read_text())
    return found


def test_it_holds_the_images_and_nothing_that_it_does_not_name(referenced_once: Path, document: dict[str, Any]) -> None:
    folder = referenced_once / "reference"
    named = [name for image in document["images"] for name in (image["file"], image["tensor"])]
    named += [entry["file"] for entry in document["logits"].values()]
    assert {path.name for path in folder.iterdir()} == {*named, "reference.json"}
    for image in reference_images():
        assert (folder / image.file).read_bytes() == image.content
    assert (document["format"], document["license"]) == ("comkd-reference/1", "CC0-1.0")
    assert set(document["made_with"]) == {"python", "onnxruntime", "pillow", "numpy", "machine"}


def test_the_tensors_are_the_normalised_images_and_json_describes_them(
    referenced_once: Path, document: dict[str, Any]
) -> None:
    mean, std, size = np.array(PIXELS["mean"]), np.array(PIXELS["std"]), PIXELS["size"]
    for image in document["images"]:
        tensor = np.load(referenced_once / "reference" / image["tensor"])
        assert (tensor.dtype, list(tensor.shape)) == (np.float32, image["shape"])
        assert image["shape"] == [1, 3, size, size]
        assert hashlib.sha256(tensor.tobytes()).hexdigest() == image["sha256"]
        assert image["channel_means"] == pytest.approx(tensor[0].mean(axis=(1, 2)), abs=1e-6)
        for channel, row, column, value in image["samples"]:
            assert np.float32(value) == tensor[0, channel, row, column]
        assert len(image["samples"]) == 75
        # The mean of a scaled-down crop is about that of the same crop of the image.
        pixels = np.asarray(open_image((referenced_once / "reference" / image["file"]).read_bytes())) / 255
        side = min(pixels.shape[:2])
        top, left = ((length - side) // 2 for length in pixels.shape[:2])
        expected = (pixels[top : top + side, left : left + side].mean(axis=(0, 1)) - mean) / std
        assert tensor[0].mean(axis=(1, 2)) == pytest.approx(expected, abs=0.1)


def test_the_logits_are_those_of_the_graph(referenced_once: Path, document: dict[str, Any]) -> None:
    for precision in ("fp32", "int8"):
        entry = document["logits"][precision]
        logits = np.load(referenced_once / "reference" / entry["file"])
        assert np.array_equal(np.float32(entry["values"]), logits)
        for image, row in zip(document["images"], logits, strict=True):
            means = np.load(referenced_once / "reference" / image["tensor"])[0].mean(axis=(1, 2))
            assert row == pytest.approx(COLOUR_WEIGHTS @ means + COLOUR_BIAS, abs=1e-4)
        assert entry["limit"] == logit_limit(precision, LOGIT_SCALE)


@pytest.mark.parametrize("precision", GATES)
def test_the_limit_of_logits_is_a_quarter_of_what_the_gate_bounds(precision: str) -> None:
    """Two features as far apart as the gate allows, and the class vector to which that matters most."""
    cosine = GATES[precision].cosine_min
    one, other = np.array([1.0, 0.0]), np.array([cosine, np.sqrt(1 - cosine**2)])
    worst = (one - other) / np.linalg.norm(one - other)
    assert logit_limit(precision, 30.0) == pytest.approx(30 * abs(worst @ (one - other)) / 4)


def test_logits_that_are_not_finite_are_refused(colour_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [image.name for image in reference_images()]
    answers = {name: np.full((1, 3), np.nan if name == "photo" else 1, np.float32) for name in names}
    monkeypatch.setattr(reference, "run_graph", lambda *_: answers)
    with pytest.raises(ExportError) as caught:
        ReferenceWriter(preprocessing_of(colour_bundle), 8.0, {}).add_precision(
            "fp16", colour_bundle / "classifier.onnx", "basic"
        )
    assert (caught.value.path, caught.value.problem) == (
        "classifier.onnx",
        "its logits for a reference image are not finite",
    )
