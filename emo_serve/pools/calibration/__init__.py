"""Find a domain's pool from examples: read them, run them layer by layer, score, keep the best."""

from __future__ import annotations

from typing import Final

__all__ = ["DEFAULT_METHOD", "METHODS"]

DEFAULT_METHOD: Final = "layerwise"
METHODS = (DEFAULT_METHOD, "router", "easy-ep", "random")
