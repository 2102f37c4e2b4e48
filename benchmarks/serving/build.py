"""What `emo-serve pools build` costs: seconds, peak memory and experts read, by method.

Runs the command itself, in a new process each time, on the shipped model and on a random one whose
experts are much larger than everything else; both read 20 held-out texts of the shipped `math`
domain. Beside the peaks stands the whole model in fp32, as the reference model holds it.

    python -m benchmarks.serving.build     # writes 1.5 GiB below --directory, and removes it
    python -m benchmarks.serving.build --models shipped
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.harness.progress import steps
from benchmarks.harness.random_checkpoint import write_checkpoint
from benchmarks.harness.results import ROOT, append_result
from emo_serve import demo
from emo_serve.emo.checkpoint import Checkpoint
from emo_serve.pools.calibration import METHODS

EXAMPLES = 20
KEPT = {"shipped": 8, "wide": 8}
WIDE = {
    "hidden_size": 1024,
    "intermediate_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "num_experts": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 4,
}


def build(model: Path, method: str, k: int, directory: Path) -> dict[str, float]:
    """Run the command once and return what it printed."""
    examples = directory / "math.jsonl"
    lines = (json.dumps({"text": text}) for text in demo.heldout("math")[:EXAMPLES])
    examples.write_text("\n".join(lines) + "\n")
    command = [sys.executable, "-m", "emo_serve", "pools", "build", "math"]
    command += ["--model", str(model), "--examples", str(examples), "--experts", str(k)]
    command += ["--method", method, "--out", str(directory / "math.json")]
    text = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    patterns = {
        "seconds": r"took +([\d.]+) s",
        "peak_mib": r"peak memory +(\d+) MiB",
        "before_mib": r"resident, (\d+) MiB before",
        "experts_read": r"experts read (\d+) of",
        "most_of_a_layer": r"at most (\d+) of a layer",
        "read_mib": r"at a time: ([\d.]+) MiB",
        "coverage": r"coverage +([\d.]+) of",
        "tokens": r"(\d+) tokens",
    }
    return {
        name: float(found[1]) if (found := re.search(pattern, text)) else float("nan")
        for name, pattern in patterns.items()
    }


def main() -> None:
    """Measure each model and method."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--models", nargs="+", choices=list(KEPT), default=list(KEPT))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--directory", type=Path, help="for the random checkpoint [temporary]")
    arguments = parser.parse_args()
    result: dict[str, dict[str, object]] = {}
    print(
        "| model, method | seconds | peak MiB | before the run | experts read | of a layer | MiB |"
    )
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=arguments.directory) as temporary:
        place = Path(temporary)
        for name in arguments.models:
            model = demo.model_dir() if name == "shipped" else write_checkpoint(place / name, WIDE)
            files = sum(path.stat().st_size for path in model.glob("*.safetensors"))
            result[name] = {"checkpoint_mib": files / 2**20, "whole_fp32_mib": 2 * files / 2**20}
            num_experts = sum(m.num_experts for m in Checkpoint.open(model).config.moe_layers if m)
            for method in METHODS:
                repeats = steps(range(arguments.repeats), f"{name} by {method}")
                runs = [build(model, method, KEPT[name], place) for _ in repeats]
                seconds = [run["seconds"] for run in runs]
                row = {**runs[0], "seconds": statistics.median(seconds), "all_seconds": seconds}
                row["peak_mib"] = max(run["peak_mib"] for run in runs)
                result[name][method] = row
                print(
                    f"| {name}, {method} | {row['seconds']:.1f} | {row['peak_mib']:.0f} |"
                    f" {row['before_mib']:.0f} | {row['experts_read']:.0f} of {num_experts} |"
                    f" {row['most_of_a_layer']:.0f} | {row['read_mib']:.1f} |",
                    flush=True,
                )
            print(f"| {name}, the whole model in fp32 | | {2 * files / 2**20:.0f} | | | | |")
    print(f"\nappended to {append_result('build', vars(arguments), result)}")


if __name__ == "__main__":
    main()
