"""The command ``python -m llmkern.trace``, the same as ``llmkern trace``."""

from __future__ import annotations


def main() -> None:
    """Run ``llmkern trace`` with this process's arguments and exit with its code."""
    from llmkern.commands import command, run

    run(command("trace"), "python -m llmkern.trace")


if __name__ == "__main__":
    main()
