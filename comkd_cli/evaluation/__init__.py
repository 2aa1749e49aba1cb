"""Scores of models: features of image sets, the protocols derived from them, and metrics."""
