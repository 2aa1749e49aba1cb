"""Classify images with an exported bundle. Needs numpy, Pillow and onnxruntime; no torch.

This file is copied into every bundle as predict.py, so it imports nothing of the package around it. The
package reads and prepares its own images through it too: what a model is trained on and what a device
sees come from the same lines.

    python predict.py IMAGE... [--top 5] [--json]

or, from Python, `Classifier(bundle_folder).predict("image.jpg")`.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

BUNDLE_FORMAT = "comkd-bundle/1"
RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
ORIENTATION = 0x0112  # the EXIF tag
# What turns a picture of each orientation upright. Pillow's exif_transpose would also write the EXIF data
# anew, which fails where any other tag of it is damaged.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BundleProblem(Exception):
    """A bundle that can't be used: a file is missing, changed or not what the manifest says."""


class UnreadableImage(Exception):
    """A file that can't be decoded as an image; the message names it."""


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes a model's input: resized, centre-cropped, scaled to 0..1 and normalised."""

    size: int
    """Side of the square input, in pixels."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"
    """`shortest` resizes the short side and crops the centre; `squash` resizes both sides."""


def open_image(path: str | os.PathLike[str]) -> Image.Image:
    """The picture a person sees in the file, as 8-bit RGB.

    EXIF rotation is applied, transparency is laid on white, 16-bit grey is scaled to 8 bits, and of an
    animation the first frame is taken. Raises UnreadableImage, naming the file and the reason.
    """
    try:
        with warnings.catch_warnings(), Image.open(path) as opened:
            warnings.simplefilter("ignore")  # what is shown is shown, whatever the file's metadata lacks
            opened.load()
            turn = UPRIGHT.get(opened.getexif().get(ORIENTATION, 1))
            return as_rgb(opened if turn is None else opened.transpose(turn))
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        # Pillow's decoders raise all of these for damaged files.
        reason = str(error) or type(error).__name__
        raise UnreadableImage(f"{path}: {reason}") from error


def as_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as 8-bit RGB; see `open_image`."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow would clip 16-bit greys at 255, turning most of such a picture white.
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        coloured = image.convert("RGBA")
        white = Image.new("RGBA", coloured.size, "white")
        return Image.alpha_composite(white, coloured).convert("RGB")
    return image.convert("RGB")


def resize_and_crop(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    """An RGB image as the model's square input, before normalisation.

    Sizes and offsets are rounded as torchvision's Resize and CenterCrop round them.
    """
    size, resampling = preprocessing.size, RESAMPLING[preprocessing.interpolation]
    if preprocessing.resize_mode == "squash":
        return image.resize((size, size), resampling)
    width, height = image.size
    if width <= height:
        width, height = size, int(size * height / width)
    else:
        width, height = int(size * width / height), size
    image = image.resize((width, height), resampling)
    left, top = round((width - size) / 2.0), round((height - size) / 2.0)
    return image.crop((left, top, left + size, top + size))


def normalise(image: Image.Image, preprocessing: Preprocessing) -> np.ndarray:
    """A square RGB image as float32 (3, size, size), scaled to 0..1, less the mean, over the deviation."""
    # Bytes are moved into place before they become four times as many, and changed where they are.
    pixels = np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1)).astype(np.float32)
    pixels /= np.float32(255)
    pixels -= np.asarray(preprocessing.mean, dtype=np.float32)[:, None, None]
    pixels /= np.asarray(preprocessing.std, dtype=np.float32)[:, None, None]
    return pixels


def prepare(image: Image.Image, preprocessing: Preprocessing) -> np.ndarray:
    """An RGB image of any size as the model's input: float32 (3, size, size)."""
    return normalise(resize_and_crop(image, preprocessing), preprocessing)


@dataclass(frozen=True)
class Prediction:
    """A class and the probability that the image shows it, among the bundle's classes."""

    class_name: str
    probability: float


