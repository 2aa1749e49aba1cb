"""The same graph in fewer bits: fp16, and int8 by whichever quantisation keeps more on images of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from comkd_cli.bundles.graphs import IMAGE, pass_on_refusals, quiet, save_graph
from comkd_cli.bundles.latency import Contender, single_thread_seconds
from comkd_cli.bundles.parity import Gate
from comkd_cli.bundles.runner import run_graph
from comkd_cli.errors import ExportError
from comkd_cli.evaluation.metrics import agreement_percent

PRECISIONS = ("fp32", "fp16", "int8")
# onnxruntime's own fusions have crashed the process on some fp16 graphs on CPUs; the basic ones have not.
OPTIMIZATION = {"fp32": "all", "fp16": "basic", "int8": "all"}
# Products with weights. What multiplies two activations, as attention does, stays in float, and so do norms:
# they hold no weights to shrink, and rounding them costs most of the accuracy.
WEIGHTED = ("Conv", "Gemm", "MatMul")
# A quantisation that leaves more of the file than this in float is none.
MOST_OF_FP32 = 0.3
CLOSE_COSINE = 0.995  # below this, a way that keeps more comes first, however slow
SLOWER = 1.1  # within this of the fastest, a way that keeps more comes first
CALIBRATION_BATCH = 16


@dataclass(frozen=True)
class Quantisation:
    """A way to int8, and how well it did on the images that the ways are chosen on."""

    method: str
    cosine_mean: float
    """Of the quantised features with the float graph's, over those images."""
    cosine_min: float
    """The same of the worst image."""
    agreement_percent: float
    """Answers that are the float graph's."""
    bytes: int
    milliseconds: float
    """Of one image on one thread, measured beside the other ways."""


def to_fp16(source: Path, target: Path) -> None:
    """The graph with float16 weights and arithmetic; inputs and outputs stay float32. Raises ExportError."""
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    try:
        with quiet():
            converted = OnnxModel(convert_float_to_float16(onnx.load(source), keep_io_types=True))
            converted.topological_sort()  # the casts of inputs and outputs come last
    except Exception as error:  # the converter meets graphs that it was not written for
        pass_on_refusals(error)
        raise ExportError(f"{target.name}: onnxruntime can't convert the graph to fp16: {error}") from error
    save_graph(converted.model, target)


@dataclass(frozen=True)
class QuantisationImages:
    """Real images of the domain for int8; those of the gate are not among them."""

    calibrate: np.ndarray
    """float32 (images, 3, size, size), from which the ranges of activations are taken."""
    choose: np.ndarray
    """float32 (images, 3, size, size), none of them in `calibrate`, on which the ways are compared."""


def to_int8(
    source: Path, images: QuantisationImages, head: np.ndarray, gate: Gate, extra: dict[str, np.ndarray]
) -> list[tuple[Quantisation, Path]]:
    """The graph with 8-bit weights, made in each way that applies, the best first.

    Better is, in this order: within the gate's limits on the images to choose on, a file that is small enough,
    features that stay close, and speed. head: float32 (dim, classes), the class vectors by which features are
    answers. extra: other inputs of the graph, the same for every batch. The graphs are written beside the source;
    the caller keeps what it wants. Raises ExportError where none works.
    """
    prepared = source.with_suffix(".prepared.onnx")
    try:
        _prepare(source, prepared)
    except Exception as error:  # whatever onnxruntime's shape inference and optimiser meet
        pass_on_refusals(error)
        prepared.unlink(missing_ok=True)
        raise ExportError(f"{source.name}: onnxruntime can't prepare the graph for int8: {error}") from error
    made: dict[str, Path] = {}
    problems = []
    ways: dict[str, Callable[[Path], None]] = {
        "static-channel-percentile": lambda out: _static(prepared, out, images.calibrate, extra, "Percentile", True),
        "static-channel-entropy": lambda out: _static(prepared, out, images.calibrate, extra, "Entropy", True),
        "static-tensor-percentile": lambda out: _static(prepared, out, images.calibrate, extra, "Percentile", False),
        "dynamic-signed": lambda out: _dynamic(prepared, out, signed=True),
        "dynamic-unsigned": lambda out: _dynamic(prepared, out, signed=False),
    }
    for method, quantise in ways.items():
        out = source.with_suffix(f".{method}.onnx")
        try:
            with quiet():
                quantise(out)
        except Exception as error:  # onnxruntime's quantiser raises whatever a graph makes it fail of
            pass_on_refusals(error)
            problems.append(f"{method}: {error}")
            continue
        save_graph(_compact(onnx.load(out)), out)
        made[method] = out
    prepared.unlink()
    if not made:
        raise ExportError(f"{source.name}: onnxruntime can't quantise the graph: {'; '.join(problems)}")
    return _ranked(source, made, images.choose, head, gate, extra)


