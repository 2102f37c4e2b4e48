"""The outcome of `pools build` as text, the same for builds here and on a server."""

from __future__ import annotations

from collections.abc import Sequence

from emo_serve.cli.rendering.tables import size_range

__all__ = ["coverage_line", "found_by", "size_line"]


def size_line(name: str, experts_per_layer: Sequence[int]) -> str:
    """Say how large the pool is; 0 in `experts_per_layer` stands for a dense layer."""
    sizes = [count for count in experts_per_layer if count]
    return f"{name}, {size_range(sizes)} experts per layer in {len(sizes)} MoE layers"


def found_by(method: str, documents: int, tokens: int) -> str:
    """Say which method found the pool, and from how much text."""
    return f"{method}, {documents} document{'' if documents == 1 else 's'}, {tokens} tokens"


def coverage_line(coverage: float | None, layers: Sequence[float | None]) -> str | None:
    """Say how much of the text's routing is inside the pool; None if unknown."""
    known = [(share, index) for index, share in enumerate(layers) if share is not None]
    if coverage is None or not known:
        return None
    lowest, place = min(known)
    return (
        f"{coverage:.3f} of the router's mass is inside, mean over tokens and MoE layers"
        f" (lowest: layer {place}, {lowest:.3f})"
    )
