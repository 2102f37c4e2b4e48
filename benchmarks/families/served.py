"""A real `emo-serve serve` of a case, and what a client asks of it."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks.families.cases import Case, Logprobs
from benchmarks.harness.results import ROOT
from benchmarks.harness.servers import ServerProcess

__all__ = ["Served", "Variant", "served"]

_V2_ON_CPU = ROOT / "tests" / "engine" / "plugin" / "v2_on_cpu"
_FLAGS = (
    *("--served-model-name", "tiny", "--dtype", "float32", "--max-model-len", "128"),
    *("--max-num-batched-tokens", "256", "--max-num-seqs", "16", "--auto-tokens", "32"),
)
_LAST_LINES = 60  # of the log of a server that failed


@dataclass(frozen=True)
class Variant:
    """How the engine runs: compiled or not, by which of vLLM's runners, on how many ranks."""

    is_compiled: bool = False
    runner: str = "v1"
    ranks: int = 1

    @property
    def flags(self) -> tuple[str, ...]:
        """Return its flags."""
        ranks = ("--tensor-parallel-size", str(self.ranks))
        return ranks if self.is_compiled else (*ranks, "--enforce-eager")

    @property
    def variables(self) -> Mapping[str, str]:
        """Return its environment, on a CPU: a core per rank, Triton's interpreter for V2."""
        variables = {"VLLM_CPU_KVCACHE_SPACE": "1"}
        if self.ranks > 1:  # vLLM refuses to choose cores where memory has one node only
            cores = sorted(os.sched_getaffinity(0))
            of_rank = (str(cores[rank % len(cores)]) for rank in range(self.ranks))
            variables["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(of_rank)
        if self.runner == "v2":
            variables |= {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
            places = (_V2_ON_CPU, ROOT, ROOT / "kernels")
            variables["PYTHONPATH"] = ":".join(map(str, places))
        return variables


class Served:
    """A running server."""

    def __init__(self, url: str) -> None:
        self.http = httpx.Client(base_url=url, timeout=600)
        self._url = url

    def together(self, pools: Iterable[str], texts: Sequence[Sequence[int]]) -> Logprobs:
        """Ask for every text in every pool at once; return the texts' log-probabilities."""
        return asyncio.run(self._together(list(pools), texts))

    def one_by_one(self, pools: Iterable[str], texts: Sequence[Sequence[int]]) -> Logprobs:
        """Ask one request after another, so that each step of the engine has the same tokens."""
        return {
            pool: [
                _logprobs(
                    self._checked(self.http.post("/v1/completions", json=_body(pool, ids))), ids
                )
                for ids in texts
            ]
            for pool in pools
        }

    async def _together(self, pools: list[str], texts: Sequence[Sequence[int]]) -> Logprobs:
        async with httpx.AsyncClient(base_url=self._url, timeout=600) as client:
            asked = [(pool, ids) for pool in pools for ids in texts]
            answers = await asyncio.gather(
                *(client.post("/v1/completions", json=_body(pool, ids)) for pool, ids in asked)
            )
        found: Logprobs = {pool: [] for pool in pools}
        for (pool, ids), answer in zip(asked, answers, strict=True):
            found[pool].append(_logprobs(self._checked(answer), ids))
        return found

    def get(self, path: str) -> Any:
        """Return the answer's body."""
        return self._checked(self.http.get(path))

    def post(self, path: str, body: Mapping[str, Any], **headers: str) -> Any:
        """Return the answer's body."""
        return self._checked(self.http.post(path, json=body, headers=headers))

    def counted(self, name: str) -> float:
        """Return the sum of a metric over its labels."""
        lines = self.http.get("/metrics").text.splitlines()
        found = (re.fullmatch(rf"{name}(?:{{.*}})? (\S+)", line) for line in lines)
        return sum(float(match[1]) for match in found if match)

    @staticmethod
    def _checked(answer: httpx.Response) -> Any:
        if not answer.is_success:
            raise SystemExit(f"{answer.request.url}: {answer.status_code}: {answer.text}")
        return answer.json()


def _body(pool: str, ids: Sequence[int]) -> dict[str, Any]:
    return {"model": pool, "prompt": list(ids), "max_tokens": 1, "prompt_logprobs": 0}


def _logprobs(answer: Any, ids: Sequence[int]) -> list[float]:
    entries = answer["choices"][0]["prompt_logprobs"][1:]
    return [
        float(entry[str(token)]["logprob"]) for entry, token in zip(entries, ids[1:], strict=True)
    ]


@contextmanager
def served(
    case: Case, pools_dir: Path, variant: Variant, directory: Path | None = None
) -> Iterator[Served]:
    """Serve a case, from another directory if one is given, in as few slots as it says."""
    directory = directory or case.directory
    command = [sys.executable, "-m", "emo_serve", "serve", str(directory), *_FLAGS, *variant.flags]
    if case.slots:
        command += ["--pools", str(pools_dir), "--expert-slots", str(case.slots)]
        command += ["--default-pool", next(iter(case.pools))]
    log = directory / "server.log"
    with log.open("wb") as errors:
        try:
            with ServerProcess(command, None, variant.variables, errors=errors) as server:
                yield Served(server.url)
        except SystemExit as ended:
            last_lines = log.read_text(errors="replace").splitlines()[-_LAST_LINES:]
            raise SystemExit("\n".join([*last_lines, str(ended)])) from None
