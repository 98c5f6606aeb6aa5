"""``python -m llmkern``, the same as the command ``llmkern``."""

from llmkern.cli import main

main()
