"""What `comkd inspect` prints: rows of a document, with every character that a terminal might interpret escaped."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

MOST_NAMES = 5
MOST_CHARACTERS = 400


def escaped(text: str) -> str:
    """The text with control characters, terminal escapes and invisible characters as Python escapes."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )


def escaped_json(document: Any) -> str:
    """JSON whose lines contain only printable characters; others are escaped as in ASCII JSON."""
    text = json.dumps(document, indent=2, ensure_ascii=False)
    return text if all(line.isprintable() for line in text.split("\n")) else json.dumps(document, indent=2)


def rows(document: Mapping[str, Any]) -> dict[str, str]:
    """Names and values to print, without fields that are empty."""
    found = {name: value for name, value in _rows(document) if value}
    return {escaped(name): escaped(_shortened(value)) for name, value in found.items()}


def _rows(document: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    metadata = document.get("metadata") or {}
    facts = {**document, **metadata}
    kind = f"{document['kind']} ({metadata['kind']})" if "kind" in metadata else document["kind"]
    yield "kind", str(kind)
    yield "format", _text(facts.get("format"))
    yield "size", f"{document['bytes']:,} bytes" if "bytes" in document else ""
    yield "files", _files(document.get("files"))
    yield "reference", _text(_mapping(document.get("files")).get("reference"))
    yield "sha256", document["sha256"]
    for name in ("made_by", "recipe", "seed", "data", "held_out_percent", "student", "teacher", "student_sha256"):
        yield name.replace("_", " "), _text(facts.get(name))
    yield "adapted", _text(facts.get("adapted"))
    yield "trained", _text(facts.get("trained"))
    yield "weights from", _text(facts.get("backbone") or facts.get("origin"))
    yield "classes", _names(facts.get("classes"))
    yield "added classes", _names(facts.get("classes_added"))
    yield "templates", _names(facts.get("templates") or facts.get("template"))
    yield "pre-processing", _text(facts.get("preprocessing"))
    yield "precision", _text(facts.get("precision"))
    for name, entry in _mapping(facts.get("precisions")).items():
        yield f"precision {name}", _precision(entry)
    yield "inputs", _values(document.get("inputs"))
    yield "outputs", _values(document.get("outputs"))
    yield "opset", _text(facts.get("opset") or facts.get("opsets"))
    yield "weights", _weights(document)
    yield "parameters", _parameters(document)
    yield "tokens", _text(document.get("tokens"))
    yield "logit scale", _text(facts.get("logit_scale"))
    yield "temperature", _text(facts.get("temperature") or _mapping(facts.get("calibration")).get("temperature"))
    yield "threshold", _threshold(_mapping(facts.get("threshold")))
    yield "gate", _gate(_mapping(facts.get("images")))
    yield "figures", _text(facts.get("metrics"))
    yield "top-1", _percent(facts.get("test_top1_percent"))
    yield "left out", _text(facts.get("failed"))
    yield "text encoder", _text_encoder(_mapping(facts.get("text")))
    yield "context length", _text(facts.get("context_length"))
    yield "license", _text(facts.get("license"))
    yield "identity", _text(facts.get("identity") or facts.get("key"))


def _text(value: object) -> str:
    """A value of any type as one line; empty for None and for what has no content."""
    if value is None or value == [] or value == {} or value == "":
        return ""
    if isinstance(value, Mapping):
        pairs = ((str(name), _text(part)) for name, part in value.items())
        return ", ".join(f"{name} {part}" for name, part in pairs if part)
    if isinstance(value, list | tuple):
        return " ".join(_text(part) for part in value)
    return f"{value:,.6g}" if isinstance(value, float) else str(value)


def _names(value: object) -> str:
    """`10: cat, dog, ... and 5 more`."""
    if not isinstance(value, list | tuple):
        return _text(value)
    if not value:
        return ""
    more = f" and {len(value) - MOST_NAMES:,} more" if len(value) > MOST_NAMES else ""
    return f"{len(value):,}: {', '.join(map(_text, value[:MOST_NAMES]))}{more}"


def _values(values: Sequence[Mapping[str, Any]] | None) -> str:
    """`image float (batch, 3, 224, 224)` of inputs or outputs."""
    return "; ".join(
        f"{value['name']} {value['type']} ({', '.join(map(str, value['shape']))})" for value in values or ()
    )


def _weights(document: Mapping[str, Any]) -> str:
    if "tensors" in document:
        tensors = document["tensors"]
        return f"{tensors['numbers']:,} numbers in {tensors['count']:,} tensors ({', '.join(tensors['types'])})"
    if "weights" in document:
        return f"{document['weights']:,} numbers ({', '.join(document['weight_types'])}), {document['nodes']:,} nodes"
    return f"{document['parameters']:,} parameters" if "parameters" in document else ""


def _parameters(document: Mapping[str, Any]) -> str:
    """Of a text encoder, beside its teacher's."""
    if "teacher_parameters" not in document:
        return ""
    return f"{document['parameters']:,}, of the teacher's {document['teacher_parameters']:,}"


def _files(files: Mapping[str, Any] | None) -> str:
    if files is None:
        return ""
    faults = [f"{len(files[fault])} {fault}" for fault in ("changed", "missing") if files[fault]]
    return f"{files['count']:,}, {files['bytes']:,} bytes; {', '.join(faults) or 'all as they were exported'}"


def _precision(entry: object) -> str:
    parity = _mapping(_mapping(entry).get("parity"))
    figures = {
        "smallest cosine": _text(parity.get("feature_cosine_min")),
        "top-1 agreement": _percent(parity.get("top1_agreement_percent")),
        "top-1": _percent(parity.get("top1_percent")),
        "images": _text(parity.get("images")),
    }
    return f"{_text(_mapping(entry).get('classifier'))}: {_text(figures)}"


def _percent(value: object) -> str:
    return f"{value:.2f} %" if isinstance(value, int | float) else ""


def _text_encoder(text: Mapping[str, Any]) -> str:
    """The file of each precision, and the parameters. Bundles of earlier versions have only one file."""
    precisions = _mapping(text.get("precisions"))
    files = [f"{_text(_mapping(entry).get('file'))} ({name})" for name, entry in precisions.items()]
    parameters = f"{text['parameters']:,} parameters" if isinstance(text.get("parameters"), int) else ""
    return ", ".join(filter(None, [*(files or [_text(text.get("file"))]), parameters]))


def _threshold(threshold: Mapping[str, Any]) -> str:
    if threshold.get("value") is None:
        return ""
    own = len(_mapping(threshold.get("classes")))
    classes = f"; {own} of the classes have their own" if own else ""
    return f"{_text(threshold.get('score'))} {_text(threshold['value'])}{classes}"


def _gate(images: Mapping[str, Any]) -> str:
    gate = _mapping(images.get("gate"))
    return f"{_text(gate.get('images'))} {_text(gate.get('origin'))} images" if gate else ""


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _shortened(text: str) -> str:
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]} ..."
