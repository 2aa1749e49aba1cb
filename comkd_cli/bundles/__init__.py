"""Bundles: ONNX graphs of a student, checked against it, with all that a device needs to run them."""
