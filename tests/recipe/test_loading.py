import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from comkd_cli.errors import MisuseError, RecipeError
from comkd_cli.recipe import (
    Recipe,
    bundled_recipes,
    check_recipes,
    find_recipe,
    load_recipe,
    parse_recipe,
    read_yaml,
    to_yaml,
)
from comkd_cli.recipe.loading import parse_data

RECIPES = Path(__file__).parents[2] / "recipes"
MINIMAL = """
data: {dataset: digits}
teacher: {arch: A, weights: w}
student: {arch: B, weights: w}
"""

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a recipe, the least that is valid below its text unless it extends another, and return its path."""

    def write_recipe(text: str = "", name: str = "recipe.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text if "extends:" in text else text + MINIMAL, encoding="utf-8")
        return path

    return write_recipe


# --- bundled recipes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
class TestEveryBundledRecipe:
    def test_loads_and_says_what_it_is_about_in_one_line(self, path: Path) -> None:
        about = load_recipe(path).about
        assert about.strip()
        assert "\n" not in about

    def test_reads_back_from_its_yaml_as_the_same_recipe(self, path: Path) -> None:
        recipe = load_recipe(path)
        assert parse_recipe(read_yaml(to_yaml(recipe), "again")) == recipe

    def test_is_found_by_its_name_alone(self, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        for name in (path.stem, path.name, f"recipes/{path.name}"):
            assert find_recipe(name).samefile(path)


def test_the_folder_is_the_list_of_bundled_recipes() -> None:
    assert list(bundled_recipes()) == sorted(path.stem for path in RECIPES.iterdir() if path.suffix == ".yaml")
    assert "digits" in bundled_recipes()


def test_a_file_comes_before_a_bundled_recipe_of_its_name(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write("about: mine", "digits.yaml")
    assert load_recipe("digits.yaml").about == "mine"
    assert load_recipe("digits").about != "mine"


@pytest.mark.parametrize("name", ["nosuch", "nosuch.yaml", "other/digits.yaml", "digits.txt", "."])
def test_an_unknown_recipe_is_answered_with_the_bundled_ones(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError) as caught:
        find_recipe(name)
    assert str(caught.value).startswith(f"{name}: no such recipe")
    for bundled in bundled_recipes():
        assert bundled in str(caught.value)


# --- extends -------------------------------------------------------------------------------------------


def test_a_chain_is_merged_field_by_field_with_the_nearest_file_winning(write: Write) -> None:
    write("seed: 1\nabout: far\naugment: {min_scale: 0.5, flip: false}\nevaluate_every_epochs: 3", "far.yaml")
    write("extends: far.yaml\nseed: 2\nabout: middle\naugment: {min_scale: 0.25}", "middle.yaml")
    recipe = load_recipe(write("extends: middle.yaml\nabout: near\nloss: {if_align: {weight: 0.5}}", "near.yaml"))
    assert (recipe.about, recipe.seed, recipe.evaluate_every_epochs) == ("near", 2, 3)
    assert (recipe.augment.min_scale, recipe.augment.flip) == (0.25, False)
    assert recipe.loss.if_align is not None
    assert recipe.loss.if_align.weight == 0.5


def test_a_base_is_looked_for_beside_the_file_that_names_it(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("about: shared", "common/base.yaml")
    write("extends: ../common/base.yaml\nseed: 5", "mine/middle.yaml")
    near = write("extends: mine/middle.yaml", "near.yaml")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    recipe = load_recipe(near)
    assert (recipe.about, recipe.seed) == ("shared", 5)


def test_a_bundled_recipe_can_be_extended_by_name(write: Write) -> None:
    recipe = load_recipe(write("extends: digits\nseed: 9"))
    assert recipe == load_recipe("digits", ["seed=9"])
    assert recipe != load_recipe("digits")


def test_lists_are_replaced_whole(write: Write) -> None:
    write("extends: digits\ndata: {folder: x, classes: [a, b, c]}", "base.yaml")
    assert load_recipe(write("extends: base.yaml\ndata: {classes: [d, e]}")).data.classes == ("d", "e")


def test_null_switches_a_part_off_and_a_later_file_switches_it_on_again(write: Write) -> None:
    write("loss: {if_align: {weight: 0.25}}", "base.yaml")
    off = write("extends: base.yaml\nloss: {if_align: null}", "off.yaml")
    assert load_recipe(off).loss.if_align is None
    again = load_recipe(write("extends: off.yaml\nloss: {if_align: {}}", "again.yaml")).loss.if_align
    assert again is not None
    assert again.weight == 1.0  # the default: what was said before it was switched off is gone


@pytest.mark.parametrize("spelling", ["first.yaml", "./first.yaml", "folder/../first.yaml", "link.yaml"])
def test_a_circle_is_named_file_by_file(write: Write, tmp_path: Path, spelling: str) -> None:
    first = write("extends: second.yaml", "first.yaml")
    write(f"extends: {spelling}", "second.yaml")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link.yaml").symlink_to(first)
    with pytest.raises(RecipeError, match=r"is circular: first\.yaml -> second\.yaml -> first\.yaml"):
        load_recipe(first)


def test_a_recipe_that_extends_itself_is_a_circle(write: Write) -> None:
    with pytest.raises(RecipeError, match="is circular"):
        load_recipe(write("extends: recipe.yaml"))


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("nosuch.yaml", "no such recipe: nosuch.yaml (allowed: "),
        ("[a, b]", "should be the path of one recipe"),
        ("3", "3"),
    ],
)
def test_a_base_that_is_not_there_is_told_with_the_file_that_names_it(write: Write, base: str, message: str) -> None:
    path = write(f"extends: {base}")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(f"{path}: extends:")
    assert message in str(caught.value)


# --- what one kind says does not leak into another -----------------------------------------------------

FOLDER = "data: {folder: x, classes: [a, b], template: 'the {}', workers: 3}\n"
CONFIG = "config: {embed_dim: 1, vision_cfg: {}, text_cfg: {}}"


@pytest.mark.parametrize(
    ("base", "over", "expected"),
    [
        (FOLDER, "data: {dataset: digits}", {"data": {"dataset": "digits", "workers": 3}}),
        (FOLDER, "data: {folder: y}", {"data": {"folder": "y", "workers": 3}}),
        (FOLDER, "data: {folder: y, classes: [c, d]}", {"data": {"folder": "y", "workers": 3, "classes": ("c", "d")}}),
        (
            FOLDER,
            "data: {folder: x, workers: 4}",
            {"data": {"folder": "x", "classes": ("a", "b"), "template": "the {}", "workers": 4}},
        ),
        ("data: {dataset: digits, template: 'the {}'}\n", "data: {folder: y}", {"data": {"folder": "y"}}),
        (
            "data: {dataset: digits, templates: openai, prompts: p.yaml}\n",
            "data: {template: 'the {}'}",
            {"data": {"dataset": "digits", "prompts": "p.yaml", "template": "the {}"}},
        ),
        (
            "data: {dataset: digits, template: 'the {}'}\n",
            "data: {templates: openai}",
            {"data": {"dataset": "digits", "templates": "openai"}},
        ),
        (
            "data: {dataset: digits, templates: openai, prompts: p.yaml}\n",
            "data: {folder: y}",
            {"data": {"folder": "y"}},
        ),
        (
            "teacher: {arch: A, weights: w}\n",
            "teacher: {arch: B, weights: v}",
            {"teacher": {"arch": "B", "weights": "v"}},
        ),
        (
            f"teacher: {{{CONFIG}, weights: w}}\n",
            "teacher: {arch: B, weights: v}",
            {"teacher": {"arch": "B", "weights": "v"}},
        ),
        (
            "teacher: {arch: A, weights: w}\n",
            f"teacher: {{{CONFIG}, adapt: full}}",
            {"teacher": {"config": {"embed_dim": 1, "vision_cfg": {}, "text_cfg": {}}, "adapt": {"method": "full"}}},
        ),
        (
            "teacher: {arch: A, weights: w, adapt: {method: full, epochs: 3, label_smoothing: 0.1}}\n",
            "teacher: {adapt: none}",
            {"teacher": {"arch": "A", "weights": "w"}},
        ),
        (
            "teacher: {arch: A, weights: w, adapt: {method: full, epochs: 3, label_smoothing: 0.1}}\n",
            "teacher: {adapt: {method: none}}",
            {"teacher": {"arch": "A", "weights": "w"}},
        ),
        (
            "teacher: {arch: A, weights: w, adapt: {method: full, epochs: 3, label_smoothing: 0.1}}\n",
            "teacher: {adapt: {method: full, epochs: 4}}",
            {
                "teacher": {
                    "arch": "A",
                    "weights": "w",
                    "adapt": {"method": "full", "epochs": 4, "label_smoothing": 0.1},
                }
            },
        ),
        (
            "teacher: {arch: A, weights: w, adapt: full}\n",
            "teacher: {adapt: {epochs: 4}}",
            {"teacher": {"arch": "A", "weights": "w", "adapt": {"method": "full", "epochs": 4}}},
        ),
        (
            "student: {arch: A, weights: w, train: full}\n",
            "student: {arch: B}",
            {"student": {"arch": "B", "train": "full"}},
        ),
        (
            "optim: {name: sgd, momentum: 0.5, learning_rate: 0.1, epochs: 7, batch_size: 4, "
            "warmup_learning_rate: 0.2}\n",
            "optim: {name: adamw}",
            {"optim": {"name": "adamw", "epochs": 7, "batch_size": 4}},
        ),
        (
            "optim: {name: sgd, momentum: 0.5, learning_rate: 0.1}\n",
            "optim: {name: sgd, epochs: 7}",
            {"optim": {"name": "sgd", "momentum": 0.5, "learning_rate": 0.1, "epochs": 7}},
        ),
    ],
)
def test_naming_another_kind_drops_what_was_said_of_the_one_before(
    write: Write, tmp_path: Path, base: str, over: str, expected: dict[str, Any]
) -> None:
    minimal = read_yaml(MINIMAL, "minimal")
    (tmp_path / "base.yaml").write_text(json.dumps({**minimal, **read_yaml(base, "base")}))  # JSON is YAML too
    recipe = load_recipe(write(f"extends: base.yaml\n{over}"))
    ((part, fields),) = expected.items()
    reference = parse_recipe({**minimal, part: fields})
    assert getattr(recipe, part) == getattr(reference, part)


def test_a_model_config_is_replaced_whole_and_never_merged(write: Write) -> None:
    base = "extends: digits\nstudent: {config: {embed_dim: 1, vision_cfg: {width: 4, layers: 2}}}"
    write(base, "base.yaml")
    recipe = load_recipe(write("extends: base.yaml\nstudent: {config: {embed_dim: 2, vision_cfg: {width: 8}}}"))
    assert recipe.student.config == {"embed_dim": 2, "vision_cfg": {"width": 8}}


# --- settings of the command line ----------------------------------------------------------------------


def test_settings_are_laid_over_the_file_in_order_and_read_as_yaml(write: Write) -> None:
    recipe = load_recipe(
        write("seed: 1"),
        [
            "seed=2",
            "seed=3",
            "loss.if_align.weight=1e-3",
            "loss.edu_attention=null",
            "augment={flip: false}",
            "augment.min_scale=0.5",
            "about='a = b: c'",
            "optim.name=adamw",
        ],
    )
    assert recipe.seed == 3
    assert recipe.loss.if_align is not None
    assert recipe.loss.if_align.weight == 0.001
    assert recipe.loss.edu_attention is None
    assert (recipe.augment.flip, recipe.augment.min_scale) == (False, 0.5)
    assert recipe.about == "a = b: c"
    assert recipe.optim.name == "adamw"


def test_a_setting_can_choose_other_data_than_the_file() -> None:
    recipe = load_recipe("digits", ["data.folder=pictures"])
    assert (recipe.data.dataset, recipe.data.folder) == (None, "pictures")
    recipe = load_recipe("digits", ["data.shards=x-{0..9}.tar", "data.classes=names.txt"])
    assert (recipe.data.dataset, recipe.data.shards) == (None, "x-{0..9}.tar")


def test_a_setting_can_take_the_short_form_of_adapt(write: Write) -> None:
    assert load_recipe(write(), ["teacher.adapt=full"]).teacher.adapt.method == "full"
    assert load_recipe("digits", ["teacher.adapt=none", "teacher.weights=w"]).teacher.adapt.method == "none"


@pytest.mark.parametrize("setting", ["seed", "=3", "a..b=3", ".seed=3", "seed.=3", ""])
def test_a_setting_without_a_path_or_a_value_is_refused(write: Write, setting: str) -> None:
    with pytest.raises(MisuseError) as caught:
        load_recipe(write(), [setting])
    assert caught.value.field == f"--set {setting}"
    assert "key.path=value" in str(caught.value.remedy)


def test_a_setting_that_is_no_yaml_is_named(write: Write) -> None:
    with pytest.raises(RecipeError, match=r"--set augment=\{flip: is not valid YAML"):
        load_recipe(write(), ["augment={flip"])


# --- YAML ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1E5", 100000.0),
        (".5", 0.5),
        ("no", "no"),
        ("yes", "yes"),
        ("on", "on"),
        ("Off", "Off"),
        ("true", True),
        ("010", 10),
        ("0o10", 8),
        ("12:30", "12:30"),
        ("~", None),
        ("", None),
        ("'1'", "1"),
    ],
)
def test_yaml_is_version_1_2(text: str, value: Any) -> None:
    read = read_yaml(f"key: {text}", "file")["key"]
    assert (read, type(read)) == (value, type(value))


@pytest.mark.parametrize(
    "text",
    [
        "seed: 1\nseed: 2",
        "data: {dataset: digits, dataset: digits}",
        "a: [1",
        "\ta: 1",
        "a: 1\n---\nb: 2",
        "a: !!python/object/apply:os.system [exit]",
        "a: \x07",
        "about: 2024-02-31",
        "seed: " + "9" * 5000,
    ],
    ids=["repeated", "repeated below", "open", "tab", "two", "object", "bell", "no date", "long number"],
)
def test_what_is_no_yaml_is_refused_by_name(text: str) -> None:
    with pytest.raises(RecipeError, match=r"^my\.yaml: is not valid YAML: "):
        read_yaml(text, "my.yaml")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "top level must be fields"),
        (b"- a\n- b\n", "top level must be fields"),
        (b"just words", "top level must be fields"),
        (b"about: caf\xe9\n", "could not be read"),
        (b"1: 2\n", "a field name is not text: 1"),
        (b"data: {yes: 1, 2: 3}\n", "a field name is not text: 2"),
        (b"data: [{null: 1}]\n", "a field name is not text: None"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_by_name(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "odd.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)


def test_a_byte_order_mark_is_no_part_of_the_first_field(tmp_path: Path) -> None:
    path = tmp_path / "notepad.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + f"about: Zürich\n{MINIMAL}".encode())
    assert load_recipe(path).about == "Zürich"


# --- writing -------------------------------------------------------------------------------------------

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=100) | st.text("ab \x85\u2028\u2029\n:-'\"#")
NAMES = TEXTS.filter(lambda text: text.strip())
SHARES = st.floats(0, 1, exclude_max=True)
ABOVE_ZERO = st.floats(0, 1e300, exclude_min=True)
CONFIGS = st.fixed_dictionaries(
    {"embed_dim": st.integers(1), "vision_cfg": st.dictionaries(TEXTS, st.integers() | TEXTS), "text_cfg": st.just({})},
    optional={
        "more": st.lists(
            st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS | st.integers()
        ),
    },
)
COUNTS = st.integers(2, 10**9)
ADAMW = {"batch_size": COUNTS, "epochs": COUNTS, "learning_rate": ABOVE_ZERO, "weight_decay": ABOVE_ZERO}
PLAIN_RECIPES = st.fixed_dictionaries(
    {
        "data": st.fixed_dictionaries({"dataset": st.just("digits")})
        | st.fixed_dictionaries(
            {"folder": TEXTS}, optional={"classes": TEXTS | st.lists(TEXTS), "workers": st.integers(0) | st.none()}
        ),
        "teacher": st.fixed_dictionaries({"arch": TEXTS, "weights": TEXTS})
        | st.fixed_dictionaries(
            {
                "config": CONFIGS,
                "adapt": st.just("full")
                | st.fixed_dictionaries({"method": st.just("full")}, optional={**ADAMW, "label_smoothing": SHARES}),
            }
        ),
        "student": st.fixed_dictionaries(
            {"config": CONFIGS, "train": st.just("full")},
            optional={"weights": TEXTS | st.none(), "prompts": st.just({"tokens": 3}) | st.none()},
        ),
    },
    optional={
        "about": TEXTS,
        "seed": st.integers(0),
        "augment": st.fixed_dictionaries({"flip": st.booleans()}),
        "optim": st.fixed_dictionaries({"name": st.just("adamw")}, optional=ADAMW)
        | st.fixed_dictionaries({"name": st.just("sgd")}, optional={**ADAMW, "momentum": SHARES}),
        "loss": st.sampled_from([{"if_align": None}, {"edu_attention": None}, {"edu_attention": {"scale": 2.0}}]),
        "precision": st.sampled_from(["fp32", "bf16", "fp16"]),
    },
)


def with_about(about: str) -> dict[str, Any]:
    return {**read_yaml(MINIMAL, "minimal"), "about": about}


@pytest.mark.slow
@given(PLAIN_RECIPES)
@example(with_about("\x85"))  # a line break before YAML 1.2, and none since
@example(with_about("\u2028 \x06\x06\u0100" + 6 * "\U00010000" + "0 0"))  # escaped, and too long for a line of 80
def test_any_recipe_reads_back_from_its_yaml_as_the_same(tree: dict[str, Any]) -> None:
    recipe = parse_recipe(tree)
    assert parse_recipe(read_yaml(to_yaml(recipe), "again")) == recipe


def test_yaml_writes_every_default_out_in_the_order_of_the_fields(write: Write) -> None:
    written = read_yaml(to_yaml(load_recipe(write(), ["loss.edu_attention.memory=training"])), "again")
    assert list(written) == list(Recipe.model_fields)
    assert written["optim"]["learning_rate"] == 0.005
    assert written["loss"]["edu_attention"] == {
        "scale": None,
        "memory": "training",
        "gate_start": 0.0,
        "gate_learning_rate_factor": 1.0,
    }


def test_a_number_without_digits_is_an_error_of_the_file() -> None:
    """For which ruamel.yaml raises IndexError."""
    with pytest.raises(RecipeError) as caught:
        read_yaml("seed: !!float ''", "r.yaml")
    assert caught.value.path == "r.yaml"


# --- checking ------------------------------------------------------------------------------------------


def test_checking_names_the_faults_of_the_faulty_recipes_alone(write: Write) -> None:
    good, bad = write("", "good.yaml"), write("sed: 3\npresision: fp16", "bad.yaml")
    found = check_recipes([str(good), "digits", str(bad), "nosuch"])
    assert list(found) == [str(bad), "nosuch"]
    assert "sed: unknown field; did you mean seed?" in found[str(bad)]
    assert "presision: unknown field; did you mean precision?" in found[str(bad)]


def test_the_data_of_a_command_line_are_checked_as_a_recipes_are() -> None:
    data = parse_data({"dataset": None, "folder": "x", "classes": None, "template": "the {}"})
    assert (data.folder, data.template) == ("x", "the {}")
    with pytest.raises(RecipeError, match=r"^data: `template` must contain \{\} once"):
        parse_data({"folder": "x", "template": "the"})
    with pytest.raises(RecipeError, match=r"^data: foldr: unknown field; did you mean folder\?$"):
        parse_data({"folder": "x", "foldr": "y"})


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_recipe_that_may_not_be_read_is_named(write: Write) -> None:
    path = write()
    path.chmod(0)
    with pytest.raises(RecipeError, match="could not be read"):
        load_recipe(path)


OWN = """
data: {dataset: dtd}
teacher: {arch: A, weights: w}
student: {arch: B, weights: w}
optim: {epochs: 7}
for_dataset:
  dtd: {optim: {epochs: 3}}
  digits: {optim: {epochs: 5}}
