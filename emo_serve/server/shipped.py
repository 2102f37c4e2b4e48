"""The model that is served when no MODEL is given: the one that ships."""

from __future__ import annotations

from emo_serve import demo
from emo_serve.server.startup.launch import DefaultModel

__all__ = ["shipped_model"]

_FLAG_DEFAULTS = {
    # Compilation needs a C++ compiler and takes most of the start-up; a model this small gains
    # little (benchmarks/serving/start.py, serving/throughput.py --a emo --b emo-eager).
    "enforce_eager": True,
}
"""Defaults of vLLM's flags for the shipped model, which must start on any machine."""


def shipped_model() -> DefaultModel:
    """Return the shipped model with its pools, and the texts that `auto` learns from."""
    defaults = {**_FLAG_DEFAULTS, "auto_examples": str(demo.heldout_dir())}
    return DefaultModel(demo.DEMO_MODEL, demo.model_dir(), demo.pools_dir(), defaults)
