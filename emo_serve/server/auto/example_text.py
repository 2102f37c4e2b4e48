"""The text that a classifier reads of examples."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from emo_serve.pools.calibration.examples import Example

__all__ = ["bounded", "text_of"]

logger = logging.getLogger(__name__)

_MAX_CHARACTERS = 500_000
"""How much of one pool's examples the classifier reads; fitting them takes about a second."""


def text_of(example: Example) -> str:
    """Return an example's text; of a chat, all its messages."""
    if example.text is not None:
        return example.text
    return "\n".join(message["content"] for message in example.messages)


def bounded(name: str, texts: Sequence[str]) -> list[str]:
    """Return what the classifier reads of a pool's texts; it is logged if that is not all."""
    kept: list[str] = []
    left = _MAX_CHARACTERS
    for text in texts:
        if text.strip() and left > 0:
            kept.append(text[:left])
            left -= len(text)
    if left < 0:
        logger.warning(
            "pool %s: auto learns from only the first %d characters of its examples",
            name,
            _MAX_CHARACTERS,
        )
    return kept
