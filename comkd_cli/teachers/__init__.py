"""Teachers that are ready to use: loaded from weights or checkpoints, cached features."""
