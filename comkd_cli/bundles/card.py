"""The bundle's README: a model card in the Hub's format, from the manifest alone."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from ruamel.yaml import YAML

from comkd_cli.bundles.latency import disturbance
from comkd_cli.bundles.parts import PartSize
from comkd_cli.evaluation.metrics import wilson_interval_percent
from comkd_cli.models.checkpoints import StudentRecord

WHAT_FILES_ARE = {
    "class_vectors.npy": "one L2-normalised vector a class; logits = logit_scale * features @ vectors.T",
    "classes.txt": "class names in the order of the logits",
    "predict.py": "command line and `Classifier`, without torch",
    "text_encoder.onnx": "`tokens` (texts, context) int64 -> `text_features`: the class vectors of new classes",
    "bpe_merges.txt": "the merges of CLIP's tokenizer",
    "index.html": "classifies in a browser; serve this folder with `python -m http.server`",
}
MOST_CLASSES = 20
NO_SCORE = "no held-out labelled images"


def model_card(manifest: Mapping[str, Any], record: StudentRecord, sizes: Mapping[str, int]) -> str:
    """Markdown with the Hub's metadata at its head. sizes: bytes of each file of the bundle."""
    sections = [
        f"---\n{_metadata(manifest)}---",
        f"# {manifest['recipe']}: an image classifier for {manifest['classes']} classes",
        _summary(manifest, record),
        _use(manifest),
        _files(manifest, sizes),
        _numbers(manifest, sizes),
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
            f"Trained by {manifest['made_by']} on the labelled images of {manifest['data']}, without distillation, on "
            f"the class vectors of {manifest['teacher']}: {manifest['student']}. {_score(manifest)}"
        )
    labels = "with their labels" if record.recipe.loss.labels else "without labels"
    return (
        f"Distilled by {manifest['made_by']} (ComKD-CLIP, arXiv 2408.04145) on the images of {manifest['data']}, "
        f"{labels}, from the teacher {manifest['teacher']} into {manifest['student']}. {_score(manifest)}"
    )


def _score(manifest: Mapping[str, Any]) -> str:
    """What the student's own score is, on what, and why there is none."""
    score, images, unreadable = (manifest[name] for name in ("test_top1_percent", "test_images", "test_unreadable"))
    if score is None:
        return "Its accuracy is not known: no held-out labelled images were at hand when it was trained."
    of = "the" if images is None else f"{int(images)}"
    text = f"Top-1 on {of} test images, in PyTorch: {score:.2f} %"
    if images:
        text += f" ({_interval(wilson_interval_percent(score, int(images)))})"
    if unreadable:
        text += f"; {int(unreadable)} more could not be read"
    if manifest["test_images_were_learned_from"]:
        text += "; the student learned from these images, without their labels"
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
        lines.append('    python predict.py IMAGE... --add-class "red fox"')
    return "\n".join(lines)


def _files(manifest: Mapping[str, Any], sizes: Mapping[str, int]) -> str:
    size, dim, classes = manifest["preprocessing"]["size"], manifest["feature_dim"], manifest["classes"]
    also = " and `class_vectors` (classes, dim)" if manifest["memory"] == "candidates" else ""
    rows = []
    for precision, entry in manifest["precisions"].items():
        rows += [
            f"| {entry['classifier']} | {precision}: `image` (batch, 3, {size}, {size}) float32{also} -> `logits` "
            f"(batch, {'classes' if also else classes}) |",
            f"| {entry['image_encoder']} | {precision}: the same input -> `image_features` (batch, {dim}), "
            "L2-normalised |",
        ]
    rows += [f"| {name} | {what} |" for name, what in WHAT_FILES_ARE.items() if name in sizes]
    rows.append("| manifest.json | pre-processing, logit scale, parity, latency, sha256 and size of every file |")
    return "\n".join(["## Files", "", "| file | what it is |", "|---|---|", *rows])


