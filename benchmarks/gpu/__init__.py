"""What one GPU does in each of comkd's kinds of work: `python -m benchmarks.gpu`."""
