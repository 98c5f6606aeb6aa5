"""``python -m llmkern``, the same as the command ``llmkern``."""

from llmkern.commands import main

if __name__ == "__main__":
    main()
