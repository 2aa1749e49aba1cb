"""The bundle's README: a model card in the Hugging Face Hub's format."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from ruamel.yaml import YAML

from comkd_cli.bundles.confidence_text import confidence_lines
from comkd_cli.bundles.latency import disturbance
from comkd_cli.bundles.parts import PartSize
from comkd_cli.bundles.text_card import text_section
from comkd_cli.data.class_names import some
from comkd_cli.evaluation.metrics import wilson_interval_percent
from comkd_cli.models.checkpoints import StudentRecord
from comkd_cli.results.tables import markdown_text

FILES = {
    "class_vectors.npy": "one L2-normalised vector per class; logits = logit_scale * features @ vectors.T",
    "classes.txt": "class names in the order of the logits",
    "predict.py": "command line and `Classifier`, without torch",
    "text_encoder.onnx": "`tokens` (texts, context) int64 -> `text_features`: the class vectors of new classes",
    "text_encoder.fp16.onnx": "fp16: the same",
    "text_encoder.int8.onnx": "int8: the same",
    "bpe_merges.txt": "the merges of CLIP's tokenizer",
    "tokenizer.json": "the text encoder's tokenizer, which predict.py reads with the tokenizers library",
    "text_vocabulary.npy": "int32, ascending: the CLIP tokens that the text encoder knows, which it numbers from 1",
    "index.html": "classifies images in a browser; serve this folder with `python -m http.server`",
}
MOST_CLASSES = 20
MOST_CHARACTERS = 100  # of a class name
OF_ANY_ORIGIN = ("recipe", "data", "teacher", "student", "license")
"""Fields of the manifest that users and files name."""
NO_SCORE = "no held-out labelled images"


def model_card(manifest: Mapping[str, Any], record: StudentRecord, sizes: Mapping[str, int]) -> str:
    """Markdown with the Hub's metadata as front matter. sizes: bytes of each file of the bundle."""
    metadata = _metadata(manifest)
    manifest = {**manifest, **{name: markdown_text(str(manifest[name])) for name in OF_ANY_ORIGIN}}
    sections = [
        f"---\n{metadata}---",
        f"# {manifest['recipe']}: an image classifier for {manifest['classes']} classes",
        _summary(manifest, record),
        _use(manifest),
        _files(manifest, sizes),
        _numbers(manifest, sizes),
        "\n\n".join(["## Confidence", *confidence_lines(manifest)]),
        _limits(manifest, record),
        _citation(),
    ]
    return "\n\n".join(sections) + "\n"


def _metadata(manifest: Mapping[str, Any]) -> str:
    fields: dict[str, Any] = {
        "license": manifest["license"],
        "library_name": "onnx",
        "pipeline_tag": "zero-shot-image-classification" if manifest["text"] else "image-classification",
        "tags": ["clip", "knowledge-distillation", "onnx"],
    }
    if manifest["test_top1_percent"] is not None:
        biased = ", epoch selected on test images" if manifest["selection"] == "promptkd" else ""
        metric = {
            "type": "accuracy",
            "value": round(manifest["test_top1_percent"], 2),
            "name": f"top-1, percent{biased}",
        }
        result = {
            "task": {"type": "image-classification"},
            "dataset": {"name": manifest["data"], "type": manifest["data"]},
            "metrics": [metric],
        }
        fields["model-index"] = [{"name": manifest["recipe"], "results": [result]}]
    stream = io.StringIO()
    writer = YAML(typ="safe", pure=True)
    writer.default_flow_style = False
    writer.dump(fields, stream)
    return stream.getvalue()


def _summary(manifest: Mapping[str, Any], record: StudentRecord) -> str:
    if not record.recipe.loss.needs_teacher:
        return (
            f"Trained by {manifest['made_by']} on the labelled images of {manifest['data']}, without distillation, "
            f"with the class vectors of {manifest['teacher']}: {manifest['student']}. {_score(manifest)}"
        )
    labels = "with the available labels" if record.recipe.loss.labels else "without labels"
    return (
        f"Distilled by {manifest['made_by']} (ComKD-CLIP, arXiv 2408.04145) on the images of {manifest['data']}, "
        f"{labels}, from the teacher {manifest['teacher']} into {manifest['student']}. {_score(manifest)}"
    )


