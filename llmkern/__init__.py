"""Where each joule of an LLM inference run goes: which kernel, or which idle gap between kernels."""

__version__ = "0.1.0"
