"""Frozen teachers: from weights, released checkpoints or teacher.pt, and the cache of their image features."""