"""


@pytest.mark.parametrize(
    ("settings", "epochs"),
    [
        ((), 3),
        (("data.dataset=digits",), 5),
        (("data.dataset=eurosat",), 7),
        (("data.dataset=digits", "optim.epochs=9"), 9),
        (("data.folder=photos",), 7),
    ],
)
def test_a_data_set_has_fields_of_its_own_below_the_command_lines(
    tmp_path: Path, settings: tuple[str, ...], epochs: int
) -> None:
    (tmp_path / "own.yaml").write_text(OWN)
    assert load_recipe(tmp_path / "own.yaml", settings).optim.epochs == epochs


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ("for_dataset: 0", "for_dataset: should be a mapping"),
        ("for_dataset: {dtd: 3}", "for_dataset: should be a mapping"),
        ("for_dataset: {dtdd: {seed: 2}}", "for_dataset: unknown dataset: 'dtdd'"),
        ("for_dataset: {dtd: {data: {dataset: eurosat}}}", r"for_dataset\.dtd: cannot change `data`"),
        ("for_dataset: {ucf101: {optim: {epoch: 2}}}", r"for_dataset\.ucf101: optim\.epoch: unknown field"),
    ],
)
def test_mistakes_in_the_fields_of_a_data_set_are_told(tmp_path: Path, own: str, message: str) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(OWN[: OWN.index("for_dataset")] + own)
    faults = check_recipes([str(path)])
    assert re.search(message, faults[str(path)])


# --- versions ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extended", [False, True])
def test_a_recipe_of_a_newer_comkd_is_named_as_such_before_its_other_faults(tmp_path: Path, extended: bool) -> None:
    (tmp_path / "new.yaml").write_text("schema_version: 2\nhyperdrive: {factor: 9}\nfor_dataset: [odd]\n")
    path = tmp_path / "new.yaml"
    if extended:
        path = tmp_path / "own.yaml"
        path.write_text("extends: new.yaml\nschema_version: 1\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(caught.value) == (
        f"{tmp_path / 'new.yaml'}: schema_version: the recipe was written for a newer comkd: 2 (allowed: 1); "
        "upgrade comkd (pip install --upgrade comkd)"
    )


def test_a_newer_version_of_the_command_line_or_of_plain_data_is_refused(minimal_recipe: dict[str, Any]) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("digits", ["schema_version=3"])
    assert (caught.value.path, caught.value.found) == ("--set", 3)
    with pytest.raises(RecipeError) as caught:
        parse_recipe({**minimal_recipe, "schema_version": 2, "odd": 1}, name="student.pt: recipe")
    assert (caught.value.path, caught.value.found) == ("student.pt: recipe", 2)


@pytest.mark.parametrize("version", [0, "2", None, 1.5, True, 1.0])
def test_what_is_no_version_is_a_fault_like_others(minimal_recipe: dict[str, Any], version: object) -> None:
    with pytest.raises(RecipeError, match="schema_version: should be"):
        parse_recipe({**minimal_recipe, "schema_version": version})


def test_an_extending_recipe_takes_back_what_a_base_has_for_single_data_sets(tmp_path: Path) -> None:
    (tmp_path / "all.yaml").write_text("extends: vitl_to_vitb.yaml\nfor_dataset: null\n")
    (tmp_path / "one.yaml").write_text("extends: vitl_to_vitb.yaml\nfor_dataset: {dtd: null}\n")

    def weight(name: str, dataset: str) -> float:
        refinement = load_recipe(tmp_path / name, [f"data.dataset={dataset}"]).loss.refinement
        assert refinement is not None
        return refinement.weight

    assert [weight("all.yaml", name) for name in ("dtd", "fgvc_aircraft")] == [1000, 1000]
    assert [weight("one.yaml", name) for name in ("dtd", "fgvc_aircraft")] == [1000, 200]
    (tmp_path / "odd.yaml").write_text("extends: vitl_to_vitb.yaml\nfor_dataset: {no_such: null}\n")
    with pytest.raises(RecipeError, match="unknown dataset: 'no_such'"):
        load_recipe(tmp_path / "odd.yaml")
