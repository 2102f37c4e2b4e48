"""Everything that is asked of pools, on a server of one case that runs already.

Loads and evictions, unions, a build on the server, its sizes, coverage, usage, `auto` and the base
pool; each pool that comes of it answers as transformers' model of its experts alone. Then what is
refused.
"""

from __future__ import annotations

import contextlib
import io
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from benchmarks.families.cases import Case, largest_difference
from benchmarks.families.oracle import Pool
from benchmarks.families.served import Served
from emo_serve.cli.main import main as cli
from emo_serve.families.opening import open_checkpoint

__all__ = ["asked_of_pools", "bytes_needed", "refused_offline", "spoilt"]

_EXAMPLES = ["def f(x):\n    return x\n", "import os\n\nprint(os.name)\n"]
_OTHERS = "others"  # a pool of what no other pool has


def asked_of_pools(case: Case, server: Served) -> dict[str, float]:
    """Return the largest difference by what was asked; ends the program for a wrong answer."""
    assert case.expected is not None, case.family
    walk = _Walk(case, server)
    return {
        "evicted, loaded again": walk.evicted(),
        "union": walk.union(),
        "built, size": walk.built(),
        "base, streamed": walk.streamed(),
    }


class _Walk:
    def __init__(self, case: Case, server: Served) -> None:
        self.case, self.server = case, server

    def difference(self, pools: dict[str, Pool]) -> float:
        assert self.case.expected is not None
        texts = self.case.texts[:1]
        got = self.server.one_by_one(pools, texts)
        return largest_difference(got, self.case.expected(pools, texts))

    def require(self, is_so: bool, what: str, found: object) -> None:
        if not is_so:
            raise SystemExit(f"{self.case.family}: expected {what}, found {found}")

    def evicted(self) -> float:
        """Load the experts that have no slot, as a pool; then ask for all other pools again."""
        case, server = self.case, self.server
        layers = [{"experts": ids} if ids else None for ids in case.others]
        server.post("/v1/pools", {"format": "emo-pool/1", "name": _OTHERS, "layers": layers})
        default = next(iter(case.pools.values()))
        worst = self.difference({_OTHERS: case.others, **case.pools, "tiny": default})
        evictions = server.counted("emo_serve_pool_evictions_total")
        loads = server.counted("emo_serve_pool_loads_total")
        self.require(evictions >= 2 and loads >= 4, "4 loads, 2 evictions", (loads, evictions))
        slots = server.get("/v1/pools")["slots"]
        moe_layers = sum(1 for ids in case.others if ids)
        self.require(slots["total"] == case.slots * moe_layers, "few slots", slots)
        return worst

    def union(self) -> float:
        first, second = list(self.case.pools)[:2]
        layers = zip(self.case.pools[first], self.case.pools[second], strict=True)
        return self.difference({f"{first}+{second}": [sorted({*a, *b}) for a, b in layers]})

    def built(self) -> float:
        """Build a pool here; ask for it and for its best experts; read coverage and usage."""
        server, size = self.server, max(2, self.case.slots // 2)
        built = server.post("/v1/pools", {"name": "built", "examples": _EXAMPLES, "experts": size})
        self.require(0 < built["calibration"]["coverage"] < 1, "a coverage", built)
        pools = {
            name: server.get(f"/v1/pools/{name}")["experts"]
            for name in ("built", f"built@{size - 1}")
        }
        sizes = [{len(ids) for ids in kept if ids} for kept in pools.values()]
        self.require(sizes == [{size}, {size - 1}], "the sizes asked for", sizes)
        worst = self.difference(pools)
        body = {"model": "built", "prompt": "def", "max_tokens": 4, "temperature": 0}
        report = server.post("/v1/completions", body, **{"x-emo-coverage": "true"})["emo_serve"]
        self.require(0 < report["coverage"] < 1, "a coverage", report)
        usage = server.get("/v1/pools/built/usage")
        self.require(usage["tokens"] >= len(self.case.texts[0]), "usage", usage)
        chosen = server.http.post("/v1/completions", json={**body, "model": "auto"})
        pool = chosen.headers.get("x-emo-pool", chosen.text)
        self.require(pool in {*self.case.pools, _OTHERS, "built"}, "a pool chosen", pool)
        return worst

    def streamed(self) -> float:
        """Ask for the base pool, which has more experts than there are slots."""
        layers = zip(self.case.others, *self.case.pools.values(), strict=True)
        return self.difference({"base": [sorted(set().union(*layer)) for layer in layers]})


def refused_offline(case: Case, out: Path) -> None:
    """Check that a build and an export without a server are refused, with the other way."""
    pool, model = out / "a.json", ["--model", str(case.directory)]
    build = ["pools", "build", "p", "--experts", "2", "--method", "random", *model]
    export = ["pools", "export", str(pool), *model, "--out", str(out / "export")]
    for arguments, other_way in (
        ([*build, "--out", str(out / "p.json")], "--server URL"),
        (export, "serve the pool"),
    ):
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            status = cli(arguments)
        if (
            not status
            or "no reference model" not in said.getvalue()
            or other_way not in said.getvalue()
        ):
            raise SystemExit(f"{case.family}: {arguments}: {status}: {said.getvalue()}")


# -- opting out --


def spoilt(case: Case, directory: Path) -> Path:
    """Copy a case's checkpoint; in the copy all weights of experts that no pool has are nan."""
    shutil.copytree(case.directory, directory)
    names = open_checkpoint(directory).facts.names
    path = directory / "model.safetensors"
    tensors: dict[str, Any] = load_file(path)
    for name, tensor in tensors.items():
        place = names.parse(name)
        if place is not None and place[1] in case.others[place[0]]:
            tensor.fill_(float("nan"))
    save_file(tensors, path, metadata={"format": "pt"})
    return directory


def bytes_needed(case: Case) -> int:
    """Return the bytes of all experts that pools have: what loads may read."""
    layers = zip(*case.pools.values(), strict=True)
    count = sum(len(set().union(*layer)) for layer in layers)
    return count * open_checkpoint(case.directory).expert_bytes
