"""What a shell completes: recipes, datasets, students and the folders of runs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import click
from click.shell_completion import CompletionItem

STUDENTS = "*/*/seed*/student.pt"  # below the folder of all runs


def complete_recipe(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The bundled recipes, and files."""
    from comkd_cli.recipe import bundled_recipes

    return [_files(incomplete), *_beginning(bundled_recipes(), incomplete)]


def complete_dataset(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The datasets of the suite."""
    from comkd_cli.recipe.catalog import CATALOG

    return _beginning(CATALOG, incomplete)


def complete_any_dataset(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The datasets of the suite, and the bundled digits."""
    return [*_beginning(["digits"], incomplete), *complete_dataset(context, parameter, incomplete)]


def complete_student(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The finished students below the folder of all runs, and files."""
    return [_files(incomplete), *_beginning(map(str, _students(context)), incomplete)]


def complete_run(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The folders of finished students, and files."""
    return [_files(incomplete), *_beginning((str(path.parent) for path in _students(context)), incomplete)]


def _students(context: click.Context) -> list[Path]:
    """The finished students below --runs, or below its default for commands without that option."""
    return sorted(Path(context.params.get("runs") or "runs").glob(STUDENTS))


def _files(incomplete: str) -> CompletionItem:
    """Also files and folders; it comes first, since bash drops what was listed before it."""
    return CompletionItem(incomplete, type="file")


def _beginning(names: Iterable[str], incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]
