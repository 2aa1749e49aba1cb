"""Checkpoints as PromptSRC writes them, also hostile ones."""

import collections
import pickle
import re
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch

from comkd_cli.errors import CheckpointError, ModelError
from comkd_cli.events import Event, Notice
from comkd_cli.models.backbones import build_clip
from comkd_cli.recipe.model import Model, Teacher
from comkd_cli.teachers.loading import build_teacher
from comkd_cli.teachers.prompted import released_prompted
from comkd_cli.teachers.promptsrc_checkpoint import read_released
from tests.method.test_prompt_src import text_by_hand, unit
from tests.method.test_prompts import prompted_by_hand

CONFIG = {
    "embed_dim": 16,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "head_width": 16, "layers": 3},
    "text_cfg": {"context_length": 12, "width": 16, "heads": 2, "layers": 3},
}
NAMES = ("cat", "red panda")
LEARNED_NAMES = ("owl", "yak", "ant")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CLIP that prompts were learned on."""
    path = tmp_path_factory.mktemp("base") / "clip.pt"
    torch.save(build_clip(Model(config=CONFIG), seed=5).model.state_dict(), path)
    return path


def released_state(base: Path, depth: int, tokens: int = 4) -> dict[str, torch.Tensor]:
    """The names that PromptSRC's CustomCLIP has, in half precision as its checkpoints are."""
    generator = torch.Generator().manual_seed(depth)
    state = {}
    held = torch.load(base, weights_only=True)
    for name, value in held.items():
        if name.startswith("visual."):
            state[name.replace("visual.", "image_encoder.", 1)] = value
            state[name.replace("visual.", "prompt_learner.ZS_image_encoder.", 1)] = value + 1
        elif name == "logit_scale":
            state[name] = value
        elif name != "token_embedding.weight":
            state[f"text_encoder.{name}"] = value
    state["prompt_learner.ctx"] = torch.randn(tokens, 16, generator=generator)
    state["image_encoder.VPT"] = torch.randn(tokens, 32, generator=generator)
    for layer in range(1, depth):
        for tower, width in (("image", 32), ("text", 16)):
            name = f"{tower}_encoder.transformer.resblocks.{layer}.VPT_shallow"
            state[name] = torch.randn(tokens, width, generator=generator)
    # As PromptSRC keeps them: the embeddings of the class prompts, without the places of the learned tokens.
    words = open_clip.SimpleTokenizer(context_length=12)([f"{'X ' * tokens}{name}." for name in LEARNED_NAMES])
    embedded = held["token_embedding.weight"][words]
    state["prompt_learner.token_prefix"] = embedded[:, :1]
    state["prompt_learner.token_suffix"] = embedded[:, 1 + tokens :]
    return {name: value.half() for name, value in state.items()}


class Scheduler:
    """Stands for dassl's, which is not installed where the file is read."""

    def __init__(self) -> None:
        self.base_lrs = [0.005]
        self.successor = collections.OrderedDict(T_max=20)
        self.groups = collections.defaultdict(dict)


def write(path: Path, state: dict[str, Any], scheduler: object = None, **options: Any) -> Path:
    torch.save(
        {"state_dict": state, "epoch": 20, "optimizer": {}, "scheduler": scheduler, "val_result": 81.5}, path, **options
    )
    return path