def _score(manifest: Mapping[str, Any]) -> str:
    """The student's own score and the images on which it was measured, or why there is none."""
    score, images, unreadable = (manifest[name] for name in ("test_top1_percent", "test_images", "test_unreadable"))
    if score is None:
        return "Its accuracy is unknown: there were no held-out labelled images when it was trained."
    count = "the" if images is None else f"{int(images)}"
    split = "held-out" if manifest["test_images_held_out"] else "test"
    text = f"Top-1 on {count} {split} images, in PyTorch: {score:.2f} %"
    if images:
        text += f" ({_interval(wilson_interval_percent(score, int(images)))})"
    if unreadable:
        text += f"; {int(unreadable)} more could not be read"
    if manifest["test_images_were_learned_from"]:
        text += "; the student was trained on these images, without their labels"
    changed = manifest["test_top1_changed"]
    return f"{text}. {changed}" if changed else f"{text}."


def _interval(interval: Sequence[float]) -> str:
    """`95 % interval 97.6 to 99.7 %`."""
    return f"95 % interval {interval[0]:.1f} to {interval[1]:.1f} %"


def _use(manifest: Mapping[str, Any]) -> str:
    lines = ["    pip install numpy pillow onnxruntime", "    python predict.py IMAGE..."]
    if len(manifest["precisions"]) > 1:
        lines.append(f"    python predict.py IMAGE... --precision {list(manifest['precisions'])[-1]}")
    if manifest["text"]:
        if manifest["text"]["tokenizer"]:
            lines.append("    pip install tokenizers")
        lines.append('    python predict.py IMAGE... --add-class "red fox"')
    if manifest["threshold"]["value"] is not None:
        lines.append("    python predict.py IMAGE... --no-threshold")
    lines += ["    python predict.py --self-test", "    python predict.py --benchmark"]
    return "\n".join(lines)


def _files(manifest: Mapping[str, Any], sizes: Mapping[str, int]) -> str:
    size, dim, classes = manifest["preprocessing"]["size"], manifest["feature_dim"], manifest["classes"]
    batch = manifest["batch"] or "batch"
    second_input = " and `class_vectors` (classes, dim)" if manifest["memory"] == "candidates" else ""
    rows = []
    for precision, entry in manifest["precisions"].items():
        rows += [
            f"| {entry['classifier']} | {precision}: `image` ({batch}, 3, {size}, {size}) float32{second_input} -> "
            f"`logits` ({batch}, {'classes' if second_input else classes}) |",
            f"| {entry['image_encoder']} | {precision}: the same input -> `image_features` ({batch}, {dim}), "
            "L2-normalised |",
        ]
        for kind, graphs in entry.get("inputs", {}).items():
            sides = f"{size}, {size}" if kind == "pixels" else "height, width"
            rows += [
                f"| {graphs[graph]} | {precision}: `pixels` ({batch}, {sides}, 3) uint8, RGB, instead of `image` |"
                for graph in ("classifier", "image_encoder")
            ]
    rows += [f"| {name} | {description} |" for name, description in FILES.items() if name in sizes]
    rows.append("| reference/ | eight images (CC0) with their tensors and logits, for `predict.py --self-test` |")
    rows.append(
        "| manifest.json | pre-processing, temperature, threshold, parity, latency, sha256 and size of every file |"
    )
    return "\n".join(["## Files", "", "| file | content |", "|---|---|", *rows])


def _numbers(manifest: Mapping[str, Any], sizes: Mapping[str, int]) -> str:
    lines = [
        "## In numbers",
        "",
        f"{manifest['parameters']:,} parameters from the image to its features, "
        f"{manifest['multiply_adds'] / 1e6:,.1f} million multiply-adds per image. ONNX opset {manifest['opset']}.",
        "",
        _compared(manifest),
        "",
        "| precision | classifier, MB | smallest cosine with PyTorch | top-1 agreement | top-1 (PyTorch's) |",
        "|---|---:|---:|---:|---:|",
        *(_parity_row(precision, entry, sizes) for precision, entry in manifest["precisions"].items()),
    ]
    return "\n".join([*lines, *_quantisation(manifest), *text_section(manifest, sizes), *_latency(manifest)])


def _parity_row(precision: str, entry: Mapping[str, Any], sizes: Mapping[str, int]) -> str:
    parity = entry["parity"]
    top1 = NO_SCORE
    if parity["top1_percent"] is not None:
        top1 = (
            f"{parity['top1_percent']:.2f} % ({parity['student_top1_percent']:.2f} %), "
            f"{_interval(parity['top1_interval_percent'])}"
        )
    return (
        f"| {precision} | {sizes[entry['classifier']] / 1e6:.2f} | {parity['feature_cosine_min']:.6f} | "
        f"{parity['top1_agreement_percent']:.2f} % of {parity['images']}, "
        f"{_interval(parity['top1_agreement_interval_percent'])} | {top1} |"
    )


