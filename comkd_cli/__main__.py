"""`python -m comkd_cli` is `comkd`."""

from comkd_cli.cli.app import main

if __name__ == "__main__":
    main()
