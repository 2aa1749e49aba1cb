"""The report of a run: statistics of its answers, figures, and one HTML page that needs nothing else."""
