"""Classify images with an exported bundle. Needs numpy, Pillow and onnxruntime; no torch.

This file becomes the predict.py of every bundle, so it imports nothing of the package around it but the
tokenizer, which is written into predict.py with it. The package reads and prepares its own images through it
too: what a model is trained on and what a device sees come from the same lines.

    python predict.py IMAGE... [--top 5] [--precision int8] [--add-class "red fox"] [--json]

or, from Python, `Classifier(bundle_folder).predict("image.jpg")`.
"""

from __future__ import annotations

import argparse
import codecs
import hashlib
import io
import json
import logging
import os
import sys
import unicodedata
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from comkd_cli.edge.clip_tokenizer import Tokenizer

BUNDLE_FORMAT = "comkd-bundle/1"
MOST_PIXELS = 178_956_970  # of an image that is decoded: where Pillow too sees a decompression bomb
# What a resized picture may take before its crop is resized alone. A line of 65,000 x 1 pixels, resized to 224 pixels
# on its short side, would take 13 GB of which the crop shows 0.0015 %.
MOST_RESIZED_PIXELS = 2**26
RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
ORIENTATION = 0x0112  # the EXIF tag
# What turns a picture of each orientation upright. Pillow's exif_transpose would also rewrite the EXIF data,
# which fails where any other tag of it is damaged.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
JOINERS = "\u200c\u200d"  # invisible, and part of the spelling of Persian, Hindi and of emoji
PILLOW = r"PIL(\.|$)"  # its modules, as a warnings filter matches them
NOWHERE = logging.NullHandler()

ImageSource = str | os.PathLike[str] | IO[bytes] | bytes
"""An image file: its path, an open binary file, or its content."""


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


def open_image(file: ImageSource) -> Image.Image:
    """The picture a person sees in an image file, as 8-bit RGB.

    file: a path, an open binary file, or the content as bytes. EXIF rotation is applied, transparency is laid on
    white, 16-bit grey is scaled to 8 bits, and of an animation the first frame is taken. Pillow's warnings are ignored
    from the first call on. Raises UnreadableImage, naming the file and the reason, whatever the decoder raises.
    """
    with _decoding(_name(file)), Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as opened:
        return as_rgb(opened)


def as_rgb(image: Image.Image) -> Image.Image:
    """The picture a person sees in a Pillow image of any mode, as 8-bit RGB; see `open_image`.

    Raises what Pillow raises, or ValueError for an image without pixels, with too many, or without its palette.
    """
    width, height = image.size
    if width < 1 or height < 1:
        raise ValueError(f"{width} x {height} pixels show no picture")
    if width * height > MOST_PIXELS:
        raise ValueError(
            f"{width} x {height} pixels: the image size exceeds the limit of {MOST_PIXELS:,} pixels; make it smaller"
        )
    if image.format == "TIFF" and image.mode in ("I", "F"):
        # Levels of 0 to 1, or 0 to 255, in 32 bits would all become black.
        raise ValueError("32-bit TIFF, which does not say what its brightest level is; save it with 8 or 16 bits")
    low_bytes = _prepare_transparency(image)
    image.load()
    rgb = _on_white(image, low_bytes)
    turn = _turn(image)
    return rgb if turn is None else rgb.transpose(turn)


def _on_white(image: Image.Image, low_bytes: np.ndarray | None) -> Image.Image:
    """A loaded image as RGB, its transparency laid on white. low_bytes: see `_prepare_transparency`."""
    key = image.info.get("transparency")
    if image.mode == "I" or image.mode.startswith("I;16"):
        levels = np.asarray(image)
        # Pillow would clip 16-bit greys at 255, turning most of such a picture white.
        rgb = Image.fromarray((np.clip(levels, 0, 65535).astype(np.uint32) >> 8).astype(np.uint8)).convert("RGB")
        return _erased(rgb, levels == key) if isinstance(key, int) else rgb
    if low_bytes is not None:
        high_bytes, colour = np.asarray(image), np.asarray(key)
        transparent = (high_bytes == colour >> 8) & (low_bytes == colour & 0xFF)
        return _erased(Image.fromarray(high_bytes), transparent.all(axis=2))
    if image.mode == "P" and image.palette is None:
        raise ValueError("a palette image without its palette")
    if image.mode == "La":  # which Pillow converts to nothing else
        image = image.convert("LA")
    if not image.has_transparency_data:
        return image.convert("RGB")
    coloured = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", coloured.size, "white"), coloured).convert("RGB")


def _erased(rgb: Image.Image, transparent: np.ndarray) -> Image.Image:
    """An RGB image with white where it is transparent, bool (height, width)."""
    rgb.paste((255, 255, 255), mask=Image.fromarray(transparent.astype(np.uint8) * 255))
    return rgb


