"""Hostile checkpoints: student.pt, teacher.pt, PromptSRC's files and plain weights, and pickles that would run code."""

from __future__ import annotations

import io
import pickle
import random
import struct
import zipfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.hostile import mutations
from comkd_cli.flows.inspect.checkpoints import inspect_checkpoint
from comkd_cli.method.student import Student
from comkd_cli.models.backbones import build_clip, build_image_tower
from comkd_cli.models.checkpoints import (
    SavedTeacher,
    StudentRecord,
    TeacherRecord,
    load_student,
    load_student_record,
    load_teacher,
    save_student,
    save_teacher,
    saved_format,
)
from comkd_cli.models.weights import read_weights
from comkd_cli.recipe import parse_recipe
from comkd_cli.teachers.promptsrc_checkpoint import read_released

NAMES = ("red fox", "hare", "owl")
VISION = {"image_size": 16, "patch_size": 8, "width": 16, "head_width": 16, "layers": 1}
CLIP = {
    "embed_dim": 16,
    "vision_cfg": VISION,
    "text_cfg": {"context_length": 10, "width": 16, "heads": 2, "layers": 1},
}
RECIPE = {
    "data": {"dataset": "digits"},
    "teacher": {"config": CLIP, "adapt": {"method": "full", "epochs": 1}},
    "student": {"train": "full", "config": {"embed_dim": 12, "vision_cfg": VISION}},
}


class _Payload:
    """Pickled, it is a call of a function, which an unpickler without limits makes."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self._call, self._arguments = call, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self._call, self._arguments


def _payloads() -> list[object]:
    import os
    import subprocess

    return [
        _Payload(os.system, "touch CANARY"),
        _Payload(exec, "open('CANARY', 'w')"),
        _Payload(eval, "open('CANARY', 'w')"),
        _Payload(open, "CANARY", "w"),
        _Payload(subprocess.Popen, ["touch", "CANARY"]),
        _Payload(Path.touch, Path("CANARY")),
        _Payload(torch.save, 1, "CANARY"),
        _Payload(getattr, "CANARY", "lower"),
        _Payload(__import__, "antigravity"),
    ]


@cache
def wholes() -> dict[str, dict[str, Any]]:
    """The content of a valid file of each kind."""
    found = {}
    buffers = {"student": _saved_student(), "teacher": _saved_teacher()}
    for name, buffer in buffers.items():
        found[name] = torch.load(io.BytesIO(buffer), weights_only=True)
    clip = _small_state(build_clip(parse_recipe(RECIPE).teacher).model.state_dict())
    state = {f"image_encoder.{n.removeprefix('visual.')}": v for n, v in clip.items() if n.startswith("visual.")}
    state |= {f"text_encoder.{n}": v for n, v in clip.items() if not n.startswith("visual.")}
    state |= {"image_encoder.VPT": torch.zeros(4, 16), "prompt_learner.ctx": torch.zeros(4, 16)}
    found["promptsrc"] = {"state_dict": state, "epoch": 1, "val_result": 0.5}
    found["weights"] = dict(clip)
    return found


def _saved_student() -> bytes:
    recipe = parse_recipe(RECIPE)
    tower = build_image_tower(recipe.student)
    vectors = torch.nn.functional.normalize(torch.ones(3, 16) + torch.eye(3, 16), dim=-1)
    student = Student(tower.module, tower.width, vectors, torch.tensor(10.0), recipe.student, recipe.loss.edu_attention)
    record = StudentRecord(
        recipe=recipe,
        recipe_name="hostile",
        source="digits",
        class_names=NAMES,
        template="a photo of a {}.",
        preprocessing=tower.preprocessing,
        backbone=tower.origin,
        backbone_sha256=None,
        teacher=None,
        identity="0",
        metrics={"loss": 1.0},
    )
    return _through_file(lambda path: save_student(path, student, record))


def _saved_teacher() -> bytes:
    clip = build_clip(parse_recipe(RECIPE).teacher)
    record = TeacherRecord(
        "0", {"config": CLIP}, NAMES, "a photo of a {}.", clip.preprocessing, clip.origin, {"loss": 1.0}
    )
    saved = SavedTeacher(record, torch.eye(3, 16), torch.tensor(10.0), _small_state(clip.model.state_dict()))
    return _through_file(lambda path: save_teacher(path, saved))


def _small_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A CLIP's tensors without most of its vocabulary, which is 95 % of such a small one."""
    return {name: value[:64].clone() if name == "token_embedding.weight" else value for name, value in state.items()}


def _through_file(write: Any) -> bytes:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "whole.pt")
        write(path)
        return path.read_bytes()


