"""The command ``python -m llmkern.evaluate``, the same as ``llmkern evaluate``."""

from llmkern.commands import command, run

if __name__ == "__main__":
    run(command("evaluate"), "python -m llmkern.evaluate")
