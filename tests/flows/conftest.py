"""One tiny run on digits, shared by the tests of the flows that come after it."""

from pathlib import Path

import pytest

from comkd_cli.data.sources import open_source
from comkd_cli.flows import adapt, distill
from comkd_cli.recipe import parse_recipe
from comkd_cli.training import make_accelerator
from tests import tiny


@pytest.fixture(scope="session")
def tiny_student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """student.pt of the tiny recipe, its teacher beside it."""
    recipe = parse_recipe(tiny.recipe())
    source = open_source(recipe.data, Path("data"))
    runs = tmp_path_factory.mktemp("shared runs")
    stage = adapt.stage_1(recipe, source, Path("data"), runs)
    run = distill.Run(recipe, "tiny", source, runs, stage.identity)
    accelerator = make_accelerator("fp32")
    return distill.distill(
        run,
        lambda: adapt.ready_teacher(stage, accelerator, lambda event: None, "again"),
        accelerator,
        lambda event: None,
        "again",
    )
