"""`comkd recipes`: list, show and check recipes."""

from __future__ import annotations

import click

from comkd_cli.cli.completing import complete_recipe


@click.group()
def command() -> None:
    """List, show and check recipes."""


@command.command("list")
def list_() -> None:
    """List the recipes that come with comkd."""
    from comkd_cli.cli.terminal import Column, print_table
    from comkd_cli.recipe import bundled_recipes, load_recipe

    rows = [(name, load_recipe(path).about) for name, path in bundled_recipes().items()]
    print_table([Column("recipe", "word"), Column("about", "text")], rows)


@command.command()
@click.argument("name", shell_complete=complete_recipe)
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Change a recipe field, as in distill.")
def show(name: str, settings: tuple[str, ...]) -> None:
    """Print a recipe with every default written out.

    `extends` is resolved. NAME is a bundled recipe or a file.
    """
    from comkd_cli.cli.terminal import encodable
    from comkd_cli.recipe import load_recipe, to_yaml

    recipe = load_recipe(name, settings)
    text = to_yaml(recipe)
    click.echo(text if encodable(text) else to_yaml(recipe, ascii_only=True), nl=False)


@command.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE...", shell_complete=complete_recipe)
def check(files: tuple[str, ...]) -> None:
    """Check each FILE and print all its faults.

    The exit code is 1 if there is one.
    """
    from comkd_cli.errors import RecipeError
    from comkd_cli.recipe import check_recipes

    faults = check_recipes(files)
    for name in files:
        if name not in faults:
            click.echo(f"{name}: ok")
    if faults:
        raise RecipeError("\n".join(faults.values()))
