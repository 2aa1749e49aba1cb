"""The same graph in fewer bits: fp16, and int8 by the quantisation that keeps most of the features."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from comkd_cli.bundles.gates import Gate
from comkd_cli.bundles.graphs import IMAGE, reraise_system_error, save_graph
from comkd_cli.bundles.latency import Contender, Timing, single_thread_timings
from comkd_cli.bundles.lowering import NORM
from comkd_cli.bundles.runner import run_graph
from comkd_cli.bundles.shapes import fixed_batch
from comkd_cli.errors import ExportError, first_line
from comkd_cli.evaluation.metrics import agreement_percent
from comkd_cli.evaluation.text_encoders import cosine_rows
from comkd_cli.events import Notice, Report
from comkd_cli.runtime.quiet import quiet

# onnxruntime's extended fusions have crashed on some fp16 graphs on CPUs; the basic ones have not.
OPTIMIZATION = {"fp32": "all", "fp16": "basic", "int8": "all"}
# Products with weights. Products of two activations, as in attention, and norms stay in float: they have no weights to
# shrink, and rounding them costs most of the accuracy.
WEIGHTED = ("Conv", "Gemm", "MatMul")
MOST_OF_FP32 = 0.3  # of the fp32 file's size; a larger file has left most weights in float
CLOSE_COSINE = 0.995  # a method with a lower mean cosine comes after all closer ones, however fast
SLOWER = 1.1  # a method that takes longer than this times the fastest comes after the others
CALIBRATION_BATCH = 16
FP32 = "fp32"


@dataclass(frozen=True)
class Quantisation:
    """A quantisation method, and its figures on the images on which methods are compared."""

    method: str
    cosine_mean: float
    """Of the quantised features with the float graph's."""
    cosine_min: float
    """Of the worst image."""
    agreement_percent: float
    """Images whose top-1 class is the float graph's."""
    bytes: int
    milliseconds: float
    """Of one image on one thread, measured in alternation with the other methods."""
    speed_up: float
    """The fp32 graph's milliseconds divided by these, from the same measurement."""
    slower: bool
    """Slower than the fp32 graph, in every round of the measurement."""


@dataclass(frozen=True)
class QuantisationImages:
    """Real images of the domain for int8; the gate's images are not among them."""

    calibrate: np.ndarray
    """float32 (images, 3, size, size), from which the ranges of activations are taken."""
    choose: np.ndarray
    """float32 (images, 3, size, size), none of them in `calibrate`, on which the methods are compared."""


def to_fp16(source: Path, target: Path) -> None:
    """The graph with float16 weights and arithmetic; inputs and outputs stay float32. Raises ExportError."""
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    model = onnx.load(source)
    for index, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{index}"  # nodes are excluded by name
    squares = [node.name for node in model.graph.node if any(NORM in name for name in node.output)]
    try:
        with quiet():
            converted = OnnxModel(convert_float_to_float16(model, keep_io_types=True, node_block_list=squares))
            converted.topological_sort()  # the converter appends the casts of inputs and outputs
    except Exception as error:  # of many types
        reraise_system_error(error)
        problem = f"onnxruntime could not convert the graph to fp16: {first_line(error)}"
        raise ExportError(problem, path=target.name) from error
    save_graph(_without_round_trips(converted.model), target)


