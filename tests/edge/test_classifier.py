import json
import os
import shutil
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from comkd_cli.bundles.standalone import standalone_predictor
from comkd_cli.edge import classifier
from comkd_cli.edge.classifier import Classifier, predict_all
from comkd_cli.edge.images import UnreadableImage, prepare
from comkd_cli.edge.manifest import BundleProblem

# --- classifying ---------------------------------------------------------------------------------------

COLOURS = {"red": (250, 10, 20), "green": (15, 240, 5), "blue": (0, 30, 255)}


def expected_logits(colour: tuple[int, int, int]) -> np.ndarray:
    """By hand what the bundle of tests/conftest.py answers to a picture of one colour."""
    weights = np.array([[5.0, -1.0, 0.5], [-1.0, 5.0, 0.25], [0.0, -2.0, 5.0]])
    channels = (np.array(colour) / 255 - [0.5, 0.4, 0.3]) / [0.2, 0.3, 0.4]
    return weights @ channels + [0.125, -0.25, 0.5]


@pytest.mark.parametrize("name", COLOURS)
def test_the_likeliest_classes_come_first_with_their_softmax(colour_bundle: Path, tmp_path: Path, name: str) -> None:
    Image.new("RGB", (20, 12), COLOURS[name]).save(tmp_path / "one.png")
    predictions = Classifier(colour_bundle).predict(tmp_path / "one.png")
    exponentials = np.exp(expected_logits(COLOURS[name]))
    expected = dict(zip(("red", "green", "blue"), exponentials / exponentials.sum(), strict=True))
    assert predictions[0].class_name == name
    assert [p.class_name for p in predictions] == sorted(expected, key=lambda key: -expected[key])
    assert {p.class_name: p.probability for p in predictions} == pytest.approx(expected, abs=1e-5)


def test_a_picture_in_memory_is_classified_as_its_file_is(colour_bundle: Path, tmp_path: Path) -> None:
    classifier = Classifier(colour_bundle, threads=1)
    half_clear = Image.new("RGBA", (9, 30), (200, 10, 10, 128))
    half_clear.save(tmp_path / "one.png")
    assert classifier.predict(half_clear) == classifier.predict(str(tmp_path / "one.png"))


