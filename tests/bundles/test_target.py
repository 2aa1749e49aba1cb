"""The folder that a bundle is written to."""

from pathlib import Path

import pytest

from comkd_cli.bundles.target import check_target
from comkd_cli.errors import ExportError


def test_a_refused_export_removes_what_a_killed_one_left_beside_the_bundle(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle/image.onnx").touch()
    (tmp_path / ".bundle.abcdefgh/old").mkdir(parents=True)  # of one killed while it removed the bundle before
    with pytest.raises(ExportError, match="already exists"):
        check_target(tmp_path / "bundle", force=False)
    assert [path.name for path in tmp_path.rglob("*")] == ["bundle", "image.onnx"]
