"""`emo-serve pools build` and `cut`: find a domain's pool from examples; cut it to another size.

`build` runs the examples through the checkpoint and writes a pool file, or with --server has a
server build the pool (`server_commands`); `cut` needs only that file.
Results go to stdout, a progress bar to stderr where that is a terminal. torch, transformers and
tokenizers are imported when a command runs.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from emo_serve.cli.commands import AddCommand
from emo_serve.cli.model_flag import ModelFacts, add_model_flag
from emo_serve.cli.rendering.outcome import coverage_line, found_by, size_line
from emo_serve.cli.rendering.tables import facts, size_range
from emo_serve.cli.server_flags import BUILD_SECONDS, add_server_flags
from emo_serve.errors import ConfigError
from emo_serve.names import check_pool_name
from emo_serve.pools.calibration import DEFAULT_METHOD, METHODS
from emo_serve.pools.document import read_pool, write_pool
from emo_serve.pools.pool import ExpertPool

if TYPE_CHECKING:
    from emo_serve.emo.checkpoint import Checkpoint
    from emo_serve.pools.calibration.examples import Documents
    from emo_serve.pools.calibration.findings import Calibration

__all__ = ["add_build_commands"]

_BUILD = "Find a domain's pool from examples of its text."
_CUT = "Cut a pool to another size by the scores in its file."
_BUILD_EPILOG = """\
A .txt file is one document; a .jsonl file one a line: a string, or an object with "text" or
"messages" (a chat, rendered by the model's template).
layerwise reads only K experts of a layer; router and easy-ep all, one at a time.
With --server the pool is built there by layerwise, beside its requests, and stays there: no
checkpoint is needed here, and no file is written.
"""


def add_build_commands(add: AddCommand, default_model: Path | None) -> None:
    """Add the two commands; `default_model` is what `build` uses without --model."""
    build = add("build", _run_build, _BUILD)
    build.epilog = _BUILD_EPILOG
    build.formatter_class = argparse.RawDescriptionHelpFormatter
    build.add_argument("name", metavar="NAME", help="name of the pool: a-z 0-9 . _ -")
    shipped = " (default: the small model that ships)" if default_model else ""
    build.set_defaults(default_model=default_model)  # so that a --model given can be told
    add_model_flag(build, f"checkpoint directory{shipped}")
    build.add_argument(
        "--examples",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="a .jsonl or .txt; may be several",
    )
    build.add_argument(
        "--experts", type=int, required=True, metavar="K", help="experts a layer to keep"
    )
    build.add_argument(
        "--method", default=DEFAULT_METHOD, help=f"{', '.join(METHODS)} (default: %(default)s)"
    )
    build.add_argument(
        "--out", type=Path, metavar="FILE", help="file to write (default: NAME.json)"
    )
    build.add_argument("--seed", type=int, metavar="N", help="of random's draw (default: 0)")
    build.add_argument("--description", default="", metavar="TEXT", help="kept with the pool")
    build.add_argument(
        "--replace", action="store_true", help="with --server: redefine a pool of that name"
    )
    add_server_flags(build, is_required=False, seconds=BUILD_SECONDS)

    cut = add("cut", _run_cut, _CUT)
    cut.add_argument("path", type=Path, metavar="FILE", help="pool file with scores")
    cut.add_argument(
        "--experts", type=int, required=True, metavar="K", help="experts a layer to keep"
    )
    cut.add_argument("--name", help="name of the cut pool (default: its name, then -K)")
    cut.add_argument(
        "--out", type=Path, metavar="FILE", help="file to write (default: beside FILE, by its name)"
    )
    add_model_flag(
        cut, "checkpoint directory; only for a file that does not say which experts are implied"
    )


# -- build --


def _run_build(arguments: argparse.Namespace) -> int:
    if arguments.server is not None:
        from emo_serve.cli.server_build import run_server_build

        return run_server_build(arguments)
    if arguments.replace:
        raise ConfigError("pools build: --replace is for pools of a server; give --server URL")
    arguments.model = arguments.model or arguments.default_model
    started = time.monotonic()
    out: Path = arguments.out or Path(f"{arguments.name}.json")
    check_pool_name("pools build", arguments.name)
    _check_place(out)
    if arguments.model is None:
        raise ConfigError("pools build: give --model DIR, the checkpoint that the pool is for")
    if arguments.examples is None and arguments.method != "random":
        raise ConfigError("pools build: give --examples FILE; only random does without")
    from emo_serve.emo.checkpoint import Checkpoint
    from emo_serve.pools.calibration.advice import cut_notes, notes
    from emo_serve.pools.calibration.build import (
        calibrate,
        check_request,
        model_record,
        num_steps,
    )

    checkpoint = Checkpoint.open(arguments.model)
    config = checkpoint.config
    seed = arguments.seed or 0
    request = {"method": arguments.method, "k": arguments.experts, "seed": seed}
    check_request(config, **request)
    documents = _read_documents(arguments.examples or [], checkpoint)
    steps = num_steps(config, arguments.method, arguments.experts, len(documents.ids))
    before = _peak_resident_bytes()
    with _progress(steps) as advance:
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
    for note in [*cut_notes(documents), *notes(found, config)]:
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
    return encode_examples(examples, ModelTokenizer(checkpoint.directory), checkpoint.config)


def _outcome(
    pool: ExpertPool, found: Calibration, checkpoint: Checkpoint, out: Path
) -> dict[str, str | None]:
    total = sum(moe.num_experts for moe in checkpoint.config.moe_layers if moe is not None)
    read, most = sum(found.experts_read), max(found.experts_read)
    layers = [None if layer is None else layer.coverage for layer in found.layers]
    return {
        "wrote": str(out),
        "pool": size_line(pool.name, list(map(len, pool.expert_ids))),
        "model": str(checkpoint.directory),
        "found by": found_by(found.method, found.documents, found.tokens),
        "coverage": coverage_line(found.coverage, layers),
        "experts read": f"{read} of {total}, at most {most} of a layer, one held at a time:"
        f" {found.bytes_read / 2**20:.1f} MiB",
    }


def _peak_resident_bytes() -> int:
    """Return the most memory this process has had resident.

    Linux's getrusage counts what the parent had before exec, so its own status file comes first.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        scale = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


@contextmanager
def _progress(steps: int) -> Iterator[Callable[[int], None]]:
    """Show a bar on stderr if it is a terminal."""
    from tqdm import tqdm

    form = "{l_bar}{bar}| {elapsed}<{remaining}"
    bar = tqdm(total=steps, desc="calibrating", bar_format=form, leave=False, disable=None)
    with bar:
        yield bar.update


# -- cut --


def _run_cut(arguments: argparse.Namespace) -> int:
    pool, k = read_pool(arguments.path), arguments.experts
    name = arguments.name or f"{pool.name}-{k}"
    out: Path = arguments.out or arguments.path.with_name(f"{name}.json")
    check_pool_name("pools cut", name)
    _check_place(out)
    _check_cut(arguments.path, pool, k, has_model=arguments.model is not None)
    model = ModelFacts.open(arguments.model)
    if model.layers is not None:
        pool.check_fits(model.layers, model.fingerprint, str(arguments.path))
    cut = replace(pool.cut(k, model.layers), name=name)
    write_pool(cut, out)
    sizes = size_range([len(ids) for ids in cut.expert_ids if ids])
    print(f"wrote {out}: pool {name}, {sizes} experts a layer by the scores of {pool.name}")
    return 0


def _check_cut(path: Path, pool: ExpertPool, k: int, *, has_model: bool) -> None:
    """Refuse what the file does not allow, with the remedy."""
    cannot = f"{path} cannot be cut to {k} experts a layer"
    num_experts = []
    for index, layer in enumerate(pool.layers):
        if layer is not None and layer.scores is None:
            raise ConfigError(
                f"{cannot}: layer {index} has no scores, only the {len(layer.experts)} experts it"
                " keeps; find the pool again with emo-serve pools build"
            )
        if layer is not None and layer.scores is not None:
            num_experts.append(len(layer.scores))
    if k > max(num_experts, default=0):
        raise ConfigError(f"{cannot}: the layers have {size_range(num_experts)}; give fewer")
    if not has_model and (pool.model is None or pool.model.implied is None):
        raise ConfigError(
            f"{cannot} by itself: it does not name the shared and always-active experts, which no"
            " pool goes without; give --model DIR"
        )


def _check_place(out: Path) -> None:
    """Refuse a place that cannot be written before anything long is done."""
    if out.is_dir():
        raise ConfigError(f"--out {out} is a directory; give the file to write")
    if not out.parent.is_dir():
        raise ConfigError(f"--out {out}: there is no directory {out.parent}")
    if not os.access(out.parent, os.W_OK):
        raise ConfigError(f"--out {out}: {out.parent} cannot be written to")
