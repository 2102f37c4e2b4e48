"""llama.cpp on an OLMoE of the released sizes in bfloat16: the mark for CPU kernels.

Decoding and prefill as in `serving`, with the same checkpoint's weights and the same prompts, in
turn with one of its servers or with another number of threads. What differs, all in favour of
llama.cpp but the last: it is called in this process, without HTTP or a scheduler; all streams
start in one step; its tokens choose among all experts, where pools have 16 (`base` has them all).
See `gguf_file` for what an OLMoE is to an EMO.

    llama.cpp-N     llama.cpp with N threads
    one, base ...   the servers of `serving`; with "-spare" they leave a core

    python -m benchmarks.released.llama_cpp --layers 4
    python -m benchmarks.released.llama_cpp --pairs llama.cpp-2:one llama.cpp-2:base

It needs two packages that emo-serve does not, of which the first is compiled:

    CMAKE_ARGS=-DGGML_NATIVE=ON pip install llama-cpp-python gguf
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.harness.results import append_result
from benchmarks.released.checkpoint import checkpoint_of
from benchmarks.released.gguf_file import write_gguf
from benchmarks.released.serving import (
    LOADS,
    Load,
    Server,
    Target,
    add_load_options,
    compare,
    prompts_of,
    write_pool_files,
)

INSTALL = "CMAKE_ARGS=-DGGML_NATIVE=ON pip install llama-cpp-python gguf"
_KIND = "llama.cpp-"
_CLIENTS = max(sent.clients for sent in LOADS)
_CONTEXT = max(sent.prompt + sent.tokens for sent in LOADS)
_MOST_FED = max(sent.clients * sent.prompt for sent in LOADS)


class Model:
    """A GGUF file mapped into this process, and a context of as many sequences as clients."""

    def __init__(self, gguf: Path) -> None:
        import llama_cpp

        self.api = llama_cpp
        before = _own_bytes()
        llama_cpp.llama_log_set(_SILENT, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        settings = llama_cpp.llama_model_default_params()
        model = llama_cpp.llama_model_load_from_file(str(gguf).encode(), settings)
        if model is None:
            raise SystemExit(f"llama.cpp does not load {gguf}")
        params = llama_cpp.llama_context_default_params()
        params.n_seq_max = _CLIENTS
        params.n_ctx = _CLIENTS * _CONTEXT
        self._context = llama_cpp.llama_init_from_model(model, params)
        self._batch = llama_cpp.llama_batch_init(_MOST_FED, 0, 1)
        self.set_threads(1)
        vocabulary = llama_cpp.llama_model_get_vocab(model)
        self._num_tokens = llama_cpp.llama_vocab_n_tokens(vocabulary)
        self.generate([prompt[:8] for prompt in prompts_of("one")[:_CLIENTS]], 2)
        self.own_bytes = _own_bytes() - before

    def set_threads(self, threads: int) -> None:
        """Compute with so many threads from now on."""
        self.api.llama_set_n_threads(self._context, threads, threads)

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> tuple[float, float]:
        """Answer prompts of one length together; return seconds to the first tokens and to the end.

        Greedy, and of exactly `tokens` tokens, as the servers answer.
        """
        start = time.perf_counter()
        self.api.llama_memory_clear(self.api.llama_get_memory(self._context), False)
        chosen = self._step(prompts, 0)
        first = time.perf_counter() - start
        for position in range(len(prompts[0]), len(prompts[0]) + tokens - 1):
            chosen = self._step([[token] for token in chosen], position)
        return first, time.perf_counter() - start

    def _step(self, fed: Sequence[Sequence[int]], position: int) -> list[int]:
        """Feed each sequence its tokens from a position on; return the likeliest next ones."""
        batch, place = self._batch, 0
        for sequence, tokens in enumerate(fed):
            for offset, token in enumerate(tokens):
                batch.token[place] = token
                batch.pos[place] = position + offset
                batch.n_seq_id[place] = 1
                batch.seq_id[place][0] = sequence
                batch.logits[place] = offset == len(tokens) - 1
                place += 1
        batch.n_tokens = place
        status = self.api.llama_decode(self._context, batch)
        if status != 0:
            raise SystemExit(f"llama_decode returned {status} for {place} tokens")
        logits = self.api.llama_get_logits(self._context)
        rows = np.ctypeslib.as_array(logits, (len(fed), self._num_tokens))
        chosen: list[int] = rows.argmax(1).tolist()
        return chosen


class Threads:
    """The model with a number of threads, measured as a server is."""

    def __init__(self, model: Model, threads: int) -> None:
        self._model, self._threads = model, threads
        self.kind = f"{_KIND}{threads}"

    def rate(self, sent: Load) -> float:
        """Return tokens/s: of the prompt for prefill, of the answers for decoding."""
        self._model.set_threads(self._threads)
        prompts = [prompt[: sent.prompt] for prompt in prompts_of("one")]
        supply = cycle(prompts)
        times = [
            self._model.generate(list(islice(supply, sent.clients)), sent.tokens)
            for _ in range(sent.requests)
        ]
        if sent.what == "prefill":
            return sent.prompt / statistics.median(first for first, _ in times)
        return sent.clients * sent.requests * sent.tokens / sum(whole for _, whole in times)


def _own_bytes() -> int:
    return int(psutil.Process().memory_full_info().pss)


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def _SILENT(level: int, text: bytes, user_data: object) -> None:
    """Drop what llama.cpp logs."""


def threads_of(kind: str) -> int | None:
    """Return the threads of a kind of llama.cpp, None for a server's."""
    return int(kind.removeprefix(_KIND)) if kind.startswith(_KIND) else None


