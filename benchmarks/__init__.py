"""Speed and memory, as ratios measured in one run. Each module is a command that prints JSON."""
