"""`comkd recipes`: list, show and check recipes."""

from __future__ import annotations

import click


@click.group()
def command() -> None:
    """List, show and check recipes."""


@command.command("list")
def list_() -> None:
    """List the recipes that come with comkd."""
    from rich.markup import escape
    from rich.table import Table

    from comkd_cli.recipe import bundled_recipes, load_recipe
    from comkd_cli.terminal import output

    table = Table("recipe", "about", box=None, pad_edge=False, header_style="bold")
    for name, path in bundled_recipes().items():
        table.add_row(name, escape(load_recipe(path).about))
    output().print(table)


@command.command()
@click.argument("name")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Change a field, as distill does.")
def show(name: str, settings: tuple[str, ...]) -> None:
    """Print a recipe with `extends` resolved and every default written out.

    NAME is a bundled recipe or a file.
    """
    from comkd_cli.recipe import load_recipe, to_yaml

    click.echo(to_yaml(load_recipe(name, settings)), nl=False)


@command.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
def check(files: tuple[str, ...]) -> None:
    """Check each FILE and print every fault of it; exits 1 if there is one."""
    from comkd_cli.errors import RecipeError
    from comkd_cli.recipe import check_recipes

    faults = check_recipes(files)
    for name in files:
        if name not in faults:
            click.echo(f"{name}: ok")
    if faults:
        raise RecipeError("\n".join(faults.values()))
