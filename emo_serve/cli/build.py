"""`emo-serve pools build` and `cut`: find a domain's pool from examples; cut it to another size.

`build` runs the examples through the checkpoint and writes a pool file, or with --server lets a
server build the pool (`server_build`). `cut` needs only the pool file. Results go to stdout, a
progress bar to stderr if that is a terminal. torch, transformers and tokenizers are imported when a
command runs.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from emo_serve.cli.commands import AddCommand
from emo_serve.cli.model_flag import KnownModel, add_model_flag, directory_of
from emo_serve.cli.progress import steps_of
from emo_serve.cli.rendering.outcome import coverage_line, found_by, size_line
from emo_serve.cli.rendering.tables import facts, size_range
from emo_serve.cli.server_flags import BUILD_SECONDS, add_server_flags
from emo_serve.errors import ConfigError
from emo_serve.names import NAME_RULE, check_pool_name
from emo_serve.pools.calibration import DEFAULT_METHOD, METHODS
from emo_serve.pools.document import read_pool, write_pool
from emo_serve.pools.limits import check_text
from emo_serve.pools.pool import ExpertPool

if TYPE_CHECKING:
    from emo_serve.emo.checkpoint import Checkpoint
    from emo_serve.pools.calibration.examples import Documents
    from emo_serve.pools.calibration.findings import Calibration

__all__ = ["add_build_commands"]

_BUILD = "Find a domain's pool from examples of its text."
_CUT = "Cut a pool to another size by the scores in its file."
_BUILD_EPILOG = """\
A .txt file is one document. A .jsonl file has one document per line: a string, or an object with
"text" or "messages" (a chat, rendered by the model's template).
layerwise reads only K experts per layer; router and easy-ep read all, one at a time.
With --server the server builds the pool by layerwise, while it serves requests, and keeps it: no
checkpoint is needed here, and no file is written here.
"""


def add_build_commands(add: AddCommand, default_model: Path | None) -> None:
    """Add the two commands; `default_model` is what `build` uses without --model."""
    build = add("build", _run_build, _BUILD)
    build.epilog = _BUILD_EPILOG
    build.formatter_class = argparse.RawDescriptionHelpFormatter
    build.add_argument("name", metavar="NAME", help=f"name of the pool: {NAME_RULE}")
    shipped = " (default: the small shipped model)" if default_model else ""
    build.set_defaults(default_model=default_model)  # so that a given --model is recognized
    add_model_flag(build, f"checkpoint of the model{shipped}")
    build.add_argument(
        "--examples",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="one or more .jsonl or .txt files",
    )
    build.add_argument(
        "--experts", type=int, required=True, metavar="K", help="experts per layer to keep"
    )
    build.add_argument(
        "--method", default=DEFAULT_METHOD, help=f"{', '.join(METHODS)} (default: %(default)s)"
    )
    build.add_argument(
        "--out", type=Path, metavar="FILE", help="file to write (default: NAME.json)"
    )
    build.add_argument(
        "--seed", type=int, metavar="N", help="seed of the method random (default: 0)"
    )
    build.add_argument("--description", default="", metavar="TEXT", help="stored with the pool")
    build.add_argument(
        "--replace",
        action="store_true",
        help="with --server: redefine an existing pool of that name",
    )
    add_server_flags(build, seconds=BUILD_SECONDS)

    cut = add("cut", _run_cut, _CUT)
    cut.add_argument("path", type=Path, metavar="FILE", help="pool file that has scores")
    cut.add_argument(
        "--experts", type=int, required=True, metavar="K", help="experts per layer to keep"
    )
    cut.add_argument("--name", help="name of the cut pool (default: NAME-K)")
    cut.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="file to write (default: the new name, beside FILE)",
    )
    add_model_flag(
        cut, "checkpoint of the model; only for a file that does not say which experts are implied"
    )


# -- build --


def _run_build(arguments: argparse.Namespace) -> int:
    if arguments.server is not None:
        from emo_serve.cli.server_build import run_server_build

        return run_server_build(arguments)
    if arguments.replace:
        raise ConfigError("pools build: --replace needs a server; give --server URL")
    arguments.model = arguments.model or arguments.default_model
    started = time.monotonic()
    out: Path = arguments.out or Path(f"{arguments.name}.json")
    check_pool_name("pools build", arguments.name)
    check_text("pools build", "description", arguments.description)
    _check_place(out)
    if arguments.model is None:
        raise ConfigError("pools build: give --model MODEL, the pool's checkpoint")
    if arguments.examples is None and arguments.method != "random":
        raise ConfigError("pools build: give --examples FILE; only random needs none")
    from emo_serve.families.opening import open_with_reference
    from emo_serve.pools.calibration.advice import cut_notes, notes
    from emo_serve.pools.calibration.build import (
        calibrate,
        check_request,
        model_record,
        num_steps,
    )

    checkpoint = open_with_reference(
        *(directory_of(arguments.model), "pools build"),
        "start emo-serve serve and build there: --server URL",
    )
    model_facts = checkpoint.facts
    seed = arguments.seed or 0
    request = {"method": arguments.method, "k": arguments.experts, "seed": seed}
    check_request(model_facts, **request)
    documents = _read_documents(arguments.examples or [], checkpoint)
    steps = num_steps(model_facts, arguments.method, arguments.experts, len(documents.ids))
    before = _peak_resident_bytes()
    with steps_of("calibrating", steps) as advance:
        found = calibrate(checkpoint, documents.ids, **request, advance=advance)
    pool = found.pool(arguments.name, model_record(checkpoint), arguments.description)
    write_pool(pool, out)
    rows = _outcome(pool, found, checkpoint, out)
    peak = _peak_resident_bytes()
    rows["peak memory"] = (
        f"{peak / 2**20:.0f} MiB resident, {before / 2**20:.0f} MiB before the run"
    )
    rows["took"] = f"{time.monotonic() - started:.1f} s"
    print(facts(rows))
    for note in [*cut_notes(documents), *notes(found, model_facts)]:
        print(f"note: {note}")
    print(f"\nserve it:    emo-serve serve {arguments.model} --pools {out.parent}")
    print(f"or add it:   emo-serve pools add {out} --server URL")
    print(f'then ask:    "model": "{pool.name}"')
    return 0


def _read_documents(paths: list[Path], checkpoint: Checkpoint) -> Documents:
    from emo_serve.emo.tokenizer import ModelTokenizer
    from emo_serve.pools.calibration.examples import Documents, encode_examples, read_examples

    if not paths:
        return Documents(())
    examples = read_examples(paths)
    return encode_examples(examples, ModelTokenizer(checkpoint.directory), checkpoint.facts)


def _outcome(
    pool: ExpertPool, found: Calibration, checkpoint: Checkpoint, out: Path
) -> dict[str, str | None]:
    total = sum(checkpoint.facts.experts_per_layer)
    read, most = sum(found.experts_read), max(found.experts_read)
    layers = [None if layer is None else layer.coverage for layer in found.layers]
    return {
        "wrote": str(out),
        "pool": size_line(pool.name, list(map(len, pool.expert_ids))),
        "model": str(checkpoint.directory),
        "found by": found_by(found.method, found.documents, found.tokens),
        "coverage": coverage_line(found.coverage, layers),
        "experts read": f"{read} of {total}, at most {most} per layer, one in memory at a time:"
        f" {found.bytes_read / 2**20:.1f} MiB",
    }


def _peak_resident_bytes() -> int:
    """Return the peak resident memory of this process.

    On Linux getrusage includes the parent's peak before exec, so /proc is read first.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        scale = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


# -- cut --


def _run_cut(arguments: argparse.Namespace) -> int:
    pool, k = read_pool(arguments.path), arguments.experts
    name = arguments.name or f"{pool.name}-{k}"
    out: Path = arguments.out or arguments.path.with_name(f"{name}.json")
    check_pool_name("pools cut", name)
    _check_place(out)
    _check_cut(arguments.path, pool, k, has_model=arguments.model is not None)
    model = KnownModel.open(arguments.model)
    if model.layers is not None:
        pool.check_fits(model.layers, model.fingerprint, str(arguments.path))
    cut = replace(pool.cut(k, model.layers), name=name)
    write_pool(cut, out)
    sizes = size_range([len(ids) for ids in cut.expert_ids if ids])
    print(f"wrote {out}: pool {name}, {sizes} experts per layer by the scores of {pool.name}")
    return 0


def _check_cut(path: Path, pool: ExpertPool, k: int, *, has_model: bool) -> None:
    """Raise ConfigError, with the remedy, if the file cannot be cut to `k`."""
    cannot = f"{path} cannot be cut to {k} experts per layer"
    num_experts = []
    for index, layer in enumerate(pool.layers):
        if layer is not None and layer.scores is None:
            raise ConfigError(
                f"{cannot}: layer {index} has no scores, only the {len(layer.experts)} experts"
                " kept; build the pool again with emo-serve pools build"
            )
        if layer is not None and layer.scores is not None:
            num_experts.append(len(layer.scores))
    if k > max(num_experts, default=0):
        raise ConfigError(f"{cannot}: the layers have {size_range(num_experts)}; give fewer")
    if not has_model and (pool.model is None or pool.model.implied is None):
        raise ConfigError(
            f"{cannot} by itself: it does not list the shared and always-active experts, which"
            " belong to every pool; give --model DIR"
        )


def _check_place(out: Path) -> None:
    """Raise ConfigError for a file that cannot be written, before anything slow is done."""
    if out.is_dir():
        raise ConfigError(f"--out {out} is a directory; give the file to write")
    if not out.parent.is_dir():
        raise ConfigError(f"--out {out}: there is no directory {out.parent}")
    if not os.access(out.parent, os.W_OK):
        raise ConfigError(f"--out {out}: {out.parent} cannot be written to")
