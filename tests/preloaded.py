"""Imported once by the process that tests/warm.py forks, so that each command starts with all of it.

The garbage collector is told to leave these objects alone: a collection in a child would visit each, and so copy every
page of memory that holds one.
"""

import importlib

from tests import collector

# Beyond what comkd imports when it starts: what its verbs import where they need it, and what that imports in turn.
MODULES = (
    "tests.warm",
    "tests.tiny",
    "tests.exported",
    "comkd_cli.cli.commands.distill",
    "comkd_cli.api",
    "comkd_cli.cli.commands.evaluate",
    "comkd_cli.cli.distiller",
    "comkd_cli.flows.adapt",
    "comkd_cli.flows.distill",
    "comkd_cli.flows.evaluate",
    "comkd_cli.flows.export",
    "comkd_cli.flows.predict",
    "comkd_cli.flows.report",
    "comkd_cli.report.page",
    "matplotlib.backends.backend_svg",
    "networkx",
    "onnxruntime",
    "onnxscript.function_libs.torch_lib.ops",
    "onnxscript.rewriter",
    "sklearn.linear_model",
    "torch._functorch.aot_autograd",
    "torch.export._trace",
    "torch.onnx._internal.exporter._core",
    "torch.utils.serialization",
)


def preload() -> None:
    """Import it all, and read what is read once."""
    for name in MODULES:
        importlib.import_module(name)

    from PIL import Image

    from comkd_cli.data.digits import digits_source
    from comkd_cli.models.backbones import build_clip
    from comkd_cli.recipe.model import Model
    from tests import tiny

    digits_source()
    Image.init()  # imports the module of each format
    build_clip(Model(config=tiny.CLIP))  # reads the vocabulary


collector.pause()
preload()
collector.resume()
