"""Probabilities at a temperature, and answers below a threshold."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy import special

from comkd_cli.edge import classifier
from comkd_cli.edge.classifier import Classifier, predict_all
from comkd_cli.edge.manifest import BundleProblem
from comkd_cli.edge.threshold import Confidence, read_confidence, softmax

LOGITS = np.random.default_rng(0).normal(0, 200, (5, 7)).astype(np.float32)


def test_probabilities_are_the_softmax_of_scipy() -> None:
    np.testing.assert_allclose(softmax(LOGITS), special.softmax(LOGITS.astype(np.float64), axis=1), atol=1e-15)


@pytest.mark.parametrize("temperature", [0.1, 1.0, 30.0])
def test_a_temperature_divides_the_logits_and_changes_no_answer(temperature: float) -> None:
    found = Confidence(temperature).probabilities(LOGITS)
    np.testing.assert_allclose(found, special.softmax(LOGITS.astype(np.float64) / temperature, axis=1), atol=1e-14)
    assert found.argmax(axis=1).tolist() == LOGITS.argmax(axis=1).tolist()


def test_an_answer_is_accepted_at_its_threshold_and_not_below() -> None:
    confidence = Confidence(threshold=0.5, by_class={"b": 0.75})
    assert [confidence.is_none("a", p) for p in (0.49, 0.5)] == [True, False]
    assert [confidence.is_none("b", p) for p in (0.74, 0.75)] == [True, False]
    probabilities = np.array([[0.5, 0.5], [0.4, 0.6], [0.2, 0.8]])
    assert confidence.accepted(probabilities, ["a", "b"]).tolist() == [True, False, True]


def test_without_a_threshold_nothing_is_decided() -> None:
    assert Confidence().is_none("a", 0.0) is None
    assert Confidence(threshold=0.5, applied=False).is_none("a", 0.0) is None
    assert Confidence().accepted(np.array([[0.5, 0.5]]), ["a", "b"]).tolist() == [True]


def manifest(temperature: object = 2.0, **threshold: object) -> dict[str, Any]:
    return {
        "calibration": {"temperature": temperature},
        "threshold": {"score": "max_probability", "value": 0.9, "classes": {"red": 0.95}, **threshold},
    }


def test_a_manifest_is_read_and_that_of_an_older_bundle_changes_nothing() -> None:
    assert read_confidence(Path("b"), manifest()) == Confidence(2.0, 0.9, {"red": 0.95})
    assert read_confidence(Path("b"), manifest(value=None)) == Confidence(2.0)
    assert read_confidence(Path("b"), {}) == Confidence()


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        (manifest(temperature=0), "calibration.temperature"),
        (manifest(temperature=float("nan")), "calibration.temperature"),
        (manifest(temperature="1"), "calibration.temperature"),
        (manifest(temperature=10**400), "calibration.temperature"),
        (manifest(value=10**400), "threshold.value"),
        ({"calibration": []}, "calibration"),
        (manifest(score="energy"), "threshold.score"),
        (manifest(value=1.5), "threshold.value"),
        (manifest(value=True), "threshold.value"),
        (manifest(classes={"red": None}), "threshold.classes.red"),
        (manifest(classes=[0.5]), "threshold.classes"),
    ],
)
def test_a_manifest_that_cannot_be_used_is_named(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(BundleProblem) as caught:
        read_confidence(Path("b"), fields)
    assert (caught.value.path, caught.value.field) == (Path("b/manifest.json"), field)


# --- the classifier ------------------------------------------------------------------------------------


@pytest.fixture
def limited(colour_bundle: Path, tmp_path: Path) -> Path:
    """The bundle of three colours with a temperature and a threshold, beside a red and a grey picture."""
    path = colour_bundle / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **manifest()}))
    Image.new("RGB", (8, 8), (250, 10, 20)).save(tmp_path / "red.png")
    Image.new("RGB", (8, 8), (128, 105, 78)).save(tmp_path / "grey.png")
    return colour_bundle


def test_records_say_whether_an_image_is_none_of_the_classes(limited: Path, tmp_path: Path) -> None:
    images = [str(tmp_path / "red.png"), str(tmp_path / "grey.png")]
    red, grey = predict_all(Classifier(limited), images, top=1)
    assert red["none_of_these"] is False
    assert red["classes"][0]["probability"] >= 0.95
    assert grey["none_of_these"] is True
    assert grey["classes"][0]["probability"] < 0.9  # of its likeliest class, which is still given
    off = predict_all(Classifier(limited, threshold=False), images, top=1)
    assert [record["none_of_these"] for record in off] == [None, None]
    assert [record["classes"] for record in off] == [red["classes"], grey["classes"]]


def test_the_graphs_logits_have_no_temperature(limited: Path) -> None:
    images = np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype(np.float32)
    with_temperature = Classifier(limited).logits(images)
    path = limited / "manifest.json"
    fields = json.loads(path.read_text())
    del fields["calibration"]
    path.write_text(json.dumps(fields))
    assert np.array_equal(Classifier(limited).logits(images), with_temperature)


def test_the_command_prints_none_of_these_unless_it_is_turned_off(
    limited: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(tmp_path / "grey.png"), "--bundle", str(limited), "--top", "1"]
    assert classifier.main(arguments) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 3
    assert printed[1].startswith("  none of these: ")
    assert printed[2].split()[0] in printed[1]  # the probability
    assert classifier.main([*arguments, "--no-threshold"]) == 0
    assert capsys.readouterr().out.splitlines() == [printed[0], printed[2]]
