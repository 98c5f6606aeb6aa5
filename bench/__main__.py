"""Every benchmark as one command: ``python -m bench`` lists them, ``python -m bench NAME --help`` explains one."""

from __future__ import annotations

import ast
import runpy
import sys
from pathlib import Path

import click

HERE = Path(__file__).parent


def described() -> dict[str, str]:
    """Return the first sentence of each benchmark by its name."""
    found = {}
    for file in sorted(HERE.glob("*.py")):
        tree = ast.parse(file.read_text())
        runs = any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body)
        if runs and file != Path(__file__):
            found[file.stem] = (ast.get_docstring(tree) or "").splitlines()[0]
    return found


class Benchmarks(click.Group):
    """A command for each module with a main of its own; it is imported when it is run."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(described())

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        about = described().get(name)
        if about is None:
            return None

        def run(rest: tuple[str, ...]) -> None:
            sys.argv = [f"bench.{name}", *rest]
            runpy.run_module(f"bench.{name}", run_name="__main__", alter_sys=True)

        return click.Command(
            name,
            callback=run,
            params=[click.Argument(["rest"], nargs=-1, type=click.UNPROCESSED)],
            help=about,
            # What follows is the benchmark's own, --help too.
            context_settings={"ignore_unknown_options": True, "help_option_names": []},
        )


if __name__ == "__main__":
    Benchmarks(help="What llmkern's figures are measured with; results go to bench/results.").main(prog_name="bench")