def _ranked(
    source: Path,
    made: dict[str, Path],
    images: np.ndarray,
    head: np.ndarray,
    gate: Gate,
    extra: dict[str, np.ndarray],
) -> list[tuple[Quantisation, Path]]:
    """Those that onnxruntime can run, best first; the files of the others are removed."""
    batches = {str(i): images[i : i + CALIBRATION_BATCH] for i in range(0, len(images), CALIBRATION_BATCH)}
    reference = np.concatenate(list(run_graph(source, batches, extra).values()))
    features: dict[str, np.ndarray] = {}
    problems = []
    for method, path in list(made.items()):
        try:
            features[method] = np.concatenate(list(run_graph(path, batches, extra).values()))
        except ExportError as error:
            problems.append(f"{method}: {error}")
            path.unlink()
            del made[method]
    if not made:
        raise ExportError(f"{source.name}: onnxruntime can run no quantised graph: {'; '.join(problems)}")
    contenders = [Contender(method, path) for method, path in made.items()]
    seconds = single_thread_seconds(contenders, images.shape[2], extra)
    found = []
    for method, path in made.items():
        cosines = _cosines(features[method], reference)
        agreement = agreement_percent((features[method] @ head).argmax(axis=1), (reference @ head).argmax(axis=1))
        figures = float(cosines.mean()), float(cosines.min()), agreement
        found.append((Quantisation(method, *figures, path.stat().st_size, 1e3 * seconds[method]), path))
    most = MOST_OF_FP32 * source.stat().st_size
    fastest = min(seconds.values())

    def worse(entry: tuple[Quantisation, Path]) -> tuple[bool, bool, bool, bool, float]:
        way = entry[0]
        missed = way.cosine_min < gate.cosine_min or way.agreement_percent < gate.agreement_min_percent
        slow = way.milliseconds > SLOWER * 1e3 * fastest
        return missed, way.bytes > most, way.cosine_mean < CLOSE_COSINE, slow, -way.cosine_mean

    return sorted(found, key=worse)


def _cosines(features: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Of each image's features with the unit-length reference, (images,); -1 where they are not numbers."""
    with np.errstate(invalid="ignore", divide="ignore"):
        found = np.sum(features * reference, axis=1) / np.linalg.norm(features, axis=1)
    return np.where(np.isfinite(found), found, -1.0)


def _prepare(source: Path, target: Path) -> None:
    """Shapes inferred and constants folded, as quantisation needs them."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with quiet():
        quant_pre_process(str(source), str(target), skip_symbolic_shape=True)
    model = onnx.load(target)
    for index, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{index}"  # what is left out is left out by name
    onnx.save(model, target)


def _static(
    source: Path, target: Path, calibration: np.ndarray, extra: dict[str, np.ndarray], how: str, per_channel: bool
) -> None:
    """Ranges of activations from calibration images. per_channel: a scale for each output channel of a weight."""
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    quantize_static(
        str(source),
        str(target),
        _Reader(calibration, extra),
        # In pairs of nodes around float operators, the other format, a small model's scales and biases would
        # take as much room again as its weights.
        quant_format=QuantFormat.QOperator,
        op_types_to_quantize=list(WEIGHTED),
        nodes_to_exclude=_products_of_activations(source),
        per_channel=per_channel,
        # CPUs without VNNI add products of an unsigned and a signed byte in sixteen bits, which overflow: signed
        # weights, which channels need, get seven bits. Unsigned ones are added in more.
        reduce_range=per_channel,
        weight_type=QuantType.QInt8 if per_channel else QuantType.QUInt8,
        activation_type=QuantType.QUInt8,
        calibrate_method=CalibrationMethod[how],
        # A batch at a time, or every activation of every image would be in memory at once.
        extra_options={"CalibPercentile": 99.99, "CalibStridedMinMax": 1},
    )


def _dynamic(source: Path, target: Path, signed: bool) -> None:
    """Ranges of activations found as the graph runs.

    Convolutions stay float: those that are quantised as they run are slower than float ones.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        str(source),
        str(target),
        op_types_to_quantize=["Gemm", "MatMul"],
        nodes_to_exclude=_products_of_activations(source),
        per_channel=True,
        reduce_range=signed,  # as in _static
        weight_type=QuantType.QInt8 if signed else QuantType.QUInt8,
    )


def _compact(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph with short names within, and one zero point where a convolution's channels share it."""
    graph = model.graph
    kept = {entry.name for entry in (*graph.input, *graph.output)}
    names: dict[str, str] = {"": ""}

    def short(name: str) -> str:
        return name if name in kept else names.setdefault(name, f"{len(names):x}")

    filters = {node.input[5] for node in graph.node if node.op_type == "QLinearConv"}
    for initializer in graph.initializer:
        if initializer.name in filters and len(initializer.dims) == 1:
            points = numpy_helper.to_array(initializer)
            if len(points) and (points == points[0]).all():
                initializer.CopyFrom(numpy_helper.from_array(points[0], initializer.name))
        initializer.name = short(initializer.name)
    for node in graph.node:
        node.input[:] = [short(name) for name in node.input]
        node.output[:] = [short(name) for name in node.output]
    return model


def _products_of_activations(path: Path) -> list[str]:
    """Names of the products that no weight takes part in."""
    graph = onnx.load(path).graph
    weights = {initializer.name for initializer in graph.initializer}
    return [node.name for node in graph.node if node.op_type in WEIGHTED and not weights & set(node.input)]


class _Reader:
    """Calibration images in batches, as onnxruntime asks for them: by ranges, then one after the other."""

    def __init__(self, images: np.ndarray, extra: dict[str, np.ndarray]) -> None:
        starts = range(0, len(images), CALIBRATION_BATCH)
        self._batches = [{IMAGE: images[i : i + CALIBRATION_BATCH], **extra} for i in starts]
        self._waiting = iter(self._batches)

    def __len__(self) -> int:
        return len(self._batches)

    def set_range(self, start_index: int, end_index: int) -> None:
        """The batches that are asked for next."""
        self._waiting = iter(self._batches[start_index:end_index])

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next batch, or None after the last."""
        return next(self._waiting, None)


def in_order(precisions: Sequence[str]) -> tuple[str, ...]:
    """Each precision once, fp32 first."""
    return tuple(precision for precision in PRECISIONS if precision in precisions)
