"""The tiny shipped EMO: models, pools and held-out texts, as files inside the package.

These functions locate the files and read the texts; they import nothing heavy. README.md beside
this file says how the files were made; `emo-serve demo train` makes them again.
"""

from __future__ import annotations

import json
from pathlib import Path

__all__ = [
    "DEMO_MODEL",
    "MODELS",
    "TWIN_MODEL",
    "domains",
    "heldout",
    "heldout_dir",
    "model_dir",
    "pools_dir",
]

DEMO_MODEL = "emo-demo"
TWIN_MODEL = "standard-moe-demo"  # the same model, trained without EMO's rule
MODELS = (DEMO_MODEL, TWIN_MODEL)
_ROOT = Path(__file__).resolve().parent


def model_dir(name: str = DEMO_MODEL) -> Path:
    """Return the directory of a shipped checkpoint."""
    return _ROOT / "models" / name


def pools_dir(name: str = DEMO_MODEL) -> Path:
    """Return the directory of the pool files made for a shipped checkpoint."""
    return _ROOT / "pools" / name


def heldout_dir() -> Path:
    """Return the directory of the held-out texts, one file per domain: NAME.jsonl."""
    return _ROOT / "heldout"


def domains() -> list[str]:
    """Return the domains in alphabetic order; each names a pool and held-out texts."""
    return sorted(path.stem for path in heldout_dir().glob("*.jsonl"))


def heldout(domain: str) -> list[str]:
    """Return the domain's held-out texts, which neither models nor pools were made from."""
    lines = (heldout_dir() / f"{domain}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]
