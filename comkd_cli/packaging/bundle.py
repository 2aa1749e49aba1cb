"""The bundle: a folder that a device can use without torch, and that says what it is."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from comkd_cli import predictor
from comkd_cli.checkpoints import StudentRecord
from comkd_cli.files import sha256_of_file, write_text
from comkd_cli.packaging.parity import Parity

ENCODER = "image_encoder.onnx"
CLASSIFIER = "classifier.onnx"


def complete_bundle(
    folder: Path, record: StudentRecord, class_vectors: np.ndarray, logit_scale: float, parity: Parity
) -> dict[str, Any]:
    """Add to a folder with the two graphs all that makes it a bundle, and return its manifest.

    class_vectors: float32 (classes, dim), L2-normalised.
    """
    np.save(folder / "class_vectors.npy", class_vectors)
    write_text(folder / "classes.txt", "".join(f"{name}\n" for name in record.class_names))
    shutil.copyfile(predictor.__file__, folder / "predict.py")
    manifest: dict[str, Any] = {
        "format": predictor.BUNDLE_FORMAT,
        "made_by": f"comkd {version('comkd')}",
        "recipe": record.recipe_name,
        "data": record.source,
        "classes": len(record.class_names),
        "template": record.template,
        "preprocessing": asdict(record.preprocessing),
        "logit_scale": logit_scale,
        "feature_dim": class_vectors.shape[1],
        "opset": opset_of(folder / CLASSIFIER),
        "parity": asdict(parity),
        "test_top1_percent": record.metrics.get("test_top1_percent"),
    }
    write_text(folder / "README.md", _readme(manifest, record))
    manifest["files"] = {
        path.name: {"sha256": sha256_of_file(path), "bytes": path.stat().st_size} for path in sorted(folder.iterdir())
    }
    write_text(folder / "manifest.json", json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    return manifest


def opset_of(graph: Path) -> int:
    """The version of the standard ONNX operators that a graph uses."""
    import onnx

    model = onnx.load(graph, load_external_data=False)
    return int(next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")))


def _readme(manifest: dict[str, Any], record: StudentRecord) -> str:
    parity, preprocessing = manifest["parity"], manifest["preprocessing"]
    score = manifest["test_top1_percent"]
    lines = [
        f"# {manifest['recipe']}: an image classifier for {manifest['classes']} classes",
        "",
        f"Distilled by {manifest['made_by']} (ComKD-CLIP, arXiv 2408.04145) on {manifest['data']}.",
        *([f"Top-1 on the test images, in PyTorch: {score:.2f} %.", ""] if score is not None else [""]),
        "    pip install numpy pillow onnxruntime",
        "    python predict.py IMAGE...",
        "",
        "| file | what it is |",
        "|---|---|",
        f"| {CLASSIFIER} | `image` (batch, 3, {preprocessing['size']}, {preprocessing['size']}) float32 -> "
        f"`logits` (batch, {manifest['classes']}) |",
        f"| {ENCODER} | the same input -> `image_features` (batch, {manifest['feature_dim']}), L2-normalised |",
        "| class_vectors.npy | one L2-normalised vector a class; logits = logit_scale * features @ vectors.T |",
        "| classes.txt | class names in the order of the logits |",
        "| manifest.json | pre-processing, logit scale, parity, sha256 and size of every file |",
        "| predict.py | command line and `Classifier`, without torch |",
        "",
        f"The graphs were compared with the PyTorch student on {parity['images']} real images at batch sizes "
        f"{', '.join(map(str, parity['batch_sizes']))}: largest difference of a feature "
        f"{parity['feature_difference_max']:.2e}, least cosine {parity['feature_cosine_min']:.7f}, "
        f"{parity['top1_differing']} answers differ.",
        "",
        f"The classes: {', '.join(record.class_names[:20])}{' ...' if len(record.class_names) > 20 else ''}",
    ]
    return "\n".join(lines) + "\n"