def _without_round_trips(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph without casts from float32 to float16 and back, which the converter puts between nodes it skips."""
    graph = model.graph
    outputs = {entry.name for entry in graph.output}
    casts = {node.output[0]: node for node in graph.node if node.op_type == "Cast"}
    kinds = {name: node.attribute[0].i for name, node in casts.items()}
    wide: dict[str, str] = {}
    for name, node in casts.items():  # in the order of computation
        source = node.input[0]
        if name not in outputs and (kinds[name], kinds.get(source)) == (TensorProto.FLOAT, TensorProto.FLOAT16):
            first = casts[source].input[0]
            wide[name] = wide.get(first, first)
    nodes = [node for node in graph.node if node.output[0] not in wide]
    for node in nodes:
        node.input[:] = [wide.get(name, name) for name in node.input]
    used = {name for node in nodes for name in node.input} | outputs
    kept = [node for node in nodes if node.op_type != "Cast" or node.output[0] in used]
    del graph.node[:]
    graph.node.extend(kept)
    return model


class Quantiser:
    """Makes int8 graphs by several methods and ranks them.

    images: to calibrate and to compare on. head: float32 (dim, classes); logits are features @ head. gate: the limits
    that the chosen graph will have to meet, on other images. extra: other inputs of the graph, the same for every
    batch.
    """

    def __init__(
        self, images: QuantisationImages, head: np.ndarray, gate: Gate, extra: Mapping[str, np.ndarray]
    ) -> None:
        self._images, self._head, self._gate, self._extra = images, head, gate, extra
        self._methods: dict[str, Callable[[Path, Path], None]] = {
            "static-channel-percentile": self._static("Percentile", per_channel=True),
            "static-channel-entropy": self._static("Entropy", per_channel=True),
            "static-tensor-percentile": self._static("Percentile", per_channel=False),
            "dynamic-signed": lambda source, target: quantise_dynamic(source, target, signed=True),
            "dynamic-unsigned": lambda source, target: quantise_dynamic(source, target, signed=False),
        }

    def quantise(self, source: Path, report: Report) -> list[tuple[Quantisation, Path]]:
        """The graph with 8-bit weights by each method that works, the best first.

        The order is that of: the gate's limits on the images to choose on, a file that is small enough, features that
        are close, speed, mean cosine. Speeds that differ by no more than the rounds of their own measurement count as
        equal, so that the order does not depend on the load of the machine. A notice says so if the best is slower than
        the source. The graphs are written beside the source; the caller removes those that it does not need. Raises
        ExportError if no method works.
        """
        prepared = source.with_suffix(".prepared.onnx")
        try:
            prepare_graph(source, prepared)
        except Exception as error:  # of onnxruntime's shape inference and optimiser, of many types
            reraise_system_error(error)
            prepared.unlink(missing_ok=True)
            problem = f"onnxruntime could not prepare the graph for int8: {first_line(error)}"
            raise ExportError(problem, path=source.name) from error
        graphs: dict[str, Path] = {}
        problems = []
        for method, write in self._methods.items():
            target = source.with_suffix(f".{method}.onnx")
            try:
                with quiet():
                    write(prepared, target)
            except Exception as error:  # of onnxruntime's quantiser, of many types
                reraise_system_error(error)
                problems.append(f"{method}: {first_line(error)}")
                continue
            save_graph(compact_graph(onnx.load(target)), target)
            graphs[method] = target
        prepared.unlink()
        if not graphs:
            problem = f"onnxruntime could not quantise the graph: {'; '.join(problems)}"
            raise ExportError(problem, path=source.name)
        ranked = self.rank(source, graphs)
        if (best := ranked[0][0]).slower:
            report(
                Notice(f"int8 is slower than fp32 on this machine: {best.speed_up:.2f} times its speed on one thread")
            )
        return ranked

    def rank(self, source: Path, graphs: Mapping[str, Path]) -> list[tuple[Quantisation, Path]]:
        """The quantised graphs that onnxruntime can run, the best first; the others' files are removed."""
        images = self._images.choose
        batches = {str(i): images[i : i + CALIBRATION_BATCH] for i in range(0, len(images), CALIBRATION_BATCH)}
        reference = np.concatenate(list(run_graph(source, batches, self._extra).values()))
        features: dict[str, np.ndarray] = {}
        problems = []
        for method, path in graphs.items():
            try:
                features[method] = np.concatenate(list(run_graph(path, batches, self._extra).values()))
            except ExportError as error:
                problems.append(f"{method}: {error}")
                path.unlink()
        if not features:
            problem = f"onnxruntime could not run any quantised graph: {'; '.join(problems)}"
            raise ExportError(problem, path=source.name)
        contenders = [Contender(method, graphs[method]) for method in features]
        timings = dict(single_thread_timings([Contender(FP32, source), *contenders], images.shape[2], self._extra))
        fp32 = timings.pop(FP32)
        figures = {
            method: self._figures(method, graphs[method], features[method], reference, (timings[method], fp32))
            for method in features
        }
        order = self._order(figures, timings, MOST_OF_FP32 * source.stat().st_size)
        return [(figures[method], graphs[method]) for method in order]

    def _figures(
        self, method: str, graph: Path, features: np.ndarray, reference: np.ndarray, timings: tuple[Timing, Timing]
    ) -> Quantisation:
        """timings: of this graph, and of the fp32 graph."""
        timing, fp32 = timings
        cosines = cosine_rows(features, reference)
        return Quantisation(
            method=method,
            cosine_mean=float(cosines.mean()),
            cosine_min=float(cosines.min()),
            agreement_percent=agreement_percent(
                (features @ self._head).argmax(axis=1), (reference @ self._head).argmax(axis=1)
            ),
            bytes=graph.stat().st_size,
            milliseconds=1e3 * timing.median,
            speed_up=fp32.median / timing.median,
            slower=timing.fastest > fp32.slowest,
        )

    def _order(
        self, figures: Mapping[str, Quantisation], timings: Mapping[str, Timing], most_bytes: float
    ) -> list[str]:
        """The methods, the best first; those that are equal stay in the order of `figures`."""
        fastest = min(timings.values(), key=lambda timing: timing.median)

        def key(method: str) -> tuple[bool, bool, bool, bool, float]:
            figure = figures[method]
            missed = (
                figure.cosine_min < self._gate.cosine_min or figure.agreement_percent < self._gate.agreement_min_percent
            )
            # Slower in every round than the fastest method in any of its rounds.
            slower = timings[method].fastest > SLOWER * fastest.slowest
            return missed, figure.bytes > most_bytes, figure.cosine_mean < CLOSE_COSINE, slower, -figure.cosine_mean

        return sorted(figures, key=key)

    def _static(self, how: str, per_channel: bool) -> Callable[[Path, Path], None]:
        def write(source: Path, target: Path) -> None:
            _static(source, target, self._images.calibrate, self._extra, how, per_channel)

        return write


def prepare_graph(source: Path, target: Path) -> None:
    """Infer shapes and fold constants, which quantisation needs."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with quiet():
        quant_pre_process(str(source), str(target), skip_symbolic_shape=True)
    model = onnx.load(target)
    for index, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{index}"  # nodes are excluded by name
    onnx.save(model, target)


def _static(
    source: Path, target: Path, images: np.ndarray, extra: Mapping[str, np.ndarray], how: str, per_channel: bool
) -> None:
    """Take the ranges of activations from calibration images. per_channel: a scale per output channel of a weight."""
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    quantize_static(
        str(source),
        str(target),
        _Reader(images, extra, fixed_batch(source)),
        # In the other format, QDQ, the scales and biases of a small model take as much space as its weights.
        quant_format=QuantFormat.QOperator,
        op_types_to_quantize=list(WEIGHTED),
        nodes_to_exclude=_products_of_activations(source),
        per_channel=per_channel,
        # CPUs without VNNI accumulate products of an unsigned and a signed byte in 16 bits, which overflow: signed
        # weights, which per_channel needs, get 7 bits. Products of unsigned bytes are accumulated in more bits.
        reduce_range=per_channel,
        weight_type=QuantType.QInt8 if per_channel else QuantType.QUInt8,
        activation_type=QuantType.QUInt8,
        calibrate_method=CalibrationMethod[how],
        # One batch at a time, or the activations of all images would be in memory at once.
        extra_options={"CalibPercentile": 99.99, "CalibStridedMinMax": 1},
    )


def quantise_dynamic(source: Path, target: Path, signed: bool) -> None:
    """Compute the ranges of activations at run time.

    Convolutions stay float: dynamically quantised ones are slower than those.
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


def compact_graph(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph with short names, and one zero point for a convolution if its channels share it."""
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
    """Names of the products without weights."""
    graph = onnx.load(path).graph
    weights = {initializer.name for initializer in graph.initializer}
    return [node.name for node in graph.node if node.op_type in WEIGHTED and not weights & set(node.input)]


class _Reader:
    """Calibration images in batches: onnxruntime sets a range of batches, then reads them one by one."""

    def __init__(self, images: np.ndarray, extra: Mapping[str, np.ndarray], batch: int | None) -> None:
        length = batch or CALIBRATION_BATCH
        if batch is not None:  # every image counts, and the first ones may count twice
            images = np.resize(images, (-(-len(images) // batch) * batch, *images.shape[1:]))
        starts = range(0, len(images), length)
        self._batches = [{IMAGE: images[i : i + length], **extra} for i in starts]
        self._remaining = iter(self._batches)

    def __len__(self) -> int:
        return len(self._batches)

    def set_range(self, start_index: int, end_index: int) -> None:
        """Select the batches that get_next returns."""
        self._remaining = iter(self._batches[start_index:end_index])

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next batch, or None after the last."""
        return next(self._remaining, None)