class Classifier:
    """The student of a bundle, ready to name what images show.

    bundle: the folder that holds manifest.json. Every file that is used is checked against the
    manifest's sha256 first. threads: onnxruntime's threads within an operator; None takes every core.
    Raises BundleProblem, naming the file.
    """

    def __init__(self, bundle: str | os.PathLike[str], threads: int | None = None) -> None:
        import onnxruntime

        folder = Path(bundle)
        manifest = read_manifest(folder)
        self.preprocessing = read_preprocessing(folder, manifest)
        self.class_names = verified_bytes(folder, manifest, "classes.txt").decode("utf-8").splitlines()
        options = onnxruntime.SessionOptions()
        if threads is not None:
            options.intra_op_num_threads = threads
        graph = verified_bytes(folder, manifest, "classifier.onnx")
        try:
            self._session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises types of its own that share no other base
            raise BundleProblem(f"{folder / 'classifier.onnx'}: onnxruntime can't load it: {error}") from error

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Logits (batch, classes) of prepared images, float32 (batch, 3, size, size)."""
        (logits,) = self._session.run(["logits"], {"image": images})
        return np.asarray(logits)

    def predict(self, image: str | os.PathLike[str] | Image.Image, top: int = 5) -> list[Prediction]:
        """The `top` likeliest classes of an image, likeliest first. Raises UnreadableImage."""
        rgb = as_rgb(image) if isinstance(image, Image.Image) else open_image(image)
        (logits,) = self.logits(prepare(rgb, self.preprocessing)[None]).astype(np.float64)
        weights = np.exp(logits - logits.max())
        probabilities = weights / weights.sum()
        order = np.argsort(-probabilities, kind="stable")[:top]
        return [Prediction(self.class_names[i], float(probabilities[i])) for i in order]


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a bundle, checked for what a reader relies on. Raises BundleProblem."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BundleProblem(f"{folder} is not a bundle: it has no manifest.json") from error
    except (OSError, ValueError) as error:
        raise BundleProblem(f"{path}: can't be read: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != BUNDLE_FORMAT:
        raise BundleProblem(f"{path}: is not a manifest of format {BUNDLE_FORMAT}")
    if missing := {"preprocessing", "files"} - set(manifest):
        raise BundleProblem(f"{path}: lacks {', '.join(sorted(missing))}")
    return manifest


def read_preprocessing(folder: Path, manifest: dict[str, Any]) -> Preprocessing:
    """The pre-processing that a manifest asks for. Raises BundleProblem."""
    try:
        preprocessing = Preprocessing(**manifest["preprocessing"])
    except TypeError as error:
        raise BundleProblem(f"{folder / 'manifest.json'}: preprocessing: {error}") from error
    if preprocessing.interpolation not in RESAMPLING:
        raise BundleProblem(
            f"{folder / 'manifest.json'}: preprocessing: interpolation {preprocessing.interpolation} is not known"
        )
    return preprocessing


def verified_bytes(folder: Path, manifest: dict[str, Any], name: str) -> bytes:
    """The content of one file of a bundle, once its sha256 is that of the manifest."""
    path = folder / name
    try:
        sha256 = manifest["files"][name]["sha256"]
    except (KeyError, TypeError) as error:
        raise BundleProblem(f"{folder / 'manifest.json'}: does not list {name} with its sha256") from error
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BundleProblem(f"{path}: can't be read: {error.strerror or error}") from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise BundleProblem(f"{path}: is not the file that was exported (its sha256 differs); export again")
    return content


def predict_all(classifier: Classifier, images: Iterable[str], top: int) -> list[dict[str, Any]]:
    """One plain record per image: its classes and probabilities, or the reason that it can't be read."""
    records: list[dict[str, Any]] = []
    for image in images:
        try:
            predictions = classifier.predict(image, top)
        except UnreadableImage as error:
            records.append({"image": image, "error": str(error)})
            continue
        classes = [{"class": p.class_name, "probability": p.probability} for p in predictions]
        records.append({"image": image, "classes": classes})
    return records


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of predict.py; returns its exit status."""
    for stream in (sys.stdout, sys.stderr):  # a file's name need not be text that they can encode
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    parser = argparse.ArgumentParser(prog="predict.py", description="Name what images show.")
    parser.add_argument("images", nargs="+", metavar="IMAGE")
    parser.add_argument("--bundle", default=Path(__file__).parent, help="the bundle; this file's folder")
    parser.add_argument("--top", type=int, default=5, help="classes to print for an image")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args(arguments)
    if options.top < 1:
        parser.error("--top must be at least 1")
    try:
        records = predict_all(Classifier(options.bundle), options.images, options.top)
    except BundleProblem as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps({"predictions": records}, ensure_ascii=False, indent=2))
    for record in records:
        if "error" in record:
            print(f"error: {record['error']}", file=sys.stderr)
        elif not options.json:
            print(record["image"])
            for entry in record["classes"]:
                print(f"  {entry['probability']:7.2%}  {entry['class']}")
    return 1 if any("error" in record for record in records) else 0


if __name__ == "__main__":
    sys.exit(main())
