"""Check every family on a real server: tiny random models, pools mixed, against transformers.

    python -m benchmarks.families.check                       # V1 runner, eager
    python -m benchmarks.families.check --compiled
    python -m benchmarks.families.check --runner v2           # in Triton's interpreter
    python -m benchmarks.families.check --ranks 2
    python -m benchmarks.families.check --everything          # all that is asked of pools
    python -m benchmarks.families.check --opt-out --families flex-olmo
    python -m benchmarks.families.check --write DIRECTORY     # only write the checkpoints and pools

For each family it writes a checkpoint and three pools, starts `emo-serve serve` with fewer slots
than the model has experts, asks for the same prompts in every pool at once, and prints the largest
difference of any prompt token's log-probability from transformers' on the model with all other
experts sliced away (for EMO, from the released code's). A difference above 1e-4 nats ends it with
status 1. `--everything` also loads, evicts, joins, cuts and builds pools there. `--opt-out`
starts a second server, whose checkpoint has nan in all experts that no pool has: it must give the
same answers, bit for bit, and read as few bytes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import transformers

from benchmarks.families.cases import FAMILIES, Case, case_of, largest_difference, write_pools
from benchmarks.families.served import Variant, served
from benchmarks.families.walk import asked_of_pools, bytes_needed, refused_offline, spoilt
from benchmarks.harness.progress import say, steps

__all__ = ["TOLERANCE", "main"]

TOLERANCE = 1e-4
_ROW = "{:<12}{:<11}{:<14}{:<23}{}"


def main(argv: Sequence[str] | None = None) -> int:
    """Check the families asked for; print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--compiled", action="store_true", help="without --enforce-eager")
    parser.add_argument("--runner", choices=("v1", "v2"), default="v1")
    parser.add_argument("--ranks", type=int, default=1, help="--tensor-parallel-size")
    parser.add_argument("--everything", action="store_true", help="all that is asked of pools")
    parser.add_argument("--opt-out", action="store_true", help="a server with nan, and one without")
    parser.add_argument("--write", type=Path, help="write checkpoints and pools here, and end")
    arguments = parser.parse_args(argv)
    variant = Variant(arguments.compiled, arguments.runner, arguments.ranks)
    transformers.utils.logging.disable_progress_bar()
    worst = 0.0
    with tempfile.TemporaryDirectory() as scratch:
        root = arguments.write or Path(scratch)
        say(_ROW.format("family", "slots of", "experts of", "check", "worst, nats"))
        for family in steps(arguments.families, "families"):
            case = case_of(family, root)
            pools_dir = write_pools(case.pools, root / f"{family}-pools")
            if arguments.write:
                continue
            for check, found in _checks(case, pools_dir, variant, arguments):
                worst = max(worst, found)
                say(_row(case, check, found))
    return int(worst > TOLERANCE)


def _row(case: Case, check: str, found: float) -> str:
    slots = f"{case.slots} of {case.num_experts}" if case.slots else "dense"
    sizes = ", ".join(str(max(map(len, layers))) for layers in case.pools.values())
    return _ROW.format(case.family, slots, sizes, check, f"{found:.1e}")


def _checks(
    case: Case, pools_dir: Path, variant: Variant, arguments: argparse.Namespace
) -> Iterator[tuple[str, float]]:
    if arguments.opt_out:
        yield "opted out", _opted_out(case, pools_dir, variant)
        return
    has_more = arguments.everything and case.expected is not None
    with served(case, pools_dir, variant) as server:
        together = server.together(case.pools, case.texts)
        yield "pools mixed", largest_difference(together, case.answers)
        if has_more:
            yield from asked_of_pools(case, server).items()
    if has_more:
        refused_offline(case, pools_dir)


def _opted_out(case: Case, pools_dir: Path, variant: Variant) -> float:
    """Ask a server whose other experts are nan, and one whose are not: all bits and bytes read."""
    directory = spoilt(case, case.directory.with_name(f"{case.family}-spoilt"))
    answers, read = [], []
    for each in (case.directory, directory):
        with served(case, pools_dir, variant, each) as server:
            answers.append(server.one_by_one(case.pools, case.texts))
            read.append(server.counted("emo_serve_file_read_bytes_total"))
    if answers[0] != answers[1] or set(read) != {bytes_needed(case)}:
        raise SystemExit(
            f"{case.family}: an expert that no pool has changed an answer, or was read:"
            f" {read} bytes of {bytes_needed(case)}"
        )
    return largest_difference(answers[1], case.answers)


if __name__ == "__main__":
    sys.exit(main())