def _numbers(manifest: Mapping[str, Any], sizes: Mapping[str, int]) -> str:
    lines = [
        "## In numbers",
        "",
        f"{manifest['parameters']:,} parameters between image and feature, "
        f"{manifest['multiply_adds'] / 1e6:,.1f} million multiply-adds an image. ONNX opset {manifest['opset']}.",
        "",
        _compared(manifest),
        "",
        "| precision | classifier, MB | least cosine to PyTorch | answers as PyTorch's | top-1 (PyTorch's) |",
        "|---|---:|---:|---:|---:|",
    ]
    for precision, entry in manifest["precisions"].items():
        parity = entry["parity"]
        top1 = NO_SCORE
        if parity["top1_percent"] is not None:
            top1 = (
                f"{parity['top1_percent']:.2f} % ({parity['student_top1_percent']:.2f} %), "
                f"{_interval(parity['top1_interval_percent'])}"
            )
        lines.append(
            f"| {precision} | {sizes[entry['classifier']] / 1e6:.2f} | {parity['feature_cosine_min']:.6f} | "
            f"{parity['top1_agreement_percent']:.2f} % of {parity['images']}, "
            f"{_interval(parity['top1_agreement_interval_percent'])} | {top1} |"
        )
    if ways := manifest["precisions"].get("int8", {}).get("quantisation"):
        parts = {name: PartSize(**manifest["images"][name]) for name in ("choose", "calibrate")}
        tried = ", ".join(
            f"{way['method']} {way['cosine_mean']:.5f} at {way['bytes'] / 1e6:.2f} MB and {way['milliseconds']:.2f} ms"
            for way in ways
        )
        lines += [
            "",
            f"int8 was calibrated on {parts['calibrate'].words()}, and its way was chosen on "
            f"{parts['choose'].images} others, none of which the table counts. The ways with their mean cosine on "
            f"those {parts['choose'].images}, the first taken: {tried}.",
        ]
    if manifest["latency"]:
        disturbed = disturbance(manifest["latency"])
        lines += [
            "",
            "Batch 1, on the machine that made the bundle; speed-up and memory against eager PyTorch fp32, side by "
            f"side in one run{'. ' + disturbed if disturbed else ':'}",
            "",
            "| what | threads | milliseconds | speed-up | peak memory, MiB | share |",
            "|---|---:|---:|---:|---:|---:|",
            *(
                f"| {entry['name']} | {entry['threads']} | {1e3 * entry['seconds']:.2f} | {entry['speed_up']:.2f} | "
                f"{entry['peak_bytes'] / 2**20:.0f} | {entry['memory_share']:.2f} |"
                for entry in manifest["latency"]
            ),
        ]
    return "\n".join(lines)


def _compared(manifest: Mapping[str, Any]) -> str:
    """On which images the graphs were compared with PyTorch."""
    gate = PartSize(**manifest["images"]["gate"])
    unreadable = manifest["images"]["unreadable"]
    left_out = f"; {unreadable} images could not be read" if unreadable else ""
    labels = "" if gate.labels else ". No top-1 is given, since these are not held-out labelled images"
    return f"The graphs were compared with PyTorch on {gate.words(scored=True)}{left_out}{labels}."


def _limits(manifest: Mapping[str, Any], record: StudentRecord) -> str:
    names = ", ".join(record.class_names[:MOST_CLASSES])
    more = f" and {len(record.class_names) - MOST_CLASSES} more" if len(record.class_names) > MOST_CLASSES else ""
    lines = [
        "## Limits",
        "",
        f"It answers with one of its classes whatever it is shown: {names}{more}.",
        f"It learned from the images of {manifest['data']} and from its teacher, with whatever both of them lack or "
        "prefer; on other images measure it first.",
    ]
    if record.recipe.selection == "promptkd":
        lines.append(
            "Its epoch was selected on test images, as PromptKD's released code does: its score is "
            "optimistically biased because its epoch was selected on test images."
        )
    for precision, why in manifest["failed"].items():
        lines.append(f"{precision} is not in the bundle: {why}.")
    license_note = (
        "No licence was given for this model; those of its data, its teacher and its backbone apply."
        if manifest["license"] == "unknown"
        else f"Licence: {manifest['license']}. Those of its data, its teacher and its backbone apply too."
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
