"""Examples of each command, which end its help."""

from __future__ import annotations

import click

EXAMPLES: dict[str, tuple[str, ...]] = {
    "classes": (
        "comkd classes runs/digits/digits/seed1/student.pt",
        "comkd classes student.pt --add 'red fox' --add badger --out more.pt",
    ),
    "completion": (
        'eval "$(comkd completion bash)"    # in ~/.bashrc',
        'eval "$(comkd completion zsh)"     # in ~/.zshrc',
        "comkd completion fish > ~/.config/fish/completions/comkd.fish",
    ),
    "datasets": ("comkd datasets check --data-root DATA", "comkd datasets fetch dtd --data-root DATA"),
    "datasets check": ("comkd datasets check dtd eurosat --deep --data-root DATA",),
    "datasets fetch": ("comkd datasets fetch dtd --data-root DATA",),
    "datasets list": ("comkd datasets list --json",),
    "datasets split": ("comkd datasets split dtd --shots 16 --seed 1 --classes base --data-root DATA",),
    "distill": (
        "comkd distill digits",
        "comkd distill recipe.yaml --dry-run",
        "comkd distill recipe.yaml --set optim.epochs=10 --seed 1 --seed 2",
        "torchrun --nproc-per-node 8 -m comkd_cli distill recipe.yaml",
    ),
    "distill-text": ("comkd distill-text runs/digits/digits/seed1/student.pt --names names.txt",),
    "doctor": ("comkd doctor", "comkd doctor --json > doctor.json"),
    "evaluate": (
        "comkd evaluate runs/digits/digits/seed1/student.pt",
        "comkd evaluate student.pt --dataset dtd --data-root DATA",
        "comkd evaluate ViT-B-16-quickgelu:openai --folder photos --classes classes.txt",
    ),
    "export": (
        "comkd export runs/digits/digits/seed1/student.pt --precision fp32 --precision int8",
        "comkd export student.pt --text --web --benchmark --out bundle",
    ),
    "import-student": (
        "comkd import-student released.yaml --dataset dtd --seed 1 --set student.weights=model.pth.tar",
    ),
    "init": ("comkd init photos --classes classes.txt --budget 5M",),
    "inspect": ("comkd inspect bundle", "comkd inspect student.pt --json"),
    "predict": (
        "comkd predict bundle fox.jpg badger.jpg --top 3",
        "comkd predict bundle photos --csv predictions.csv",
        "comkd predict hf:OWNER/NAME fox.jpg",
        "comkd predict bundle --self-test",
    ),
    "pull": ("comkd pull OWNER/NAME --out bundle",),
    "push": ("comkd push bundle OWNER/NAME --dry-run", "comkd push bundle OWNER/NAME"),
    "recipes": ("comkd recipes list", "comkd recipes show digits"),
    "recipes check": ("comkd recipes check recipe.yaml",),
    "recipes list": ("comkd recipes list",),
    "recipes show": ("comkd recipes show digits --set optim.epochs=10",),
    "report": (
        "comkd report runs/digits/digits/seed1",
        "comkd report runs/recipe/photos/seed1 runs/recipe/photos/seed2 --out report.html",
    ),
    "reproduce": (
        "comkd reproduce base-to-novel --data-root DATA --dry-run",
        "comkd reproduce base-to-novel --dataset dtd --dataset eurosat --data-root DATA",
    ),
}
"""By the names of the command, such as `datasets check`: command lines as a shell accepts them."""


def add_examples(name: str, command: click.Command) -> None:
    """End the help of a command, and of the commands below it, with its examples."""
    examples = EXAMPLES.get(name)
    if examples:
        command.epilog = "\b\nExamples:\n" + "\n".join(f"  {line}" for line in examples)
    if isinstance(command, click.Group):
        for below, inner in command.commands.items():
            add_examples(f"{name} {below}", inner)
