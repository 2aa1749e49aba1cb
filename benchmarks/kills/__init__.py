"""Kills real runs of comkd and compares where they end with undisturbed ones."""
