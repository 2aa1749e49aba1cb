"""Imported once by the process that tests/warm.py forks, so that each command starts with all of it.

The garbage collector is told to leave these objects alone: a collection in a child would visit each, and so copy every
page of memory that holds one.
"""

import gc
import importlib

# Beyond what comkd imports when it starts: what its verbs import where they need it, and what that imports in turn.
MODULES = (
    "tests.warm",
    "tests.tiny",
    "tests.exported",
    "comkd_cli.cli.commands.distill",
    "comkd_cli.cli.commands.evaluate",
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
    "onnxscript.rewriter",
    "sklearn.linear_model",
    "torch._functorch.aot_autograd",
    "torch.export._trace",
    "torch.onnx._internal.exporter._core",
)
for name in MODULES:
    importlib.import_module(name)
importlib.import_module("comkd_cli.data.digits").digits_source()  # reads their file
gc.collect()
gc.freeze()
