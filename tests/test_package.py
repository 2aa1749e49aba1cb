"""`import comkd_cli`: lazy names with types, and the page that describes them."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import comkd_cli
from tests import tiny

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/python.md").read_text(encoding="utf-8")


def test_importing_the_package_loads_no_torch() -> None:
    code = "import sys, comkd_cli; dir(comkd_cli); print('torch' in sys.modules, len(comkd_cli.__all__))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", str(len(comkd_cli.__all__))]


def test_every_name_is_there_for_users_and_for_type_checkers() -> None:
    typed = {
        alias.asname or alias.name
        for node in ast.walk(ast.parse(Path(comkd_cli.__file__).read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("comkd_cli.")
        for alias in node.names
    }
    assert sorted(typed) == sorted(comkd_cli.__all__)
    assert set(comkd_cli.__all__) <= set(dir(comkd_cli))
    for name in comkd_cli.__all__:
        assert getattr(comkd_cli, name) is not None
    assert (Path(comkd_cli.__file__).parent / "py.typed").is_file()
    with pytest.raises(AttributeError, match="no_such_name"):
        comkd_cli.no_such_name  # type: ignore[attr-defined] # noqa: B018


@pytest.mark.slow
@pytest.mark.usefixtures("few_digits")
def test_the_blocks_of_the_page_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], onnx_files: Path
) -> None:
    """In one namespace, beside a student, a recipe and photos of digits."""
    import shutil

    from ruamel.yaml import YAML

    from tests.exported import export_once, run_graphs_here

    monkeypatch.chdir(tmp_path)
    export_once(monkeypatch, onnx_files)
    run_graphs_here(monkeypatch)
    with Path("recipe.yaml").open("w") as stream:
        YAML(typ="safe", pure=True).dump(tiny.recipe(), stream)
    tiny.digits_folder(tmp_path / "photos", 90, 84)
    shutil.copy("photos/test/0/" + sorted(p.name for p in Path("photos/test/0").iterdir())[0], "fox.jpg")
    shutil.copy("fox.jpg", "badger.jpg")
    first = comkd_cli.distill("recipe.yaml", runs="first", settings={"optim.epochs": 1})
    first.load().save("student.pt")
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    assert len(blocks) >= 6
    names: dict[str, object] = {"__name__": "page"}
    for block in blocks:
        exec(compile(block, "docs/python.md", "exec"), names)
    assert Path("with-red-fox.pt").is_file()
    assert Path("bundle/manifest.json").is_file()
    assert "epoch 3 of 3" in capsys.readouterr().out
