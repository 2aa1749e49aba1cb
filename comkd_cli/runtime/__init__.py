"""Devices, ranks, collectives and signals."""
