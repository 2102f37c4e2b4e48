"""The text that a classifier reads of an example."""

from __future__ import annotations

from emo_serve.pools.calibration.examples import Example

__all__ = ["text_of"]


def text_of(example: Example) -> str:
    """Return an example's text; of a chat, all its messages."""
    if example.text is not None:
        return example.text
    return "\n".join(message["content"] for message in example.messages)
