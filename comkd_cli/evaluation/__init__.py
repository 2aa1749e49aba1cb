"""Scores: features and logits of image sets, and what is counted from them."""