@pytest.fixture
def vanished(monkeypatch: pytest.MonkeyPatch) -> object:
    """An object whose class can't be imported when the file is read."""
    module = types.ModuleType("dassl_like")
    monkeypatch.setattr(Scheduler, "__module__", "dassl_like")
    monkeypatch.setitem(sys.modules, "dassl_like", module)
    module.Scheduler = Scheduler  # type: ignore[attr-defined]
    return Scheduler()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_logits_of_a_released_teacher_at_any_depth(base: Path, tmp_path: Path, depth: int, zipped: bool) -> None:
    state = released_state(base, depth)
    path = write(tmp_path / "model-best.pth.tar", state, _use_new_zipfile_serialization=zipped)
    settings = Teacher(config=CONFIG, weights=str(path), format="promptsrc", backbone_weights=str(base))
    images = torch.randn(4, 3, 16, 16)
    answered = build_teacher(settings, NAMES, "not this {}", torch.device("cpu")).teacher(images)
    clip = build_clip(Model(config=CONFIG))
    held = torch.load(base, weights_only=True)
    clip.model.load_state_dict({name: value.half().float() for name, value in held.items()})
    clip.model.token_embedding.weight = torch.nn.Parameter(held["token_embedding.weight"])

    def layers(first: str, tower: str) -> torch.Tensor:
        deep = [state[f"{tower}.transformer.resblocks.{i}.VPT_shallow"] for i in range(1, depth)]
        return torch.stack([state[first], *deep]).float()

    with torch.no_grad():
        features = unit(prompted_by_hand(clip.model.visual, layers("image_encoder.VPT", "image_encoder"), images))
        tokens = clip.tokenize([f"a photo of a {name}." for name in NAMES])
        vectors = unit(text_by_hand(clip.model, layers("prompt_learner.ctx", "text_encoder"), tokens))
        logits = clip.model.logit_scale.exp() * features @ vectors.T
    torch.testing.assert_close(answered.logits, logits, atol=1e-4, rtol=0)


def answers_of(base: Path, path: Path, images: torch.Tensor, **changes: Any) -> torch.Tensor:
    """The logits of a released teacher."""
    chosen = settings(base, path, **changes)
    return build_teacher(chosen, NAMES, "not this {}", torch.device("cpu")).teacher(images).logits


def test_names_as_data_parallel_writes_them_are_read(base: Path, tmp_path: Path) -> None:
    state = released_state(base, 2)
    images = torch.randn(3, 3, 16, 16)
    plain = answers_of(base, write(tmp_path / "plain.pt", state), images)
    wrapped = write(tmp_path / "wrapped.pt", {f"module.{name}": value for name, value in state.items()})
    assert torch.equal(answers_of(base, wrapped, images), plain)


