"""Backbones, checkpoints and their costs."""
