"""Short prompts written by hand, fifty per domain: the second set that `auto` is measured on."""

from __future__ import annotations

import json
from pathlib import Path

__all__ = ["PROMPTS", "read_prompts"]

PROMPTS = Path(__file__).parent / "by_hand"


def read_prompts(directory: Path) -> list[tuple[str, str]]:
    """Return domain and text of every prompt in a directory of DOMAIN.jsonl."""
    return [
        (path.stem, json.loads(line))
        for path in sorted(directory.glob("*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
