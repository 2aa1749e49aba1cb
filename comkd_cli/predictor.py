"""Classify images with an exported bundle. Needs numpy, Pillow and onnxruntime; no torch.

This file becomes the predict.py of every bundle, so it imports nothing of the package around it but the
tokenizer, which is written into predict.py with it. The package reads and prepares its own images through it
too: what a model is trained on and what a device sees come from the same lines.

    python predict.py IMAGE... [--top 5] [--precision int8] [--add-class "red fox"] [--json]

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
from typing import IO, Any

import numpy as np
from PIL import Image

from comkd_cli.clip_tokenizer import Tokenizer

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


def open_image(path: str | os.PathLike[str] | IO[bytes]) -> Image.Image:
    """The picture a person sees in the file, given by path or opened, as 8-bit RGB.

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


def start_session(graph: bytes, threads: int | None, optimization: str = "all") -> Any:
    """An onnxruntime session of a graph on the CPU.

    threads: within an operator; None takes every core. optimization: `all`, or `basic` for graphs that
    onnxruntime's own fusions do not bear.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors: its warnings are about the graph, which nobody here can change
    if threads is not None:
        options.intra_op_num_threads = threads
    if optimization == "basic":
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


class Classifier:
    """The student of a bundle, ready to name what images show.

    bundle: the folder that holds manifest.json. Every file that is used is checked against the
    manifest's sha256 first. precision: `fp32`, `fp16` or `int8`; None takes the first that the bundle has.
    threads: onnxruntime's threads within an operator; None takes every core. Raises BundleProblem, naming
    the file.
    """

    def __init__(
        self, bundle: str | os.PathLike[str], threads: int | None = None, precision: str | None = None
    ) -> None:
        self._folder = Path(bundle)
        self._manifest = read_manifest(self._folder)
        self._threads = threads
        self.preprocessing = read_preprocessing(self._folder, self._manifest)
        names = verified_bytes(self._folder, self._manifest, "classes.txt").decode("utf-8").splitlines()
        self.class_names: list[str] = names
        self._graphs = self._chosen_graphs(precision)
        self._scale = self._manifest.get("logit_scale")
        self._optimization = str(self._graphs.get("optimization", "all"))
        self._class_vectors: np.ndarray | None = None
        self._takes_vectors = self._manifest.get("memory") == "candidates"
        if self._takes_vectors:
            self._class_vectors = self._own_class_vectors()
        self._session = self._start(self._graphs["classifier"])

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Logits (batch, classes) of prepared images, float32 (batch, 3, size, size)."""
        inputs = {"image": images}
        if self._takes_vectors:
            inputs["class_vectors"] = self._class_vectors  # type: ignore[assignment]
        try:
            (answer,) = self._session.run(None, inputs)
        except Exception as error:  # onnxruntime's own, for inputs that are not the graph's
            raise BundleProblem(f"{self._folder}: the graph does not take what manifest.json says: {error}") from error
        if self._takes_vectors or self._class_vectors is None:
            return np.asarray(answer)
        # With classes that were added, the session gives features.
        return np.asarray(np.float32(self._scale) * answer @ self._class_vectors.T)

    def add_classes(self, names: Sequence[str]) -> None:
        """Let images be named by these classes too, which the student was not taught.

        Needs a bundle with its text encoder (`comkd export --text`). Raises BundleProblem.
        """
        manifest = self._folder / "manifest.json"
        text = self._manifest.get("text")
        if not text:
            raise BundleProblem(f"{manifest}: the bundle has no text encoder; export it with --text to add classes")
        names = [" ".join(name.split()) for name in ([names] if isinstance(names, str) else names)]
        for position, name in enumerate(names):
            if not name:
                raise BundleProblem("a class to add has no name")
            if name in [*self.class_names, *names[:position]]:
                raise BundleProblem(f"{name!r} is one of the classes already")
        try:
            merges = verified_bytes(self._folder, self._manifest, text["merges"]).decode("utf-8")
            tokenizer = Tokenizer(merges, int(text["context_length"]))
            tokens = tokenizer([text["prompt"].replace("{}", name) for name in (*self.class_names, *names)])
            graph = self._start(text["file"], "all")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BundleProblem(f"{manifest}: text: is damaged: {error!r}") from error
        if len(np.unique(tokens, axis=0)) < len(tokens):
            raise BundleProblem(
                f"{', '.join(names)}: the text encoder can't tell them apart, from one another or from the "
                f"classes that there are: it sees {tokens.shape[1]} tokens; shorten the names"
            )
        (vectors,) = graph.run(["text_features"], {"tokens": tokens[len(self.class_names) :]})
        if self._class_vectors is None:
            if not isinstance(self._scale, int | float):
                raise BundleProblem(f"{manifest}: logit_scale should be a number, not {self._scale!r}")
            self._class_vectors = self._own_class_vectors()
            self._session = self._start(self._graphs["image_encoder"])
        self._class_vectors = np.concatenate([self._class_vectors, vectors])
        self.class_names = [*self.class_names, *names]

    def predict(self, image: str | os.PathLike[str] | Image.Image, top: int = 5) -> list[Prediction]:
        """The `top` likeliest classes of an image, likeliest first. Raises UnreadableImage."""
        rgb = as_rgb(image) if isinstance(image, Image.Image) else open_image(image)
        (logits,) = self.logits(prepare(rgb, self.preprocessing)[None]).astype(np.float64)
        weights = np.exp(logits - logits.max())
        probabilities = weights / weights.sum()
        order = np.argsort(-probabilities, kind="stable")[:top]
        return [Prediction(self.class_names[i], float(probabilities[i])) for i in order]

    def _chosen_graphs(self, precision: str | None) -> dict[str, Any]:
        """The graphs of a precision, by what they are."""
        there = self._manifest["precisions"]
        chosen = precision or next(iter(there))
        if chosen not in there:
            raise BundleProblem(
                f"{self._folder / 'manifest.json'}: the bundle has no {chosen}; it has {', '.join(there)}"
            )
        graphs: dict[str, Any] = there[chosen]
        if absent := {"classifier", "image_encoder"} - {key for key, file in graphs.items() if isinstance(file, str)}:
            raise BundleProblem(f"{self._folder / 'manifest.json'}: {chosen} lacks {', '.join(sorted(absent))}")
        return graphs

    def _own_class_vectors(self) -> np.ndarray:
        content = verified_bytes(self._folder, self._manifest, "class_vectors.npy")
        return np.asarray(np.load(io.BytesIO(content), allow_pickle=False), dtype=np.float32)

    def _start(self, name: str, optimization: str | None = None) -> Any:
        graph = verified_bytes(self._folder, self._manifest, name)
        try:
            return start_session(graph, self._threads, optimization or self._optimization)
        except Exception as error:  # onnxruntime raises types of its own that share no other base
            raise BundleProblem(f"{self._folder / name}: onnxruntime can't load it: {error}") from error


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a bundle, checked for what a reader relies on. Raises BundleProblem."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BundleProblem(f"{folder} is not a bundle: it has no manifest.json") from error
    except (OSError, ValueError) as error:
        raise BundleProblem(f"{path}: can't be read: {error}") from error
    if isinstance(manifest, dict) and _is_newer(manifest.get("format")):
        raise BundleProblem(
            f"{path}: has the format {manifest['format']} of a newer comkd; this one reads {BUNDLE_FORMAT}: upgrade "
            "comkd, or run the bundle's own predict.py"
        )
    if not isinstance(manifest, dict) or manifest.get("format") != BUNDLE_FORMAT:
        raise BundleProblem(f"{path}: is not a manifest of format {BUNDLE_FORMAT}")
    if missing := {"preprocessing", "files", "precisions"} - set(manifest):
        raise BundleProblem(f"{path}: lacks {', '.join(sorted(missing))}")
    precisions = manifest["precisions"]
    if not isinstance(precisions, dict) or not precisions or not all(isinstance(p, dict) for p in precisions.values()):
        raise BundleProblem(f"{path}: precisions: should name the graphs of at least one precision")
    return manifest


