"""Classify images with an exported bundle. Needs numpy, Pillow and onnxruntime; no torch.

`--add-class` also needs the tokenizers library if the bundle has a tokenizer.json (text encoders of SigLIP).

    python predict.py IMAGE... [--top 5] [--precision int8] [--add-class "red fox"] [--no-threshold] [--json]
    python predict.py FOLDER --csv predictions.csv
    python predict.py - < image.jpg
    python predict.py --self-test        # does this machine compute what the exporting one did?
    python predict.py --benchmark        # how fast is it here?

or, from Python, `Classifier(bundle_folder).predict("image.jpg")`.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from comkd_cli.edge.class_names import clean_class_name
from comkd_cli.edge.figures import add_figure_options, classifying_options, figures_command, json_text, misused_figures
from comkd_cli.edge.fixed_batch import run_in_batches
from comkd_cli.edge.folder_csv import CsvJob, bundle_settings, folder_csv_command
from comkd_cli.edge.images import ImageSource, UnreadableImage, load_prepared
from comkd_cli.edge.manifest import (
    EXPORT_AGAIN,
    BundleProblem,
    read_array,
    read_manifest,
    read_preprocessing,
    verified_bytes,
)
from comkd_cli.edge.session import start_session
from comkd_cli.edge.text_tokenizer import read_tokenizer
from comkd_cli.edge.threshold import NONE_OF_THESE, read_confidence
from comkd_cli.edge.visible import visible

TOP = 5
STANDARD_INPUT = "-"  # in the place of an image's path; a file of that name is ./-
ADDED_NOTE = "the threshold was fitted without the added classes"


@dataclass(frozen=True)
class Prediction:
    """A class and its probability: the softmax over all classes of the classifier, at the bundle's temperature."""

    class_name: str
    probability: float


