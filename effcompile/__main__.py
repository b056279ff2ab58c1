"""Run the command line with `python -m effcompile`."""

from effcompile.cli.main import run

if __name__ == "__main__":
    run()
