"""Write docs/cli.md and docs/recipes.md from the code.

python docs/generate.py           writes them
python docs/generate.py --check   exits 1 where one is out of date
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import click
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from comkd_cli.cli.app import main as comkd
from comkd_cli.recipe import Recipe, bundled_recipes, load_recipe

DOCS = Path(__file__).parent
NOTE = "<!-- Made by docs/generate.py from the code; change it there. -->\n"
WIDTH = 100


def cli_page() -> str:
    """Every command with its help."""
    parts = [NOTE, "# Command line\n"]
    for path, command in _commands(comkd, ("comkd",)):
        context = click.Context(
            command,
            info_name=" ".join(path),
            max_content_width=WIDTH,
            terminal_width=WIDTH,
            help_option_names=comkd.context_settings["help_option_names"],
        )
        parts.append(f"## {' '.join(path)}\n\n```text\n{command.get_help(context)}\n```\n")
    parts.append(
        "Exit codes: 0 success; 1 an error that a user can correct, printed as one message; 2 invalid command-line "
        "arguments; 130 interrupted by Ctrl-C, 143 by SIGTERM; training saves a checkpoint first, and the same command "
        "resumes. Errors and progress go to standard error, results to "
        "standard output. COMKD_DATA names the folder of datasets; ACCELERATE_USE_CPU=1 uses the CPU only.\n"
    )
    return "\n".join(parts)


def recipe_page() -> str:
    """Every field of a recipe with its type, default and documentation."""
    parts = [
        NOTE,
        "# Recipes\n",
        "A recipe is a YAML file with all settings of a run. Unknown fields are refused, and all faults are reported"
        " at once. `extends: other.yaml` starts from another recipe (a file beside it, or a bundled one) and merges "
        "this one into it, mapping by mapping. Lists and a model's `config` are replaced whole. A different kind of "
        "thing (a `folder` or `shards` instead of a `dataset`, or another `adapt`, `optim.name`, `arch` or `config`) "
        "drops the fields of the old one, but `data.images` is kept if a `folder` replaces a `dataset`. "
        "`--set key.path=value` does the same "
        "from the command line. `null` switches an optional part off. `for_dataset: {dtd: {...}}` holds the fields "
        "that differ for single datasets.\n",
        "Sources of defaults: [P] the ComKD-CLIP paper, [K] PromptKD, [S] PromptSRC, [C] this project's choice.\n",
        "## Bundled\n",
        "| recipe | about |\n|---|---|",
    ]
    parts[-1] += "".join(f"\n| {name} | {load_recipe(path).about} |" for name, path in bundled_recipes().items())
    parts.append("")
    for title, model in _models(Recipe, "recipe"):
        parts.append(f"## {title}\n\n{(model.__doc__ or '').strip()}\n\n| field | default | meaning |\n|---|---|---|")
        parts[-1] += "".join(f"\n| {row} |" for row in _rows(model)) + "\n"
    return "\n".join(parts)


def _commands(command: click.Command, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    yield path, command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            if below is not None:
                yield from _commands(below, (*path, name))


def _models(model: type[BaseModel], title: str) -> Iterator[tuple[str, type[BaseModel]]]:
    """Each model of the tree once, with the path at which a recipe has it."""
    yield title, model
    prefix = "" if title == "recipe" else f"{title.split(':')[0]}."
    for name, field in model.model_fields.items():
        branches = list(_below(field.annotation))
        for branch in branches:
            tag = f": {_tag(branch)}" if len(branches) > 1 else ""
            yield from _models(branch, f"{prefix}{name}{tag}")


def _below(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _below(argument)


def _tag(model: type[BaseModel]) -> str:
    names = ("method", "name")
    return next(str(model.model_fields[name].default) for name in names if name in model.model_fields)


def _rows(model: type[BaseModel]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        meaning = " ".join((field.description or "").split()).replace("|", "\\|")
        yield f"{name} | {_default(field)} | {meaning}"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if isinstance(field.default, BaseModel):
        return "see below"
    return '""' if field.default == "" else json.dumps(field.default).strip('"')


def main(check: bool) -> int:
    """Write the pages, or compare them."""
    stale = []
    for path, text in ((DOCS / "cli.md", cli_page()), (DOCS / "recipes.md", recipe_page())):
        if check and (not path.exists() or path.read_text(encoding="utf-8") != text):
            stale.append(path.name)
        elif not check:
            path.write_text(text, encoding="utf-8")
    if stale:
        print(f"{', '.join(stale)}: out of date; run `make pages`", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main(check="--check" in sys.argv[1:]))