class Classifier:
    """Classifies images with the graphs of a bundle.

    bundle: the folder that holds manifest.json. Each file is checked against the manifest's sha256 before it is used.
    precision: `fp32`, `fp16` or `int8`; None uses the first of the bundle. threads: onnxruntime's threads within an
    operator; None uses every core. threshold: False accepts every answer. Raises BundleProblem.
    """

    def __init__(
        self,
        bundle: str | os.PathLike[str],
        threads: int | None = None,
        precision: str | None = None,
        threshold: bool = True,
    ) -> None:
        self._folder = Path(bundle)
        self._manifest_path = self._folder / "manifest.json"
        self._manifest = read_manifest(self._folder)
        self._threads = threads
        self.preprocessing = read_preprocessing(self._folder, self._manifest)
        self.confidence = read_confidence(self._folder, self._manifest, threshold)
        self.class_names = self._read_class_names()
        self._precision = precision or next(iter(self._manifest["precisions"]))
        self._graphs = self._select_graphs()
        self._scale = self._manifest.get("logit_scale")
        self._optimization = str(self._graphs.get("optimization", "all"))
        self._class_vectors: np.ndarray | None = None
        self._takes_vectors = self._manifest.get("memory") == "candidates"
        if self._takes_vectors:
            self._class_vectors = self._read_class_vectors()
        self._session = self._start(self._graphs["classifier"])

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Logits (batch, classes) of prepared images, float32 (batch, 3, size, size). Raises BundleProblem."""
        others = {"class_vectors": self._class_vectors} if self._takes_vectors else {}
        try:
            output = run_in_batches(self._session, images, others)  # type: ignore[arg-type]
        except Exception as error:  # onnxruntime's own types, for inputs that do not fit the graph
            problem = f"does not accept images as manifest.json describes them: {error}"
            raise BundleProblem(problem, path=self._folder / self._graphs["classifier"]) from error
        logits = np.asarray(output)
        if not self._takes_vectors and self._class_vectors is not None:
            # Once classes are added, the session is the image encoder's.
            logits = np.asarray(np.float32(self._scale) * output @ self._class_vectors.T)
        if logits.ndim != 2 or logits.shape[1] != len(self.class_names):
            problem = f"returns an output of shape {logits.shape} for {len(self.class_names)} classes"
            raise BundleProblem(problem, path=self._folder / self._graphs["classifier"], remedy=EXPORT_AGAIN)
        return logits

    def add_classes(self, names: Sequence[str]) -> None:
        """Add classes that the student was not trained on.

        Needs a bundle with its text encoder (`comkd export --text`). The thresholds stay as they are, and answers of
        the new classes have the common one. Raises BundleProblem.
        """
        text = self._manifest.get("text")
        if not text:
            raise BundleProblem(
                "the bundle has no text encoder",
                path=self._manifest_path,
                field="text",
                remedy="export it with --text to add classes",
            )
        if self._takes_vectors and self._manifest.get("batch") is not None:
            raise BundleProblem(
                "the graphs attend to a fixed number of classes",
                path=self._manifest_path,
                field="batch",
                remedy="export without --batch to add classes",
            )
        names = [_clean(name) for name in ([names] if isinstance(names, str) else names)]
        taken = [name.replace("_", " ") for name in self.class_names]
        for i, name in enumerate(names):
            if name in [*taken, *names[:i]]:
                raise BundleProblem("the class exists already", found=repr(name))
        vectors = self._encode(text, names)
        if self._class_vectors is None:
            if not isinstance(self._scale, int | float):
                raise BundleProblem(
                    "should be a number", path=self._manifest_path, field="logit_scale", found=repr(self._scale)
                )
            self._class_vectors = self._read_class_vectors()
            self._session = self._start(self._graphs["image_encoder"])
        self._class_vectors = np.concatenate([self._class_vectors, vectors])
        self.class_names = [*self.class_names, *names]

    def _encode(self, text: dict[str, Any], names: Sequence[str]) -> np.ndarray:
        """The class vectors of new names, float32 (names, dim). text: the manifest's entry of the text encoder."""
        try:
            tokenizer = read_tokenizer(self._folder, self._manifest, text)
            templates = text.get("templates") or [text["prompt"]]  # older bundles have one prompt
            written = [[part.replace("{}", name) for part in templates] for name in (*self.class_names, *names)]
            tokens = tokenizer([prompt for prompts in written for prompt in prompts])
            new = written[len(self.class_names) :]
            too_long = [name for name, prompts in zip(names, new, strict=True) if any(map(tokenizer.cut, prompts))]
            graphs = text.get("precisions") or {}  # older bundles have one file
            chosen = graphs.get(self._precision) or graphs.get("fp32") or next(iter(graphs.values()), text)
            graph = self._start(chosen["file"], str(chosen.get("optimization", "all")))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BundleProblem(
                f"is damaged: {error!r}", path=self._manifest_path, field="text", remedy=EXPORT_AGAIN
            ) from error
        encoder = f"the text encoder, which reads {tokens.shape[1]} tokens of a prompt"
        by_class = tokens.reshape(len(written), -1)
        if len(np.unique(by_class, axis=0)) < len(by_class):
            problem = f"{encoder}, cannot distinguish these classes from one another or from the existing ones"
            raise BundleProblem(problem, found=", ".join(map(repr, names)), remedy="shorten the names")
        if too_long:
            found = ", ".join(map(repr, too_long))
            raise BundleProblem(f"too long for {encoder}", found=found, remedy="shorten the names")
        features = run_in_batches(graph, tokens[len(tokens) - len(names) * len(templates) :], {})
        if len(templates) == 1:
            return np.asarray(features)
        means = features.reshape(len(names), len(templates), features.shape[1]).mean(axis=1)
        return np.asarray(means / np.linalg.norm(means, axis=1, keepdims=True), dtype=np.float32)

    def predict(self, image: ImageSource | Image.Image, top: int = 5) -> list[Prediction]:
        """The `top` most probable classes of an image, in descending order. Raises UnreadableImage, BundleProblem.

        image: a path, an open binary file, its content as bytes, or a Pillow image. As with a file, the EXIF
        orientation of a Pillow image is applied, unless `PIL.ImageOps.exif_transpose` did that and removed the tag.
        """
        (probabilities,) = self.confidence.probabilities(self.logits(load_prepared(image, self.preprocessing)[None]))
        order = np.argsort(-probabilities, kind="stable")[:top]
        return [Prediction(self.class_names[i], float(probabilities[i])) for i in order]

    def is_none_of_these(self, predictions: Sequence[Prediction]) -> bool | None:
        """Whether an image shows none of the classes, by what `predict` returned; None without a threshold."""
        return self.confidence.is_none(predictions[0].class_name, predictions[0].probability)

    def _select_graphs(self) -> dict[str, Any]:
        """The manifest's entry of the precision, which names its graphs."""
        precisions, selected = self._manifest["precisions"], self._precision
        if selected not in precisions:
            raise BundleProblem(
                "not in the bundle",
                path=self._manifest_path,
                field="precisions",
                found=selected,
                allowed=", ".join(precisions),
            )
        graphs: dict[str, Any] = precisions[selected]
        for graph in ("classifier", "image_encoder"):
            if not isinstance(graphs.get(graph), str):
                raise BundleProblem("missing", path=self._manifest_path, field=f"precisions.{selected}.{graph}")
        return graphs

    def _read_class_names(self) -> list[str]:
        path = self._folder / "classes.txt"
        content = verified_bytes(self._folder, self._manifest, "classes.txt")
        try:
            names = content.decode("utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise BundleProblem(f"is not UTF-8: {error}", path=path) from error
        classes = self._manifest.get("classes", len(names))
        if classes != len(names):  # a name of two lines would shift all later names to other classes
            problem = f"has {len(names)} lines, but manifest.json has {classes} classes"
            raise BundleProblem(problem, path=path, remedy=EXPORT_AGAIN)
        return names

    def _read_class_vectors(self) -> np.ndarray:
        return np.asarray(read_array(self._folder, self._manifest, "class_vectors.npy"), dtype=np.float32)

    def _start(self, name: str, optimization: str | None = None) -> Any:
        graph = verified_bytes(self._folder, self._manifest, name)
        try:
            return start_session(graph, self._threads, optimization or self._optimization)
        except Exception as error:  # onnxruntime's types of errors share no other base
            raise BundleProblem(f"onnxruntime could not load it: {error}", path=self._folder / name) from error


def _clean(name: str) -> str:
    try:
        return clean_class_name(name)
    except ValueError as error:
        raise BundleProblem(f"a class to add {error}", found=repr(name)) from error


def predict_all(classifier: Classifier, images: Iterable[str], top: int) -> list[dict[str, Any]]:
    """One plain record per image: its classes and probabilities, or the error if it could not be read.

    images: paths; `-` is standard input. `none_of_these` of a record is None if no threshold decides it.
    """
    records: list[dict[str, Any]] = []
    for image in images:
        try:
            predictions = classifier.predict(sys.stdin.buffer.read() if image == STANDARD_INPUT else image, top)
        except UnreadableImage as error:
            records.append({"image": image, "error": str(error)})
            continue
        classes = [{"class": p.class_name, "probability": p.probability} for p in predictions]
        none = classifier.is_none_of_these(predictions)
        records.append({"image": image, "classes": classes, "none_of_these": none})
    return records


def none_text(record: Mapping[str, Any]) -> str:
    """The line of a record whose most probable class does not reach its threshold."""
    first = record["classes"][0]
    return f"{NONE_OF_THESE}: the most probable class has {first['probability']:.2%}, below its threshold"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of predict.py; returns its exit status."""
    for stream in (sys.stdout, sys.stderr):  # the name of a file may have characters that they cannot encode
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    options = _parse(arguments)
    try:
        if options.self_test or options.benchmark:
            return figures_command(options, Classifier)
        classifier = Classifier(options.bundle, precision=options.precision, threshold=not options.no_threshold)
        if options.add_class:
            classifier.add_classes(options.add_class)
            if classifier.confidence.threshold is not None and not options.no_threshold:
                print(f"note: {ADDED_NOTE}", file=sys.stderr)
        if options.csv:
            made_by = bundle_settings(options.bundle, options.precision, options.add_class, not options.no_threshold)
            return folder_csv_command(
                classifier, CsvJob(Path(options.images[0]), options.csv, options.top, made_by, options.fresh)
            )
        records = predict_all(classifier, options.images, options.top)
    except (BundleProblem, UnreadableImage) as error:
        print(visible(f"error: {error}"), file=sys.stderr)
        return 1
    _print_records(records, options.json)
    return 1 if any("error" in record for record in records) else 0


def _print_records(records: Sequence[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print(json_text({"predictions": records}, sys.stdout.encoding))
    for record in records:
        if "error" in record:
            print(visible(f"error: {record['error']}"), file=sys.stderr)
        elif not as_json:
            print(visible(record["image"]))
            if record["none_of_these"]:
                print(f"  {none_text(record)}")
            for entry in record["classes"]:
                print(f"  {entry['probability']:7.2%}  {visible(entry['class'], one_line=True)}")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="predict.py", description="Classify images.")
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="a file, - for standard input; with --csv a folder")
    parser.add_argument(
        "--bundle", type=Path, default=Path(__file__).parent, help="the bundle; default: the folder of this file"
    )
    parser.add_argument("--top", type=int, help=f"number of classes to print for an image; default: {TOP}")
    parser.add_argument("--precision", help="fp32, fp16 or int8; default: the first of the bundle")
    parser.add_argument("--add-class", action="append", default=[], metavar="NAME", help="add a class; may be repeated")
    parser.add_argument("--no-threshold", action="store_true", help=f"never answer {NONE_OF_THESE!r}")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument(
        "--csv", type=Path, metavar="FILE", help="write the classes of a folder's images to this file; a rerun resumes"
    )
    parser.add_argument("--fresh", action="store_true", help="replace the CSV file instead of resuming it")
    add_figure_options(parser)
    options = parser.parse_args(arguments)
    others = classifying_options(options)
    options.top = TOP if options.top is None else options.top
    if options.top < 1:
        parser.error("--top must be at least 1")
    if options.csv and (options.json or len(options.images) != 1):
        parser.error("--csv requires exactly one folder of images and cannot be combined with --json")
    if options.fresh and not options.csv:
        parser.error("--fresh requires --csv")
    if problem := misused_figures(options.self_test, options.benchmark, options.images, others, options.seconds):
        parser.error(problem)
    return options


if __name__ == "__main__":
    sys.exit(main())
