"""lm_eval's tasks against the endpoint: `local-completions` with tokenized requests.

Nothing here depends on lm_eval: it is imported only to see whether it is installed, and runs in a
process of its own. Its tasks come from the Hugging Face hub, or from a directory of task files
given by `--lm-eval-flags "--include_path DIR"`. By default it leaves out the token with which a
tokenizer begins every text; a model that was trained with one gets it here too.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from emo_serve.emo.tokenizer import ModelTokenizer

__all__ = ["check_installed", "command", "run_lm_eval"]


def check_installed() -> None:
    """End the benchmark, saying what to install, unless lm_eval can be imported."""
    if find_spec("lm_eval") is None:
        raise SystemExit(
            "--lm-eval needs lm_eval, which is not installed here:"
            f' {sys.executable} -m pip install "lm_eval[api]"'
        )


def command(
    url: str, model: str, tokenizer: Path, tasks: str, flags: Sequence[str], output: Path
) -> list[str]:
    """Return the command that evaluates the pool called `model`."""
    arguments = {
        "model": model,
        "base_url": f"{url}/v1/completions",
        "tokenizer": str(tokenizer),
        "tokenized_requests": "True",
        "add_bos_token": str(bool(ModelTokenizer(tokenizer).encode(""))),
        "num_concurrent": "8",
        "max_retries": "3",
    }
    joined = ",".join(f"{key}={value}" for key, value in arguments.items())
    start = [sys.executable, "-m", "lm_eval", "--model", "local-completions"]
    place = ["--output_path", str(output)]
    return [*start, "--model_args", joined, "--tasks", tasks, *place, *flags]


def run_lm_eval(
    url: str, model: str, tokenizer: Path, tasks: str, flags: Sequence[str]
) -> dict[str, Any]:
    """Return lm_eval's results for each task; errors show in its own output."""
    with tempfile.TemporaryDirectory() as directory:
        done = subprocess.run(
            command(url, model, tokenizer, tasks, flags, Path(directory)), check=False
        )
        files = sorted(Path(directory).rglob("results*.json"))
        if done.returncode or not files:
            raise SystemExit(
                f"lm_eval ended with status {done.returncode} and {len(files)} results files; its"
                " output is above. Tasks need the Hugging Face hub, or --lm-eval-flags"
                ' "--include_path DIR" with tasks that read local files'
            )
        results: dict[str, Any] = json.loads(files[-1].read_text())["results"]
        return results
