"""What `import comkd_cli` offers to Python: a finished student, and the verbs as functions with typed results."""