def main() -> None:
    """Make the file, measure each pair, print a table, append a result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--layers", type=int, default=4, help="of the released 16 [4]")
    parser.add_argument("--pairs", nargs="+", default=["llama.cpp-1:llama.cpp-2"], help="A:B ...")
    add_load_options(parser, rounds=3)
    parser.add_argument("--model", type=Path, help="an existing checkpoint [a temporary one]")
    parser.add_argument("--gguf", type=Path, help="of the checkpoint, made if absent [temporary]")
    parser.add_argument("--directory", type=Path, help="for the temporary files")
    args = parser.parse_args()
    if missing := [name for name in ("llama_cpp", "gguf") if find_spec(name) is None]:
        sys.exit(f"{' and '.join(missing)} not installed: {INSTALL}")
    flags = ["--enforce-eager"]
    rows: list[dict[str, Any]] = []
    figures: dict[str, dict[str, float]] = {}
    with ExitStack() as stack:
        place, model = stack.enter_context(checkpoint_of(args))
        pools = write_pool_files(place / "pools", model)
        gguf = args.gguf or place / "model.gguf"
        llama = Model(gguf if gguf.exists() else write_gguf(gguf, model))
        figures["llama.cpp"] = {"own_gib": llama.own_bytes / 2**30}
        print(f"llama.cpp: {llama.own_bytes / 2**30:.2f} GiB", flush=True)
        print("| A, B | load | clients | A tok/s | B tok/s | B/A (min-max) |")
        print("|---|---|---|---|---|---|")
        for pair in args.pairs:
            with ExitStack() as of_pair:
                targets: list[Target] = []
                for kind in pair.split(":"):
                    threads = threads_of(kind)
                    if threads is not None:
                        targets.append(Threads(llama, threads))
                        continue
                    server = of_pair.enter_context(Server(kind, model, pools, flags))
                    own = server.own_bytes() / 2**30
                    figures[kind] = {"start_seconds": server.start_seconds, "own_gib": own}
                    server.pause()
                    targets.append(server)
                rows += compare(*targets, args.rounds, args.loads)
    system = llama.api.llama_print_system_info().decode()
    append_result(
        "released_llama_cpp", vars(args), {"rows": rows, "servers": figures, "system": system}
    )


if __name__ == "__main__":
    main()