def test_a_training_checkpoint_with_numbers_of_numpy_is_read(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    numbers = {"val_result": np.float64(81.5), "epoch": np.int64(20), "seeds": np.arange(3)}
    torch.save({"state_dict": released_state(base, 2), **numbers}, path)
    assert read_released(path).text_tokens.shape == (2, 4, 16)


def test_a_teacher_without_prompts_in_its_image_encoder_has_the_image_features_of_clip(
    base: Path, tmp_path: Path
) -> None:
    """PromptSRC's wrapper with PROMPT_DEPTH_VISION: 0."""
    state = {name: value for name, value in released_state(base, 2).items() if not name.startswith("image_encoder")}
    held = torch.load(base, weights_only=True)
    state |= {n.replace("visual.", "image_encoder.", 1): v for n, v in held.items() if n.startswith("visual.")}
    path = write(tmp_path / "text.pt", state)
    assert read_released(path).vision_tokens.shape == (1, 0, 32)
    images = torch.randn(3, 3, 16, 16)
    ready = build_teacher(settings(base, path), NAMES, "not this {}", torch.device("cpu"))
    with torch.no_grad():
        own = build_clip(Model(config=CONFIG, weights=str(base))).model.encode_image(images)  # type: ignore[operator]
    torch.testing.assert_close(ready.teacher.encode(images), unit(own), atol=1e-6, rtol=0)


@pytest.fixture
def with_words(base: Path, tmp_path: Path) -> Path:
    """A teacher whose 4 learned tokens replace `this is a blurred` of CTX_INIT `this is a blurred photo`."""
    state = released_state(base, 1)
    held = torch.load(base, weights_only=True)
    texts = [f"this is a blurred photo {name}." for name in LEARNED_NAMES]
    words = open_clip.SimpleTokenizer(context_length=12)(texts)
    state["prompt_learner.token_suffix"] = held["token_embedding.weight"][words][:, 5:].half()
    return write(tmp_path / "words.pt", state)


@pytest.mark.slow
def test_words_of_the_context_beyond_the_learned_tokens_stay_in_the_class_prompts(base: Path, with_words: Path) -> None:
    images = torch.randn(3, 3, 16, 16)
    logits = answers_of(base, with_words, images, context="this_is_a_blurred_photo")
    clip = build_clip(Model(config=CONFIG, weights=str(base)))
    state = torch.load(with_words, weights_only=True)["state_dict"]
    with torch.no_grad():
        tokens = clip.tokenize([f"this is a blurred photo {name}." for name in NAMES])
        vectors = unit(text_by_hand(clip.model, state["prompt_learner.ctx"].float()[None], tokens))
        prompts = state["image_encoder.VPT"].float()[None]
        features = unit(prompted_by_hand(clip.model.visual, prompts, images))
        expected = clip.model.logit_scale.exp() * features @ vectors.T  # type: ignore[operator]
    torch.testing.assert_close(logits, expected, atol=0.05, rtol=0)  # the file is in half precision
    assert float((answers_of(base, with_words, images) - expected).abs().max()) > 0.05


def test_another_context_than_the_files_is_refused_and_a_missing_one_is_a_notice(base: Path, with_words: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        released_prompted(settings(base, with_words, context="this is a blurred drawing"))
    assert (caught.value.path, caught.value.field) == (with_words, "teacher.context")
    events: list[Event] = []
    released_prompted(settings(base, with_words), events.append)
    (notice,) = events
    assert isinstance(notice, Notice)
    assert "teacher.context" in notice.text


def test_objects_of_unknown_classes_are_left_alone(base: Path, tmp_path: Path, vanished: object) -> None:
    path = write(tmp_path / "model-best.pth.tar", released_state(base, 2), vanished)
    del sys.modules["dassl_like"]
    assert read_released(path).text_tokens.shape == (2, 4, 16)


class Hostile:
    def __init__(self, call: object, *arguments: object) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.call, self.arguments


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["scheduler", "state_dict"])
def test_a_file_that_would_run_something_is_refused_and_runs_nothing(
    base: Path, tmp_path: Path, place: str, zipped: bool
) -> None:
    proof = tmp_path / "ran"
    hostile = Hostile(exec, f"open({str(proof)!r}, 'w')")
    state: dict[str, Any] = released_state(base, 1)
    if place == "state_dict":
        state["image_encoder.VPT"] = hostile
    path = write(tmp_path / "bad.pth.tar", state, hostile, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"bad\.pth\.tar: is refused: it calls .*exec"):
        read_released(path)
    assert not proof.exists()


def opcodes(proof: Path) -> dict[str, bytes]:
    """Pickles that call by other means than REDUCE."""
    argument = f"open({str(proof)!r}, 'w')".encode()
    text = b"X" + len(argument).to_bytes(4, "little") + argument
    return {
        "INST": b"(" + text + b"ibuiltins\nexec\n.",
        "OBJ": b"(cbuiltins\nexec\n" + text + b"o.",
        "NEWOBJ": b"\x80\x02cbuiltins\nexec\n" + text + b"\x85\x81.",
        "BUILD": b"\x80\x02ctorch._utils\n_rebuild_parameter\n}b.",
    }


@pytest.mark.parametrize("kind", ["INST", "OBJ", "NEWOBJ", "BUILD"])
def test_no_opcode_runs_anything(base: Path, tmp_path: Path, kind: str) -> None:
    proof = tmp_path / "ran"
    good = write(tmp_path / "good.pt", released_state(base, 1))
    bad = tmp_path / "bad.pt"
    with zipfile.ZipFile(good) as source, zipfile.ZipFile(bad, "w") as target:
        for name in source.namelist():
            target.writestr(name, opcodes(proof)[kind] if name.endswith("data.pkl") else source.read(name))
    with pytest.raises(CheckpointError) as caught:
        read_released(bad)
    assert caught.value.path == bad
    assert not proof.exists()


def test_a_torchscript_program_is_refused(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(tmp_path / "program.pt"))
    with pytest.raises(CheckpointError, match="TorchScript"):
        read_released(tmp_path / "program.pt")


def test_a_program_whose_archive_looks_damaged_to_python_is_refused_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(tmp_path / "program.pt"))
    with (tmp_path / "program.pt").open("ab") as file:
        file.write(b"PK\x05\x06")
    assert not zipfile.is_zipfile(tmp_path / "program.pt")
    monkeypatch.setattr(torch.jit, "load", lambda *a, **k: pytest.fail("the program was loaded"))
    with pytest.raises(CheckpointError, match=r"program\.pt: is refused: it is a TorchScript program"):
        read_released(tmp_path / "program.pt")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_encoder.VPT": torch.zeros(4)}, "image_encoder.VPT has"),
        ({"prompt_learner.ctx": torch.zeros(10, 4, 16)}, "prompt_learner.ctx has"),
        ({"prompt_learner.ctx": torch.full((4, 16), torch.nan)}, "prompt_learner.ctx has"),
    ],
)
def test_prompts_of_the_wrong_shape_or_values_are_refused(
    base: Path, tmp_path: Path, changes: dict[str, torch.Tensor], message: str
) -> None:
    path = write(tmp_path / "odd.pt", released_state(base, 1) | changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_released(path)
    assert caught.value.path == path
    assert caught.value.found == tuple(next(iter(changes.values())).shape)


def test_prompts_deeper_than_the_architecture_are_refused(base: Path, tmp_path: Path) -> None:
    state = released_state(base, 3)
    state["image_encoder.transformer.resblocks.3.VPT_shallow"] = torch.zeros(4, 32).half()
    path = write(tmp_path / "deep.pt", state)
    with pytest.raises(CheckpointError, match=r"its prompts \(4 layers in the image encoder, 3 in the text") as caught:
        released_prompted(settings(base, path))
    assert caught.value.path == path
    assert "teacher.arch" in str(caught.value.remedy)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weights": {}}, "no `state_dict`"),
        ({"state_dict": {"image_encoder.proj": torch.zeros(2, 2)}}, "no prompt_learner.ctx"),
        ({"state_dict": {"prompt_learner.ctx": torch.zeros(4, 16)}}, "no vision transformer as image encoder"),
        ([1, 2], "no `state_dict`"),
    ],
)
def test_another_file_is_refused(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=message):
        read_released(tmp_path / "other.pt")
    (tmp_path / "other.pt").write_bytes(pickle.dumps(content)[:10])
    with pytest.raises(CheckpointError) as caught:
        read_released(tmp_path / "other.pt")
    assert caught.value.path == tmp_path / "other.pt"


