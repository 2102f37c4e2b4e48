"""Checkpoints of other families: opened by their own names, and checked before a start."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.families.models import MODELS
from emo_serve.cli.main import main as cli
from emo_serve.errors import CheckpointError, ConfigError
from emo_serve.families.opening import open_checkpoint, open_with_reference

MOE = [family for family, model in MODELS.items() if model.experts]
WEIGHTS = "model.safetensors"
ROOT = Path(__file__).parents[3]
WRITE = """
import sys
from pathlib import Path
from benchmarks.families.models import write_checkpoint

root, *families = sys.argv[1:]
for family in families:
    write_checkpoint(family, Path(root, family))
"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every family's, written by a process of its own: vLLM changes transformers' classes."""
    root = tmp_path_factory.mktemp("families")
    subprocess.run([sys.executable, "-c", WRITE, root, *MODELS], check=True, cwd=ROOT)
    return {family: root / family for family in MODELS}


@pytest.fixture
def olmoe(checkpoints: dict[str, Path], tmp_path: Path) -> Path:
    """A copy to be damaged."""
    for path in checkpoints["olmoe"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


@pytest.mark.parametrize("family", MOE)
def test_experts_and_trunk_are_told_apart(family: str, checkpoints: dict[str, Path]) -> None:
    checkpoint, model = open_checkpoint(checkpoints[family]), MODELS[family]
    tensors = load_file(checkpoints[family] / WEIGHTS)
    layer = checkpoint.facts.first_moe_layer
    assert layer is not None
    expert = checkpoint.expert(layer, 1)
    assert expert.num_bytes == checkpoint.expert_bytes
    assert torch.equal(expert.down_DF, tensors[checkpoint.facts.names.expert(layer, 1, "down")])
    trunk = set(checkpoint.trunk_names())
    experts = model.num_experts * (3 - len(model.dense_layers))
    assert len(tensors) - len(trunk) == 3 * experts
    assert checkpoint.num_trunk_parameters == sum(tensors[name].numel() for name in trunk)
    assert checkpoint.fingerprint() == open_checkpoint(checkpoints[family]).fingerprint()


def test_the_dense_baseline_has_no_experts(checkpoints: dict[str, Path]) -> None:
    checkpoint = open_checkpoint(checkpoints["dense"])
    assert checkpoint.facts.is_dense and checkpoint.facts.has_reference
    assert checkpoint.facts.experts_per_layer == (0, 0, 0)
    assert checkpoint.expert_bytes == 0


def save(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.layers.1.mlp.gate.e_score_correction_bias", "correction bias"),
        ("model.layers.1.mlp.experts.3.up_proj.bias", "no biases"),
        ("model.layers.1.mlp.experts.3.up_proj.weight_scale_inv", "no scales"),
        ("model.layers.1.self_attn.o_proj.bias", "no biases"),
        ("model.layers.1.self_attn.q_proj.weight_scale", "no scales"),
        ("model.layers.1.mlp.experts.16.up_proj.weight", "has no place"),
        ("model.layers.7.mlp.experts.0.up_proj.weight", "has no place"),
        ("model.layers.1.mlp.experts.gate_up_proj", "three weights"),
    ],
)
def test_tensors_that_cannot_be_served_are_refused(olmoe: Path, name: str, words: str) -> None:
    save(olmoe, {**load_file(olmoe / WEIGHTS), name: torch.zeros(2)})
    with pytest.raises(CheckpointError, match=words) as error:
        open_checkpoint(olmoe)
    assert name in str(error.value)


def test_missing_and_misshapen_tensors_are_refused(olmoe: Path) -> None:
    tensors = load_file(olmoe / WEIGHTS)
    lost = "model.layers.2.mlp.experts.3.up_proj.weight"
    save(olmoe, {name: tensor for name, tensor in tensors.items() if name != lost})
    with pytest.raises(CheckpointError, match=f"tensor {lost} is missing"):
        open_checkpoint(olmoe)
    gate = "model.layers.0.mlp.gate.weight"
    save(olmoe, {**tensors, gate: tensors[gate][:-1].clone()})
    with pytest.raises(CheckpointError, match=rf"{gate} has shape \(15, 128\)"):
        open_checkpoint(olmoe)
    config = json.loads((olmoe / "config.json").read_text())
    (olmoe / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    save(olmoe, tensors)
    with pytest.raises(
        CheckpointError, match=r"has shape \(32, 128\), the config says \(48, 128\)"
    ):
        open_checkpoint(olmoe)


# -- what needs a reference model --


def test_builds_and_exports_offline_are_refused_with_the_other_way(
    checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(checkpoints["mixtral"])
    build = ["pools", "build", "p", "--experts", "2", "--method", "random", "--model", model]
    assert cli([*build, "--out", str(tmp_path / "p.json")]) != 0
    assert "is a Mixtral, of which emo-serve has no reference model" in (
        said := capsys.readouterr().err
    )
    assert "build there: --server URL" in said
    with pytest.raises(ConfigError, match="pools export: .* is a Mixtral.*; serve the pool"):
        open_with_reference(model, "pools export", "serve the pool")
    assert open_with_reference(checkpoints["dense"], "x", "y").config.num_experts == 0