def _prepare_transparency(image: Image.Image) -> np.ndarray | None:
    """Make a PNG's transparent colour fit the pixels that Pillow decodes; call it before the image is loaded.

    The file gives the colour in its own bit depth, Pillow decodes greys of 2 and 4 bits to 8. Of 16-bit RGB it decodes
    the high bytes alone; the low ones, which the colour is compared with too, are returned, uint8 (height, width, 3).
    """
    key, tiles = image.info.get("transparency"), getattr(image, "tile", None)
    if image.format != "PNG" or not tiles or key is None:
        return None
    layout = tiles[0][3]  # how the file stores a pixel, in Pillow's words
    if layout == "RGB;16B":
        return _low_bytes(image)
    if layout == "RGB":
        image.info["transparency"] = tuple(level % 256 for level in key)
    elif layout in ("L", "L;2", "L;4"):
        levels = 2 ** int(layout[2:] or 8)
        image.info["transparency"] = key % levels * (255 // (levels - 1))
    return None


def _low_bytes(image: Image.Image) -> np.ndarray:
    """The low bytes of a 16-bit RGB PNG that was opened and not loaded yet, uint8 (height, width, 3)."""
    file: IO[bytes] = image.fp  # type: ignore[attr-defined]
    position = file.tell()
    file.seek(0)
    content = file.read()
    file.seek(position)
    with Image.open(io.BytesIO(content)) as again:
        # Read as little-endian, so that what Pillow takes for the high byte is the low one.
        again.tile = [(*tile[:3], "RGB;16L") for tile in again.tile]  # type: ignore[misc]
        return np.array(again)


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What turns an image upright by its EXIF orientation; None where it has none or its EXIF data are damaged."""
    try:
        return UPRIGHT.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # of many kinds; the picture itself can be shown
        return None


@contextmanager
def _decoding(name: str) -> Iterator[None]:
    """Within the block Pillow does not warn, and whatever it raises becomes UnreadableImage with that name."""
    _silence_pillow()
    try:
        yield
    except UnreadableImage:
        raise
    except Exception as error:  # decoders by many authors, each with errors of its own
        raise UnreadableImage(f"{name}: {_reason(error)}") from error


def _silence_pillow() -> None:
    """Ignore Pillow's warnings from now on: they concern metadata and sizes, which do not change what is shown.

    A filter for Pillow's modules alone. `warnings.catch_warnings` would be no choice: it changes the filters of all
    threads, and makes warnings of other libraries appear again. The filter is looked for at each call because whoever
    restores older filters removes it.
    """
    first = warnings.filters[0] if warnings.filters else ("",) * 5
    if first[0] != "ignore" or getattr(first[3], "pattern", None) != PILLOW:
        warnings.filterwarnings("ignore", module=PILLOW)
        logging.getLogger("PIL").addHandler(NOWHERE)  # else logging prints its errors


def _name(image: ImageSource | Image.Image) -> str:
    """What messages call an image: its path where it has one."""
    if isinstance(image, str | os.PathLike):
        return str(image)
    named = getattr(image, "filename", "") or getattr(image, "name", "")
    if named:
        return str(named)
    return "the image" if isinstance(image, bytes | Image.Image) or type(image) is io.BytesIO else str(image)


def _reason(error: Exception) -> str:
    """Why an image can't be decoded, in one line."""
    if isinstance(error, UnidentifiedImageError):
        return "is not an image of a format that Pillow can read"
    if isinstance(error, MemoryError):
        return "there is not enough memory to decode it"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    said = " ".join(str(error).split())
    if said and isinstance(error, OSError | ValueError | SyntaxError | EOFError | Image.DecompressionBombError):
        return said  # what Pillow's own decoders raise of damaged files
    return f"its decoder failed: {type(error).__name__}" + (f": {said}" if said else "")


def resize_and_crop(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    """An RGB image as the model's square input, before normalisation.

    Sizes and offsets are rounded as torchvision's Resize and CenterCrop round them. Of a shape so long that the whole
    would exceed MOST_RESIZED_PIXELS, only the crop is resized. Pillow may then resize rows before columns, and levels
    differ a little.
    """
    size, resampling = preprocessing.size, RESAMPLING[preprocessing.interpolation]
    if preprocessing.resize_mode == "squash":
        return image.resize((size, size), resampling)
    width, height = image.size
    if width <= height:
        width, height = size, int(size * height / width)
    else:
        width, height = int(size * width / height), size
    left, top = round((width - size) / 2.0), round((height - size) / 2.0)
    if width * height > MOST_RESIZED_PIXELS:
        x, y = image.width / width, image.height / height
        box = (left * x, top * y, (left + size) * x, (top + size) * y)
        return image.resize((size, size), resampling, box=box)
    image = image.resize((width, height), resampling)
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


def clean_class_name(name: str) -> str:
    """A class name as prompts and classes.txt have it: underscores as spaces, white space collapsed, in NFC.

    The result is one line of visible characters. Raises ValueError, whose text completes "class 2 ...", where the name
    is empty, is not UTF-8, or has a line break or another invisible character within it.
    """
    text = unicodedata.normalize("NFC", name.replace("_", " ")).strip()
    if not text.strip(JOINERS):
        raise ValueError("is empty")
    if len(text.splitlines()) > 1:
        raise ValueError("has a line break within it")
    text = " ".join(text.split())
    for character in text:
        category = unicodedata.category(character)
        if category == "Cs":
            raise ValueError("is not UTF-8")
        if category in ("Cc", "Cf") and character not in JOINERS:
            raise ValueError(f"holds the invisible character U+{ord(character):04X}")
    return text


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
        self.class_names = self._own_class_names()
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
        names = [_name_to_add(name) for name in ([names] if isinstance(names, str) else names)]
        known = [name.replace("_", " ") for name in self.class_names]
        for position, name in enumerate(names):
            if name in [*known, *names[:position]]:
                raise BundleProblem(f"{name!r} is one of the classes already")
        try:
            merges = verified_bytes(self._folder, self._manifest, text["merges"]).decode("utf-8")
            tokenizer = Tokenizer(merges, int(text["context_length"]))
            tokens = tokenizer([text["prompt"].replace("{}", name) for name in (*self.class_names, *names)])
            cut = [name for name in names if tokenizer.cut(text["prompt"].replace("{}", name))]
            graph = self._start(text["file"], "all")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BundleProblem(f"{manifest}: text: is damaged: {error!r}") from error
        if len(np.unique(tokens, axis=0)) < len(tokens):
            raise BundleProblem(
                f"{', '.join(names)}: the text encoder can't tell them apart, from one another or from the "
                f"classes that there are: it sees {tokens.shape[1]} tokens; shorten the names"
            )
        if cut:
            raise BundleProblem(
                f"{', '.join(map(repr, cut))}: too long for the text encoder, which reads {tokens.shape[1]} tokens of "
                "a prompt; shorten the names"
            )
        (vectors,) = graph.run(["text_features"], {"tokens": tokens[len(self.class_names) :]})
        if self._class_vectors is None:
            if not isinstance(self._scale, int | float):
                raise BundleProblem(f"{manifest}: logit_scale should be a number, not {self._scale!r}")
            self._class_vectors = self._own_class_vectors()
            self._session = self._start(self._graphs["image_encoder"])
        self._class_vectors = np.concatenate([self._class_vectors, vectors])
        self.class_names = [*self.class_names, *names]

    def predict(self, image: ImageSource | Image.Image, top: int = 5) -> list[Prediction]:
        """The `top` likeliest classes of an image, likeliest first. Raises UnreadableImage.

        image: a path, an open binary file, its content as bytes, or a Pillow image. The last is turned as its EXIF data
        say, like a file, unless `PIL.ImageOps.exif_transpose` did so before and removed the orientation.
        """
        with _decoding(_name(image)):
            rgb = as_rgb(image) if isinstance(image, Image.Image) else open_image(image)
            prepared = prepare(rgb, self.preprocessing)
        (logits,) = self.logits(prepared[None]).astype(np.float64)
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

    def _own_class_names(self) -> list[str]:
        content = verified_bytes(self._folder, self._manifest, "classes.txt")
        try:
            names = content.decode("utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise BundleProblem(f"{self._folder / 'classes.txt'}: is not UTF-8: {error}") from error
        classes = self._manifest.get("classes", len(names))
        if classes != len(names):  # a name of two lines would move every name after it to another class
            raise BundleProblem(
                f"{self._folder / 'classes.txt'}: has {len(names)} lines, and manifest.json says {classes} classes; "
                "export the bundle again"
            )
        return names

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
    try:
        return checked_preprocessing(manifest["preprocessing"])
    except ValueError as error:
        raise BundleProblem(f"{folder / 'manifest.json'}: preprocessing: {error}") from error


def checked_preprocessing(plain: Any) -> Preprocessing:
    """The pre-processing that plain data describe. Raises ValueError, naming the field that is wrong."""
    try:
        preprocessing = Preprocessing(**plain)
    except TypeError as error:
        raise ValueError(str(error)) from error
    size, known = preprocessing.size, ("shortest", "squash")
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"size should be a number of pixels, not {size!r}")
    for field in ("mean", "std"):
        values = getattr(preprocessing, field)
        if not isinstance(values, list | tuple) or len(values) != 3 or not all(map(_is_number, values)):
            raise ValueError(f"{field} should be three numbers, not {values!r}")
    if preprocessing.interpolation not in list(RESAMPLING):
        raise ValueError(f"interpolation {preprocessing.interpolation} is not known")
    if preprocessing.resize_mode not in known:
        raise ValueError(f"resize_mode {preprocessing.resize_mode} is not known")
    return preprocessing


def _name_to_add(name: str) -> str:
    try:
        return clean_class_name(name)
    except ValueError as error:
        raise BundleProblem(f"a class to add {error}: {name!r}") from error


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


def json_text(document: object, encoding: str | None) -> str:
    """A JSON document for a stream with this encoding: as it is where that is UTF-8, else in ASCII with escapes.

    JSON is UTF-8 by its standard (RFC 8259, section 8.1); names that are no text are escaped too.
    """
    text = json.dumps(document, ensure_ascii=False, indent=2)
    try:
        text.encode("utf-8")
        as_it_is = codecs.lookup(encoding or "ascii").name == "utf-8"
    except (UnicodeEncodeError, LookupError):
        as_it_is = False
    return text if as_it_is else json.dumps(document, indent=2)


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
        print(json_text({"predictions": records}, sys.stdout.encoding))
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