def test_a_gap_between_prompted_layers_is_refused(base: Path, tmp_path: Path) -> None:
    state = released_state(base, 3)
    del state["text_encoder.transformer.resblocks.1.VPT_shallow"]
    with pytest.raises(CheckpointError) as caught:
        read_released(write(tmp_path / "gap.pt", state))
    assert caught.value.found == "layers 0, 2"


def settings(base: Path, path: Path, **changes: Any) -> Teacher:
    fields = {"config": CONFIG, "weights": str(path), "format": "promptsrc", "backbone_weights": str(base)}
    return Teacher(**{**fields, **changes})


@pytest.mark.slow
def test_a_checkpoint_that_does_not_fit_the_recipe_is_refused(base: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "model.pt", released_state(base, 2))
    with pytest.raises(ModelError) as caught:
        released_prompted(settings(base, path, backbone_weights=None))
    assert (caught.value.path, caught.value.field) == (path, "teacher.backbone_weights")
    with pytest.raises(ModelError, match="QuickGELU") as caught:
        released_prompted(settings(base, path, config={**CONFIG, "quick_gelu": False}))
    assert caught.value.field == "teacher.config"
    wide = {**CONFIG["vision_cfg"], "width": 48}  # type: ignore[dict-item]
    wide_base = tmp_path / "wide.pt"
    torch.save(build_clip(Model(config={**CONFIG, "vision_cfg": wide})).model.state_dict(), wide_base)
    with pytest.raises(ModelError, match="does not hold weights"):
        released_prompted(settings(wide_base, path, config={**CONFIG, "vision_cfg": wide}))


def test_a_table_of_word_embeddings_in_the_file_is_used(base: Path, tmp_path: Path) -> None:
    state = released_state(base, 2)
    state["text_encoder.token_embedding.weight"] = torch.load(base, weights_only=True)["token_embedding.weight"]
    path = write(tmp_path / "model.pt", state)
    alone = released_prompted(settings(base, path, backbone_weights=None)).clip.model
    assert torch.equal(alone.token_embedding.weight, state["text_encoder.token_embedding.weight"])


