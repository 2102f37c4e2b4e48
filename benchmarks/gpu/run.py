"""What the stages of one call share: the device, the deadline, the table of tiles, the results."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.results import append_result
from benchmarks.kernels.timing import Deadline
from benchmarks.kernels.tuner import sources_digest
from emo_kernels.tuning import Table, load_table, table_path

__all__ = ["BENCHMARK", "Run"]

BENCHMARK = "gpu"
"""The results file's name."""


class Run:
    """One stage's process: its arguments, device, deadline and table."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.deadline = Deadline(args.minutes)
        self.device = torch.device(args.device)
        self.is_cuda = self.device.type == "cuda"
        self.interpreter = os.environ.get("TRITON_INTERPRET") == "1"
        self.digest = sources_digest()
        self.device_name = (
            torch.cuda.get_device_name(self.device) if self.is_cuda else "interpreter"
        )
        capability = torch.cuda.get_device_capability(self.device) if self.is_cuda else (8, 0)
        self.package_table = table_path(capability)
        self.table = (args.tables or self.package_table.parent) / self.package_table.name
        self._marks = {
            "on": self.device_name,
            "kernels": self.digest,
            "torch": torch.__version__,
            "interpreter": self.interpreter,
        }

    def tiles(self) -> Table:
        """Return the current table: the package's until one is written elsewhere."""
        load_table.cache_clear()  # stages write the file
        return load_table(self.table if self.table.exists() else self.package_table)

    def record(self, result: dict[str, Any]) -> Path:
        """Append a result to the results file, with what tells whether it still stands."""
        return append_result(
            BENCHMARK, vars(self.args), {**result, **self._marks}, self.args.results
        )

    def recorded(self, stage: str) -> list[dict[str, Any]]:
        """Return what was recorded for a stage with this device, torch and kernels, oldest first.

        What broke a stage is not among it.
        """
        path = self.args.results / f"{BENCHMARK}.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        results = [json.loads(line)["result"] for line in lines]
        return [
            result
            for result in results
            if result["stage"] == stage
            and "broke" not in result
            and self._marks.items() <= result.items()
        ]

    def done(self, stage: str) -> list[dict[str, Any]]:
        """Return what need not be done again: the recorded, or with --again nothing."""
        return [] if self.args.again else self.recorded(stage)
