"""Sessions of onnxruntime, which share the cores with other programs."""

from __future__ import annotations

import os
from typing import Any

from comkd_cli.edge.machine import usable_cores


def start_session(graph: bytes, threads: int | None, optimization: str = "all") -> Any:
    """An onnxruntime session of a graph on the CPU. Its threads sleep while they wait for one another.

    threads: within an operator; None uses every core that this process may use. optimization: `all`, or `basic` for
    graphs that onnxruntime's extended fusions would break.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only: its warnings concern the graph, which the user cannot change
    # By default they spin, also between two images, and so take the cores from other programs.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if threads is None and usable_cores() < (os.cpu_count() or 1):
        threads = usable_cores()  # onnxruntime counts the machine's cores, whatever this process may use
    if threads is not None:
        options.intra_op_num_threads = threads
    if optimization == "basic":
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