@pytest.mark.slow
def test_the_word_embeddings_of_another_clip_are_refused(base: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "model.pt", released_state(base, 2))
    other = tmp_path / "other.pt"
    torch.save(build_clip(Model(config=CONFIG), seed=6).model.state_dict(), other)
    with pytest.raises(ModelError, match=re.escape(str(other))) as caught:
        released_prompted(settings(other, path))
    assert caught.value.path == path
    assert "token_prefix differs by" in str(caught.value.found)
    assert "teacher.backbone_weights" in str(caught.value.remedy)
    held = torch.load(base, weights_only=True)
    table = held["token_embedding.weight"]
    start = open_clip.SimpleTokenizer().sot_token_id
    changed = torch.randn(table.shape, generator=torch.Generator().manual_seed(1)) * 0.02
    changed[start] = table[start]  # so that the words alone differ
    torch.save({**held, "token_embedding.weight": changed}, other)
    with pytest.raises(ModelError) as caught:
        released_prompted(settings(other, path))
    assert "token_suffix differs by" in str(caught.value.found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_right_word_embeddings_pass_in_any_precision(base: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    start = torch.load(base, weights_only=True)["token_embedding.weight"][-2]
    state = {**released_state(base, 2), "prompt_learner.token_prefix": start.to(dtype)[None, None]}
    events: list[Event] = []
    released_prompted(settings(base, write(tmp_path / "model.pt", state)), events.append)
    assert events == []


def test_a_file_without_embeddings_is_used_with_a_notice(base: Path, tmp_path: Path) -> None:
    state = {name: value for name, value in released_state(base, 2).items() if "prompt_learner.token_" not in name}
    path = write(tmp_path / "model.pt", state)
    events: list[Event] = []
    released_prompted(settings(base, path), events.append)
    (notice,) = events
    assert isinstance(notice, Notice)
    assert re.search(rf"model\.pt: has no prompt_learner\.token_prefix.*{re.escape(str(base))}", notice.text)


def test_a_table_in_the_file_must_be_the_one_of_its_prompts(base: Path, tmp_path: Path) -> None:
    state = released_state(base, 2)
    state["text_encoder.token_embedding.weight"] = torch.randn(49408, 16)
    path = write(tmp_path / "model.pt", state)
    with pytest.raises(ModelError, match="its own table") as caught:
        released_prompted(settings(base, path, backbone_weights=None))
    assert caught.value.path == path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_learner.token_prefix": torch.zeros(7, 16)}, r"token_prefix has .*\(7, 16\)"),
        ({"prompt_learner.token_suffix": torch.full((1, 2, 16), torch.nan)}, "NaN or infinite .*token_suffix"),
        ({"image_encoder.proj": torch.full((32, 16), torch.inf)}, "NaN or infinite .*image_encoder.proj"),
        ({"logit_scale": torch.tensor(torch.nan)}, "NaN or infinite .*logit_scale"),
    ],
)
def test_tensors_that_are_not_finite_are_refused(
    base: Path, tmp_path: Path, changes: dict[str, torch.Tensor], message: str
) -> None:
    path = write(tmp_path / "odd.pt", released_state(base, 1) | changes)
    with pytest.raises(CheckpointError, match=rf"odd\.pt: .*{message}"):
        read_released(path)


def test_embeddings_of_another_width_are_refused(base: Path, tmp_path: Path) -> None:
    state = {**released_state(base, 1), "prompt_learner.token_prefix": torch.zeros(7, 1, 24)}
    with pytest.raises(ModelError, match="token_prefix has width 24, but the table has width 16"):
        released_prompted(settings(base, write(tmp_path / "model.pt", state)))


def test_prompts_that_state_more_than_they_store_are_refused_before_they_are_stacked(tmp_path: Path) -> None:
    state = {"image_encoder.VPT": torch.zeros(1).expand(10**6, 10**6)}
    torch.save({"state_dict": state}, tmp_path / "model.pth.tar")
    with pytest.raises(CheckpointError, match=r"image_encoder\.VPT states the shape"):
        read_released(tmp_path / "model.pth.tar")
