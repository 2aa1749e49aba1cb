"""A bundle's predict.py: edge/classifier.py and the modules of edge/ that it imports, in one file."""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from pathlib import Path

from comkd_cli.edge import classifier

PACKAGE = "comkd_cli"
EDGE = f"{PACKAGE}.edge."
FUTURE = "__future__"


def standalone_predictor() -> str:
    """The source of predict.py: the docstring of edge/classifier.py, every import once, and the modules' code.

    A module comes after the modules that it imports. Only `from comkd_cli.edge.MODULE import NAME` can be inlined, and
    since all modules share one namespace, each top-level name must be unique. Raises ValueError otherwise.
    """
    folder = Path(classifier.__file__).parent
    modules: dict[str, _Module] = {}
    _collect(folder, Path(classifier.__file__).stem, modules)
    defined: dict[str, str] = {}
    for name, module in modules.items():
        for symbol in module.defined:
            if symbol in defined:
                raise ValueError(f"{symbol} is defined in both {defined[symbol]}.py and {name}.py")
            defined[symbol] = name
    docstring = list(modules.values())[-1].docstring
    parts = [f'"""{docstring}"""', f"from {FUTURE} import annotations", _imports(list(modules.values()))]
    return "\n\n".join(parts) + "\n\n" + "\n\n\n".join(module.code for module in modules.values()) + "\n"


class _Module:
    """The parts of a module's source."""

    def __init__(self, source: str) -> None:
        tree = ast.parse(source)
        self.docstring = ast.get_docstring(tree, clean=False) or ""
        imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        self.imports = [node for node in imports if _edge_module(node) is None]
        self.inlined = [name for name in map(_edge_module, imports) if name is not None]
        self.code = "\n".join(source.splitlines()[imports[-1].end_lineno :]).strip()
        self.defined = set(_defined(tree))


def _collect(folder: Path, name: str, modules: dict[str, _Module]) -> None:
    """Add a module after the modules of the folder that it imports."""
    module = _Module((folder / f"{name}.py").read_text(encoding="utf-8"))
    for imported in module.inlined:
        if imported not in modules:
            _collect(folder, imported, modules)
    modules[name] = module


def _edge_module(node: ast.Import | ast.ImportFrom) -> str | None:
    """The module of edge/ that is imported; None for another library. Raises ValueError if it cannot be inlined."""
    names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
    if not any(name.startswith(PACKAGE) for name in names):
        return None
    if isinstance(node, ast.Import) or not names[0].startswith(EDGE) or any(alias.asname for alias in node.names):
        raise ValueError(f"{ast.unparse(node)}: only `from {EDGE}MODULE import NAME` can be written into predict.py")
    return names[0].removeprefix(EDGE)


def _defined(tree: ast.Module) -> list[str]:
    """The functions, classes and constants of a module."""
    names = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names += [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]
    return names


def _imports(modules: list[_Module]) -> str:
    """The imports of all modules, each name once: those of the standard library, then the others."""
    whole: set[str] = set()
    names: dict[str, set[str]] = defaultdict(set)
    for node in (node for module in modules for node in module.imports):
        aliases = {ast.unparse(alias) for alias in node.names}
        if isinstance(node, ast.Import):
            whole |= aliases
        elif node.module != FUTURE:
            names[node.module or ""] |= aliases
    lines = [f"import {name}" for name in sorted(whole)]
    lines += [f"from {module} import {', '.join(sorted(names[module]))}" for module in sorted(names)]
    standard = [line for line in lines if line.split()[1].partition(".")[0] in sys.stdlib_module_names]
    return "\n".join(standard) + "\n\n" + "\n".join(line for line in lines if line not in standard)
