"""The command ``python -m llmkern.report``, the same as ``llmkern report``."""

from llmkern.commands import command, run

if __name__ == "__main__":
    run(command("report"), "python -m llmkern.report")