def _is_newer(found: object) -> bool:
    """Whether a manifest's format is a later version of BUNDLE_FORMAT."""
    kind, _, version = str(found).rpartition("/")
    known_kind, _, known = BUNDLE_FORMAT.rpartition("/")
    is_number = version.isascii() and version.isdigit() and len(version) < 10
    return kind == known_kind and is_number and int(version) > int(known)


def read_preprocessing(folder: Path, manifest: dict[str, Any]) -> Preprocessing:
    """The pre-processing that a manifest asks for. Raises BundleProblem."""
    path = folder / "manifest.json"
    try:
        preprocessing = Preprocessing(**manifest["preprocessing"])
    except TypeError as error:
        raise BundleProblem(f"{path}: preprocessing: {error}") from error
    size, known = preprocessing.size, ("shortest", "squash")
    if not isinstance(size, int) or size < 1:
        raise BundleProblem(f"{path}: preprocessing: size should be a number of pixels, not {size!r}")
    for field in ("mean", "std"):
        values = getattr(preprocessing, field)
        if not isinstance(values, list | tuple) or len(values) != 3 or not all(map(_is_number, values)):
            raise BundleProblem(f"{path}: preprocessing: {field} should be three numbers, not {values!r}")
    if preprocessing.interpolation not in list(RESAMPLING):
        raise BundleProblem(f"{path}: preprocessing: interpolation {preprocessing.interpolation} is not known")
    if preprocessing.resize_mode not in known:
        raise BundleProblem(f"{path}: preprocessing: resize_mode {preprocessing.resize_mode} is not known")
    return preprocessing


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


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
    parser.add_argument("--precision", help="fp32, fp16 or int8; the first that the bundle has")
    parser.add_argument("--add-class", action="append", default=[], metavar="NAME", help="another class to look for")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args(arguments)
    if options.top < 1:
        parser.error("--top must be at least 1")
    try:
        classifier = Classifier(options.bundle, precision=options.precision)
        if options.add_class:
            classifier.add_classes(options.add_class)
        records = predict_all(classifier, options.images, options.top)
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
