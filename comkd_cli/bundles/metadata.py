"""How a graph describes itself in its ONNX metadata, so that a file without its bundle can be used. No torch.

Every key begins with `comkd.`; every value is JSON. onnxruntime returns them as
`session.get_modelmeta().custom_metadata_map`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx

from comkd_cli.edge.images import Preprocessing

PREFIX = "comkd."
GRAPH_FORMAT = "comkd-graph/1"


@dataclass(frozen=True)
class Origin:
    """What all graphs of an export have in common."""

    student_sha256: str
    """Of student.pt."""
    recipe: str
    class_names: Sequence[str]
    templates: Sequence[str]
    """The prompts of a class; `{}` stands for its name."""
    preprocessing: Preprocessing
    logit_scale: float
    temperature: float
    threshold: Mapping[str, Any]
    """`score`, `value` (None without one) and, by class, `classes`."""

    def of_image_graph(self, kind: str, precision: str) -> dict[str, Any]:
        """The metadata of an `image_encoder` or a `classifier`."""
        return {
            **self._common(kind),
            "precision": precision,
            "classes": list(self.class_names),
            "preprocessing": asdict(self.preprocessing),
            "logit_scale": self.logit_scale,
            "temperature": self.temperature,
            "threshold": {name: self.threshold[name] for name in ("score", "value", "classes")},
        }

    def of_text_encoder(self, context_length: int, templates: Sequence[str], precision: str) -> dict[str, Any]:
        """The metadata of a text encoder, which reads `context_length` tokens.

        templates: the prompts of a new class, which may differ from those of the student's own classes.
        """
        return {
            **self._common("text_encoder"),
            "templates": list(templates),
            "precision": precision,
            "context_length": context_length,
        }

    def _common(self, kind: str) -> dict[str, Any]:
        return {
            "format": GRAPH_FORMAT,
            "kind": kind,
            "made_by": f"comkd {version('comkd')}",
            "recipe": self.recipe,
            "student_sha256": self.student_sha256,
            "templates": list(self.templates),
        }


def write_metadata(path: Path, fields: Mapping[str, Any]) -> None:
    """Replace the metadata of a graph by these fields; the same fields produce the same bytes."""
    model = onnx.load(path)
    del model.metadata_props[:]
    for name, value in fields.items():
        entry = model.metadata_props.add()
        # ASCII: protobuf accepts no lone surrogates, which a name from an old checkpoint may have.
        entry.key, entry.value = f"{PREFIX}{name}", json.dumps(value, sort_keys=True)
    onnx.save(model, path)


def metadata_of(model: onnx.ModelProto) -> dict[str, Any]:
    """The metadata that comkd wrote into a graph; empty for graphs of others and of older versions.

    Raises ValueError for a value that is not JSON.
    """
    try:
        return {
            entry.key.removeprefix(PREFIX): json.loads(entry.value)
            for entry in model.metadata_props
            if isinstance(entry.key, str) and entry.key.startswith(PREFIX)  # protobuf gives bytes for what is not UTF-8
        }
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
