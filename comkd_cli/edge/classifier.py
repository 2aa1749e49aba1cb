"""Classify images with an exported bundle. Needs numpy, Pillow and onnxruntime; no torch.

    python predict.py IMAGE... [--top 5] [--precision int8] [--add-class "red fox"] [--json]
    python predict.py FOLDER --csv predictions.csv
    python predict.py - < image.jpg

or, from Python, `Classifier(bundle_folder).predict("image.jpg")`.
"""

from __future__ import annotations

import argparse
import codecs
import io
import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from comkd_cli.edge.class_names import clean_class_name
from comkd_cli.edge.clip_tokenizer import Tokenizer
from comkd_cli.edge.folder_csv import CsvJob, bundle_settings, folder_csv_command
from comkd_cli.edge.images import ImageSource, UnreadableImage, load_prepared
from comkd_cli.edge.manifest import BundleProblem, read_manifest, read_preprocessing, verified_bytes

STANDARD_INPUT = "-"  # in the place of an image's path; a file of that name is ./-


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
        (logits,) = self.logits(load_prepared(image, self.preprocessing)[None]).astype(np.float64)
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


def _name_to_add(name: str) -> str:
    try:
        return clean_class_name(name)
    except ValueError as error:
        raise BundleProblem(f"a class to add {error}: {name!r}") from error


def predict_all(classifier: Classifier, images: Iterable[str], top: int) -> list[dict[str, Any]]:
    """One plain record per image: its classes and probabilities, or the reason that it can't be read.

    images: paths; `-` is standard input.
    """
    records: list[dict[str, Any]] = []
    for image in images:
        try:
            predictions = classifier.predict(sys.stdin.buffer.read() if image == STANDARD_INPUT else image, top)
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
    for stream in (sys.stdout, sys.stderr):  # the name of a file may have characters that they cannot encode
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    options = _parse(arguments)
    try:
        classifier = Classifier(options.bundle, precision=options.precision)
        if options.add_class:
            classifier.add_classes(options.add_class)
        if options.csv:
            made_by = bundle_settings(options.bundle, options.precision, options.add_class)
            return folder_csv_command(
                classifier, CsvJob(Path(options.images[0]), options.csv, options.top, made_by, options.fresh)
            )
        records = predict_all(classifier, options.images, options.top)
    except BundleProblem as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    _print_records(records, options.json)
    return 1 if any("error" in record for record in records) else 0


def _print_records(records: Sequence[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print(json_text({"predictions": records}, sys.stdout.encoding))
    for record in records:
        if "error" in record:
            print(f"error: {record['error']}", file=sys.stderr)
        elif not as_json:
            print(record["image"])
            for entry in record["classes"]:
                print(f"  {entry['probability']:7.2%}  {entry['class']}")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="predict.py", description="Classify images.")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="a file, - for standard input; with --csv a folder")
    parser.add_argument(
        "--bundle", type=Path, default=Path(__file__).parent, help="the bundle; default: the folder of this file"
    )
    parser.add_argument("--top", type=int, default=5, help="number of classes to print for an image")
    parser.add_argument("--precision", help="fp32, fp16 or int8; default: the first of the bundle")
    parser.add_argument("--add-class", action="append", default=[], metavar="NAME", help="add a class; may be repeated")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument(
        "--csv", type=Path, metavar="FILE", help="write the classes of a folder's images to this file; a rerun resumes"
    )
    parser.add_argument("--fresh", action="store_true", help="replace the CSV file instead of resuming it")
    options = parser.parse_args(arguments)
    if options.top < 1:
        parser.error("--top must be at least 1")
    if options.csv and (options.json or len(options.images) != 1):
        parser.error("--csv takes one folder of images, and no --json")
    if options.fresh and not options.csv:
        parser.error("--fresh belongs to --csv")
    return options


if __name__ == "__main__":
    sys.exit(main())