def _quantisation(manifest: Mapping[str, Any]) -> list[str]:
    """How int8 was made; nothing if it is not in the bundle."""
    methods = manifest["precisions"].get("int8", {}).get("quantisation")
    if not methods:
        return []
    parts = {name: PartSize(**manifest["images"][name]) for name in ("choose", "calibrate")}
    compared = ", ".join(
        f"{method['method']} {method['cosine_mean']:.5f} at {method['bytes'] / 1e6:.2f} MB and "
        f"{method['milliseconds']:.2f} ms{_against_fp32(method)}"
        for method in methods
    )
    return [
        "",
        f"int8 was calibrated on {parts['calibrate'].words()}, and its method was chosen on {parts['choose'].images} "
        "others; the table uses neither. The methods with their mean cosine on those "
        f"{parts['choose'].images}, the chosen one first: {compared}.",
    ]


def _against_fp32(method: Mapping[str, Any]) -> str:
    """The speed of a method relative to fp32, with a warning if it is lower in every round."""
    warning = ": slower" if method["slower"] else ""
    return f" ({method['speed_up']:.2f} times the speed of fp32{warning})"


def _latency(manifest: Mapping[str, Any]) -> list[str]:
    """The measurements of --benchmark; nothing without them."""
    if not manifest["latency"]:
        return []
    disturbed = disturbance(manifest["latency"])
    shares = "" if manifest["batch"] in (None, 1) else f", the graphs' share of their batch of {manifest['batch']}"
    return [
        "",
        f"Batch 1{shares}, on the machine that exported the bundle; speed-up and memory against eager PyTorch in fp32, "
        f"measured in alternation{'. ' + disturbed if disturbed else ':'}",
        "",
        "| what | threads | milliseconds | speed-up | peak memory, MiB | share |",
        "|---|---:|---:|---:|---:|---:|",
        *(
            f"| {entry['name']} | {entry['threads']} | {1e3 * entry['seconds']:.2f} | {entry['speed_up']:.2f} | "
            f"{entry['peak_bytes'] / 2**20:.0f} | {entry['memory_share']:.2f} |"
            for entry in manifest["latency"]
        ),
    ]


def _compared(manifest: Mapping[str, Any]) -> str:
    """The images on which the graphs were compared with PyTorch."""
    gate = PartSize(**manifest["images"]["gate"])
    unreadable = manifest["images"]["unreadable"]
    skipped = f"; {unreadable} images could not be read" if unreadable else ""
    labels = "" if gate.labels else ". No top-1 is reported, because these are not held-out labelled images"
    return f"The graphs were compared with PyTorch on {gate.words(scored=True)}{skipped}{labels}."


def class_text(name: str) -> str:
    """A class name, shortened, as text that Markdown and HTML show as it is."""
    return markdown_text(name if len(name) <= MOST_CHARACTERS else f"{name[:MOST_CHARACTERS]}...")


def _limits(manifest: Mapping[str, Any], record: StudentRecord) -> str:
    names = ", ".join(map(class_text, record.class_names[:MOST_CLASSES]))
    more = f" and {len(record.class_names) - MOST_CLASSES} more" if len(record.class_names) > MOST_CLASSES else ""
    everything = manifest["threshold"]["value"] is None
    lines = [
        "## Limits",
        "",
        f"{'It assigns one of its classes to any image' if everything else 'Its classes'}: {names}{more}.",
        f"It has the biases of the images of {manifest['data']} and of its teacher; measure its accuracy before you "
        "use it on other images.",
    ]
    if record.classes_added:
        added = some([class_text(name) for name in record.classes_added])
        lines.append(f"It was not trained on these classes, which were added by name: {added}.")
    if record.recipe.selection == "promptkd":
        lines.append(
            "Its score is optimistically biased because its epoch was selected on test images, as in PromptKD's "
            "released code."
        )
    for precision, reason in manifest["failed"].items():
        lines.append(f"{precision} is not in the bundle: {markdown_text(reason)}.")
    license_note = (
        "No licence was specified for this model; the licences of its data, its teacher and its backbone apply."
        if manifest["license"] == "unknown"
        else f"Licence: {manifest['license']}. The licences of its data, its teacher and its backbone also apply."
    )
    return "\n".join([*lines, "", license_note])


def _citation() -> str:
    return "\n".join(
        [
            "## Citation",
            "",
            "    @article{chen2024comkd,",
            "      title={ComKD-CLIP: Comprehensive Knowledge Distillation for Contrastive Language-Image "
            "Pre-training Model},",
            "      author={Chen, Yifan and Qiao, Xiaozhen and Sun, Zhe and Li, Xuelong},",
            "      journal={arXiv preprint arXiv:2408.04145},",
            "      year={2024}",
            "    }",
        ]
    )
