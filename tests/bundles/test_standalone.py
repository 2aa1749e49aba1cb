"""predict.py as one file. What it answers is tested in tests/edge and tests/flows/test_export.py."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from comkd_cli.bundles import standalone
from comkd_cli.bundles.standalone import standalone_predictor


@pytest.fixture
def edge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a classifier.py that takes the place of the package's."""
    monkeypatch.setattr(standalone.classifier, "__file__", str(tmp_path / "classifier.py"))
    return tmp_path


FUTURE = "from __future__ import annotations\n"
ONE = f'"""One."""\n{FUTURE}import os\nfrom pathlib import Path\n\nROOT: Path = Path(os.sep)\n'
TWO = f'"""Two."""\n{FUTURE}import os\nfrom comkd_cli.edge.one import ROOT\n\ndef two():\n    return os.fspath(ROOT)\n'


def test_modules_are_written_after_those_that_they_import(edge: Path, tmp_path: Path) -> None:
    (edge / "one.py").write_text(ONE)
    (edge / "two.py").write_text(TWO)
    (edge / "classifier.py").write_text(
        f'"""What it is."""\n{FUTURE}from pathlib import PurePath\nfrom comkd_cli.edge.two import two\n'
        "from comkd_cli.edge.one import ROOT\n\nprint(two(), PurePath(ROOT), __doc__)\n"
    )
    (tmp_path / "predict.py").write_text(standalone_predictor())
    command = [sys.executable, "-I", str(tmp_path / "predict.py")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "/ / What it is.\n"
    assert (tmp_path / "predict.py").read_text().count("import os") == 1


@pytest.mark.parametrize(
    "statement",
    ["import comkd_cli", "from comkd_cli import errors", "from comkd_cli.edge.one import ROOT as R"],
)
def test_an_import_that_one_file_cannot_have_is_refused(edge: Path, statement: str) -> None:
    (edge / "classifier.py").write_text(f'"""It."""\n{FUTURE}{statement}\n')
    with pytest.raises(ValueError, match=f"^{statement}: only"):
        standalone_predictor()


def test_a_name_in_two_modules_is_refused(edge: Path) -> None:
    (edge / "one.py").write_text(ONE)
    (edge / "classifier.py").write_text(
        f'"""It."""\n{FUTURE}from comkd_cli.edge.one import ROOT\n\nROOT, OTHER = 1, 2\n'
    )
    with pytest.raises(ValueError, match=r"^ROOT is defined in both one\.py and classifier\.py$"):
        standalone_predictor()


def test_the_file_imports_numpy_pillow_onnxruntime_and_the_standard_library() -> None:
    imported = set()
    for node in ast.walk(ast.parse(standalone_predictor())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").partition(".")[0])
    assert imported - set(sys.stdlib_module_names) == {
        "numpy",
        "PIL",
        "onnxruntime",
        "pillow_heif",  # if it is installed
        "tokenizers",  # for the text encoder of a SigLIP alone
    }
