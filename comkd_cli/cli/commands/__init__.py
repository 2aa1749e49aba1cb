"""A module per verb, each with a click command named `command`. The folder is the list of commands."""
