"""Serve EMO mixture-of-experts models: one vLLM engine, many expert pools, the OpenAI API.

Importing this package loads nothing heavy; torch and vLLM come in with the modules that need them.
"""

__all__ = ["__version__"]

__version__ = "0.1.0"
