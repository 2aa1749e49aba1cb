"""A bundle with its reference/, made without torch: that of tests/conftest.py's colours, in two precisions."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from comkd_cli.bundles.reference import ReferenceWriter
from comkd_cli.edge.images import Preprocessing, checked_preprocessing

LOGIT_SCALE = 8.0


def sign(bundle: Path, **fields: Any) -> Path:
    """Write the digests of a bundle's files into its manifest, and change some of its fields."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"] = {
        path.relative_to(bundle).as_posix(): {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in sorted(bundle.rglob("*"))
        if path.is_file() and path.name != "manifest.json"
    }
    (bundle / "manifest.json").write_text(json.dumps({**manifest, **fields}))
    return bundle


def preprocessing_of(bundle: Path) -> Preprocessing:
    """That of its manifest."""
    return checked_preprocessing(json.loads((bundle / "manifest.json").read_text())["preprocessing"])


def add_reference(bundle: Path) -> Path:
    """Add reference/ to the bundle of colours, whose graph stands for fp32 and int8."""
    writer = ReferenceWriter(preprocessing_of(bundle), LOGIT_SCALE, {})
    for precision in ("fp32", "int8"):
        writer.add_precision(precision, bundle / "classifier.onnx", "all")
    writer.write(bundle, ("fp32", "int8"))
    graphs = {"classifier": "classifier.onnx", "image_encoder": "classifier.onnx"}
    np.save(bundle / "class_vectors.npy", np.zeros((3, 2), np.float32))
    return sign(bundle, precisions={"fp32": graphs, "int8": graphs})