@dataclass(frozen=True)
class _Make:
    """Makes the bytes of a hostile file from a valid content."""

    rng: random.Random
    content: dict[str, Any]

    def bytes(self) -> bytes:
        kinds = (
            self._whole,
            self._damaged,
            self._changed,
            self._changed,
            self._payload,
            self._raw_payload,
            self._tensors,
            self._large,
            self._zip,
        )
        return self.rng.choice(kinds)()

    def _whole(self) -> bytes:
        return _saved(self.rng, self.content)

    def _damaged(self) -> bytes:
        return mutations.damaged(self.rng, _saved(self.rng, self.content))

    def _changed(self) -> bytes:
        return _saved(self.rng, mutations.changed(self.rng, self.content, times=3))

    def _large(self) -> bytes:
        """A file whose model is described as far larger, or smaller, than it is."""
        found = mutations.copy.deepcopy(self.content)
        model = found["recipe"]["student"] if "recipe" in found else found.get("model", {})
        vision = model.get("config", {}).get("vision_cfg", {})
        name = self.rng.choice(("layers", "width", "image_size", "patch_size", "head_width", "mlp_ratio"))
        vision[name] = self.rng.choice((0, -1, 1, 7, 10**3, 10**5, 10**6, 2**31, 10**30))
        return _saved(self.rng, found)

    def _payload(self) -> bytes:
        """A valid file with a call in one of its fields."""
        name = self.rng.choice((*self.content, "more"))
        return _saved(self.rng, {**self.content, name: self.rng.choice(_payloads())})

    def _raw_payload(self) -> bytes:
        """A bare pickle, in any protocol, of any length."""
        held = self.rng.choice((self.rng.choice(_payloads()), [self.rng.choice(_payloads())], {"state_dict": 1}))
        return pickle.dumps(held, protocol=self.rng.randrange(6)) + bytes(self.rng.choice((0, 1, 4096)))

    def _tensors(self) -> bytes:
        """Tensors of other shapes, types and layouts, and views that are far larger than what they are views of."""
        options = (
            torch.zeros(1).expand(3, 10**9),
            torch.zeros(1).expand(10**6, 10**6),
            torch.zeros(0),
            torch.zeros(3, 0),
            torch.zeros(()),
            torch.zeros(3, 16, dtype=torch.complex64),
            torch.zeros(3, 16, dtype=torch.int8),
            torch.zeros(3, 16, dtype=torch.float8_e4m3fn),
            torch.zeros(3, 16).to_sparse(),
            torch.empty(3, 16, device="meta"),
            torch.full((3, 16), float("nan")),
            torch.full((3, 16), 1e38),
            torch.quantize_per_tensor(torch.zeros(3, 16), 0.1, 0, torch.qint8),
            torch.nn.Parameter(torch.zeros(3, 16)),
            {"a": torch.zeros(2)},
        )
        places = _tensor_places(self.content)
        found = mutations.copy.deepcopy(self.content)
        for _ in range(self.rng.randrange(1, 3)):
            holder: Any = found
            *above, name = self.rng.choice(places)
            for key in above:
                holder = holder[key]
            holder[name] = self.rng.choice(options)
        return _saved(self.rng, found)

    def _zip(self) -> bytes:
        """The archive written again: compressed, with other records, records outside of it, or far larger ones."""
        source = zipfile.ZipFile(io.BytesIO(_saved(self.rng, self.content, zipped=True)))
        target = io.BytesIO()
        with zipfile.ZipFile(target, "w", self.rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
            for member in source.infolist():
                if self.rng.random() < 0.1:
                    continue
                held = source.read(member)
                if self.rng.random() < 0.1:
                    held = self.rng.choice((b"", bytes(10**7), mutations.damaged(self.rng, held)))
                name = f"../../{member.filename}" if self.rng.random() < 0.05 else member.filename
                archive.writestr(name, held)
            if self.rng.random() < 0.1:
                archive.writestr("whole/constants.pkl", pickle.dumps(self.rng.choice(_payloads())))
        return target.getvalue()


def _tensor_places(content: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = []
    for key, held in content.items():
        if isinstance(held, Tensor):
            found.append((*above, key))
        elif isinstance(held, dict):
            found += _tensor_places(held, (*above, key))
    return found


def _saved(rng: random.Random, content: object, zipped: bool | None = None) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=rng.random() < 0.7 if zipped is None else zipped)
    return buffer.getvalue()


def student(rng: random.Random, folder: Path) -> None:
    """student.pt, which is recognised, read, inspected and built."""
    path = folder / "student.pt"
    path.write_bytes(_Make(rng, wholes()["student"]).bytes())
    saved_format(path)
    load_student_record(path)
    load_student(path)
    inspect_checkpoint(path)


def teacher(rng: random.Random, folder: Path) -> None:
    """teacher.pt."""
    path = folder / "teacher.pt"
    path.write_bytes(_Make(rng, wholes()["teacher"]).bytes())
    load_teacher(path)


def promptsrc(rng: random.Random, folder: Path) -> None:
    """A file that PromptSRC or PromptKD published."""
    path = folder / "model.pth.tar-20"
    path.write_bytes(_Make(rng, wholes()["promptsrc"]).bytes())
    read_released(path)


def weights(rng: random.Random, folder: Path) -> None:
    """A file of weights: torch's, or safetensors."""
    if rng.random() < 0.6:
        path = folder / "weights.pt"
        path.write_bytes(_Make(rng, wholes()["weights"]).bytes())
    else:
        path = folder / "weights.safetensors"
        path.write_bytes(_safetensors(rng))
    read_weights(path)


def _safetensors(rng: random.Random) -> bytes:
    import json

    header: Any = {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}
    if rng.random() < 0.7:
        header = mutations.changed(rng, header)
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    length = rng.choice((len(text), len(text), len(text), 2**63, 0, 10**9))
    content = struct.pack("<Q", length) + text + bytes(24)
    return mutations.damaged(rng, content) if rng.random() < 0.4 else content