def turned(folder: Path, suffix: str) -> Path:
    """A picture, red above blue, that its EXIF data turn by a quarter; upright it is not what the file holds."""
    picture = Image.new("RGB", (40, 20), "red")
    picture.paste("blue", (0, 10, 40, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(folder / f"turned.{suffix}", exif=exif)
    return folder / f"turned.{suffix}"


class Sides(Classifier):
    """Answers by the left half of what it is shown."""

    def logits(self, images: np.ndarray) -> np.ndarray:
        return images[:, :, :, :4].mean(axis=(2, 3))


def test_a_graph_with_more_classes_than_the_bundle_names_is_refused(colour_bundle: Path) -> None:
    classifier = Classifier(colour_bundle)
    classifier.class_names = classifier.class_names[:-1]
    with pytest.raises(BundleProblem) as caught:
        classifier.predict(Image.new("RGB", (8, 8)))
    assert caught.value.path == colour_bundle / "classifier.onnx"


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_a_picture_is_turned_alike_from_path_file_bytes_and_memory(
    colour_bundle: Path, tmp_path: Path, suffix: str
) -> None:
    path = turned(tmp_path, suffix)
    classifier = Sides(colour_bundle)
    expected = classifier.predict(path)
    assert expected[0].class_name == "blue"  # of the stored picture it would be red as much as blue
    content = path.read_bytes()
    with path.open("rb") as file, Image.open(path) as lazy, Image.open(path) as loaded:
        loaded.load()
        for given in (str(path), file, content, BytesIO(content), lazy, loaded, lazy, ImageOps.exif_transpose(loaded)):
            assert classifier.predict(given) == expected


def test_a_damaged_picture_in_memory_is_unreadable_by_its_name(colour_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.png"
    noise_of = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise_of).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    classifier = Classifier(colour_bundle)
    with Image.open(path) as lazy, pytest.raises(UnreadableImage, match=r"cut\.png: image file is truncated"):
        classifier.predict(lazy)
    with pytest.raises(UnreadableImage, match=r"^the image: image file is truncated"):
        classifier.predict(path.read_bytes())
    with path.open("rb") as file, pytest.raises(UnreadableImage, match=r"cut\.png: image file is truncated"):
        classifier.predict(file)


def test_top_limits_the_classes_of_an_answer(colour_bundle: Path) -> None:
    classifier = Classifier(colour_bundle)
    picture = Image.new("RGB", (8, 8), "red")
    assert [len(classifier.predict(picture, top)) for top in (1, 2, 5)] == [1, 2, 3]
    assert len(classifier.predict(picture)) == 3


def test_logits_of_a_batch_are_those_of_each_image(colour_bundle: Path) -> None:
    classifier = Classifier(colour_bundle)
    batch = np.stack(
        [prepare(Image.new("RGB", (8, 8), colour), classifier.preprocessing) for colour in COLOURS.values()]
    )
    logits = classifier.logits(batch)
    assert logits.shape == (3, 3)
    assert np.allclose(logits, [expected_logits(colour) for colour in COLOURS.values()], atol=1e-4)


def test_an_unreadable_image_does_not_keep_the_others_from_their_answer(colour_bundle: Path, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), COLOURS["blue"]).save(tmp_path / "blue.png")
    (tmp_path / "odd.png").write_text("no picture")
    images = [str(tmp_path / name) for name in ("odd.png", "blue.png")]
    odd, blue = predict_all(Classifier(colour_bundle), images, top=1)
    assert odd["image"] == images[0]
    assert odd["error"].startswith(f"{images[0]}: ")
    assert (blue["image"], [entry["class"] for entry in blue["classes"]]) == (images[1], ["blue"])


def test_images_that_do_not_fit_the_graph_are_a_problem_of_the_bundle(colour_bundle: Path, tmp_path: Path) -> None:
    path = colour_bundle / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["preprocessing"]["size"] = 12
    path.write_text(json.dumps(manifest))
    with pytest.raises(BundleProblem) as caught:
        Classifier(colour_bundle).predict(Image.new("RGB", (20, 20)))
    assert caught.value.path == colour_bundle / "classifier.onnx"


# --- the file on its own -------------------------------------------------------------------------------

ALONE = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("predict", sys.argv[1])
module = importlib.util.module_from_spec(spec)
sys.modules["predict"] = module
spec.loader.exec_module(module)
(answer,) = module.Classifier(sys.argv[2]).predict(sys.argv[3], top=1)
loaded = {name.partition(".")[0] for name in sys.modules}
print(json.dumps([answer.class_name, sorted(loaded & {"torch", "torchvision", "comkd_cli", "open_clip", "onnx"})]))
"""


@pytest.fixture
def delivered(colour_bundle: Path, tmp_path: Path) -> Path:
    """The bundle as export leaves it, with predict.py in it, and beside it a red picture and no picture."""
    (colour_bundle / "predict.py").write_text(standalone_predictor(), encoding="utf-8")
    Image.new("RGB", (8, 8), COLOURS["red"]).save(tmp_path / "red.png")
    (tmp_path / "odd.png").write_text("no picture")
    return colour_bundle


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-I", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=60)


def test_the_file_works_in_a_fresh_interpreter_and_loads_neither_torch_nor_the_package(
    delivered: Path, tmp_path: Path
) -> None:
    done = python(tmp_path, "-c", ALONE, str(delivered / "predict.py"), str(delivered), "red.png")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == ["red", []]


def test_the_file_is_a_command_that_finds_its_bundle_around_it(delivered: Path, tmp_path: Path) -> None:
    done = python(tmp_path, str(delivered / "predict.py"), "odd.png", "red.png", "--top", "1", "--json")
    assert done.returncode == 1
    assert done.stderr.startswith("error: odd.png: ")
    odd, red = json.loads(done.stdout)["predictions"]
    assert "classes" not in odd
    assert [entry["class"] for entry in red["classes"]] == ["red"]


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "cp1252", "latin-1", "utf-16"])
def test_json_is_utf8_or_ascii_whatever_the_terminal_speaks(delivered: Path, tmp_path: Path, encoding: str) -> None:
    names = ["red.png", "caf\u00e9.png", "\U0001f98a \u20ac.png", os.fsdecode(b"caf\xe9.png")]
    for name in names[1:]:
        shutil.copy(tmp_path / "red.png", tmp_path / name)
    done = subprocess.run(
        [sys.executable, str(delivered / "predict.py"), "--json", "--top", "1", *names],
        cwd=tmp_path,
        capture_output=True,
        check=False,
        timeout=60,
        env={**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": ""},
    )
    assert (done.returncode, done.stderr) == (0, b"")
    text = done.stdout.decode("utf-16" if encoding == "utf-16" else "utf-8")
    records = json.loads(text)["predictions"]
    assert [(record["image"], record["classes"][0]["class"]) for record in records] == [(name, "red") for name in names]


def test_the_command_prints_lines_and_says_what_is_wrong_by_its_status(
    delivered: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    red, bundle = str(tmp_path / "red.png"), str(delivered)
    assert classifier.main([red, "--bundle", bundle, "--top", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == red
    assert [line.split()[1] for line in lines[1:]] == ["red", "blue"]
    assert lines[1].split()[0].endswith("%")
    assert classifier.main([red, "--bundle", str(tmp_path)]) == 1
    assert "is not a bundle" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        classifier.main([red, "--bundle", bundle, "--top", "0"])
