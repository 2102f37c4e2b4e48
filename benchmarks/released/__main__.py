"""Measure the released size on this machine: every program of this package, then the figure.

They share one random checkpoint of the released sizes. The figure, tokens/s and GiB of pools
beside stock vLLM and other ways to serve, is drawn from the results files only. The weights are
random, so nothing is said about accuracy.

    python -m benchmarks.released --layers 4
    python -m benchmarks.released --only serving pruned --cold
    python -m benchmarks.released --only figure
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from benchmarks.harness.random_checkpoint import RELEASED, write_checkpoint

_OPTIONS = {
    "expert_op": frozenset({"rounds"}),
    "serving": frozenset({"rounds", "model", "directory", "cold"}),
    "pruned": frozenset({"rounds", "model", "directory", "cold"}),
    "llama_cpp": frozenset({"rounds", "model", "directory"}),
    "first_token": frozenset({"rounds", "model", "directory"}),
    "beside_streamed": frozenset({"rounds", "model", "directory"}),
}
"""Program -> those of our options that it has."""

_PAIRS_OF_LLAMA_CPP = ("llama.cpp-2:one", "llama.cpp-2:base")


def command(program: str, options: dict[str, object]) -> list[str]:
    """Return the command of a program with those of the options that are set and that it has."""
    words = [sys.executable, "-m", f"benchmarks.released.{program}"]
    for name in sorted(_OPTIONS[program]):
        value = options.get(name)
        if value is True:
            words.append(f"--{name}")
        elif value:
            words += [f"--{name}", str(value)]
    return words + (["--pairs", *_PAIRS_OF_LLAMA_CPP] if program == "llama_cpp" else [])


def programs(only: Sequence[str]) -> list[str]:
    """Return the programs to run, in their order; say which cannot run here."""
    chosen = [name for name in _OPTIONS if name in only]
    if "llama_cpp" in chosen and find_spec("llama_cpp") is None:
        print("llama_cpp left out: its packages are not installed, see --help of it")
        chosen.remove("llama_cpp")
    return chosen


def main() -> None:
    """Run the programs one after another, then draw."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--layers", type=int, default=4, help="of the released 16 [4]")
    names = [*_OPTIONS, "figure"]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="[all]")
    parser.add_argument("--rounds", type=int, help="counted rounds [each program's own]")
    parser.add_argument("--model", type=Path, help="an existing checkpoint [a temporary one]")
    parser.add_argument("--directory", type=Path, help="for temporary files")
    parser.add_argument("--cold", action="store_true", help="servers start from the disk")
    args = parser.parse_args()
    chosen = programs(args.only)
    with tempfile.TemporaryDirectory(dir=args.directory) as place:
        if args.model is None and any("model" in _OPTIONS[name] for name in chosen):
            sizes = RELEASED | {"num_hidden_layers": args.layers}
            args.model = write_checkpoint(Path(place) / "model", sizes)
        for program in chosen:
            words = command(program, vars(args))
            print(f"\n{' '.join(words[1:])}", flush=True)
            subprocess.run(words, check=True)
    if "figure" in args.only:
        subprocess.run([sys.executable, "-m", "benchmarks.plot", "released_serving"], check=True)


if __name__ == "__main__":
    main()
