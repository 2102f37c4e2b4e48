"""Pools as checkpoints: they compute what the pool computes, load anywhere, and come back as pools.

Outputs are those of the reference model: the full one under the pool's mask and temperature against
the exported one, which knows of no pool; where there are golden values, against those too.
"""

from __future__ import annotations

import errno
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from emo_serve.checkpoints.shards import NewTensor
from emo_serve.checkpoints.tensor_file import TensorFile
from emo_serve.emo import pruning
from emo_serve.emo.checkpoint import Checkpoint, load_model, save_checkpoint
from emo_serve.emo.config import EmoConfig, load_config
from emo_serve.emo.model import EmoForCausalLM
from emo_serve.emo.tensor_names import gate_name
from emo_serve.errors import CheckpointError, ConfigError, PoolFileError, PoolStoreError
from emo_serve.pools.pool import ExpertPool, LayerExperts, PoolCalibration, PoolModel
from emo_serve.pools.pruned import checkpoint as pruned_checkpoint
from emo_serve.pools.pruned.checkpoint import PrunedCheckpoint, export_pool, pruned_config
from emo_serve.pools.pruned.metadata import read_pruning_metadata
from tests.support.golden.checkpoints import CASES, golden, pools_of, prompts_of, write_checkpoint
from tests.unit.emo.test_model import logprobs, masks

TOLERANCE = 1e-5  # fp32; a few 1e-6 are met, and more where a temperature sharpens the logits
IDS = torch.arange(1, 25)[None]


def a_pool(kept: list[list[int]], temperature: float = 1.0, **fields: Any) -> ExpertPool:
    """Return a pool of golden experts, [] for a dense layer."""
    layers = (LayerExperts(tuple(ids)) if ids else None for ids in kept)
    return ExpertPool("math", tuple(layers), temperature, **fields)


@pytest.fixture
def shared1(tmp_path: Path) -> Path:
    return write_checkpoint("shared1", tmp_path / "model")


# -- outputs --


@pytest.mark.parametrize("name", ["math", "code", "law"])
def test_the_released_reference_gives_the_same_values(
    tmp_path: Path, shared1: Path, name: str
) -> None:
    told: list[tuple[int, int]] = []
    pool, checkpoint = a_pool(golden().pools[name]), Checkpoint.open(shared1)
    export_pool(pool, checkpoint, tmp_path / "out", lambda *news: told.append(news))
    done, totals = zip(*told, strict=True)
    assert list(done) == sorted(done) and {done[-1]} == set(totals)
    got = logprobs(load_model(tmp_path / "out"), golden().prompts)
    torch.testing.assert_close(got, torch.tensor(golden().prompt_logprobs[name]), atol=1e-4, rtol=0)
    other = "law" if name == "code" else "code"
    assert (got - torch.tensor(golden().prompt_logprobs[other])).abs().mean() > 0.1


@pytest.mark.parametrize("case", CASES)
def test_every_corner_computes_what_its_pools_do(tmp_path: Path, case: str) -> None:
    source = write_checkpoint(case, tmp_path / "model")
    model, checkpoint, pools = load_model(source), Checkpoint.open(source), pools_of(case)
    for name, temperature in (("math", 1.0), ("tiny", 1.0), ("law", 0.7)):
        out = tmp_path / name
        export_pool(a_pool(pools[name], temperature), checkpoint, out)
        mask = masks(pools[name], case)
        want = logprobs(model, prompts_of(case), pool=mask, temperature=temperature)
        got = logprobs(load_model(out), prompts_of(case))
        torch.testing.assert_close(got, want, atol=TOLERANCE / temperature, rtol=0)


@st.composite
def configs(draw: st.DrawFn) -> EmoConfig:
    """Draw from the config space: shared, always-active, per-layer counts, dense layers."""
    layers = draw(st.integers(1, 3))
    fields: dict[str, Any] = {"num_experts": draw(st.integers(2, 9)), "num_shared_experts": 0}
    counts = [fields["num_experts"]] * layers
    if draw(st.booleans()):
        counts = draw(st.lists(st.integers(0, 9), min_size=layers, max_size=layers).filter(any))
        fields["num_experts_per_layer"] = counts
    rule = draw(st.sampled_from(["shared", "shared a layer", "always", "always a layer", "norm"]))
    fewest = min(count for count in counts if count)
    if rule == "shared":
        fields["num_shared_experts"] = draw(st.integers(0, min(2, fewest)))
    elif rule == "shared a layer":
        fields["num_shared_experts_per_layer"] = [
            draw(st.integers(0, min(2, count))) for count in counts
        ]
    elif rule == "always":
        ids = st.lists(st.integers(0, fewest - 1), unique=True, max_size=2)
        fields["always_active_experts"] = draw(ids)
    elif rule == "always a layer":
        fields["num_shared_experts"] = draw(st.integers(0, min(1, fewest)))
        fields["always_active_experts_per_layer"] = [
            draw(st.lists(st.integers(0, count - 1), unique=True, max_size=2)) if count else None
            for count in counts
        ]
    else:
        fields["norm_topk_prob"] = True
    return EmoConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_experts_per_tok=draw(st.integers(2, 5)),
        dense_intermediate_size=12,
        dense_mlp_bias=draw(st.booleans()),
        max_position_embeddings=64,
        initializer_range=0.5,  # so that a wrong expert shows
        pad_token_id=None,
        eos_token_id=0,
        **fields,
    )


@st.composite
def models_and_pools(draw: st.DrawFn) -> tuple[EmoConfig, ExpertPool]:
    config = draw(configs())
    layers: list[LayerExperts | None] = []
    for moe in config.moe_layers:
        if moe is None:
            layers.append(None)
            continue
        fewest = 0 if moe.implied else 1
        ids = st.lists(st.integers(0, moe.num_experts - 1), unique=True, min_size=fewest)
        layers.append(LayerExperts(tuple(draw(ids))))
    temperature = draw(st.sampled_from([1.0, 1.0, 0.25, 0.7, 3.0]))
    return config, ExpertPool("math", tuple(layers), temperature)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(models_and_pools(), st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
def test_any_config_and_pool(
    tmp_path_factory: pytest.TempPathFactory,
    drawn: tuple[EmoConfig, ExpertPool],
    dtype: torch.dtype,
) -> None:
    config, pool = drawn
    root = tmp_path_factory.mktemp("any")
    torch.manual_seed(0)
    save_checkpoint(EmoForCausalLM(config), root / "model", dtype)
    complete = pool.complete(config.moe_layers)
    export_pool(pool, Checkpoint.open(root / "model"), root / "out")
    pool_mask = [
        None if moe is None else torch.isin(torch.arange(moe.num_experts), torch.tensor(ids))
        for moe, ids in zip(config.moe_layers, complete.expert_ids, strict=True)
    ]
    with torch.no_grad():
        want = load_model(root / "model")(IDS, pool_mask, pool.router_temperature)
        got = load_model(root / "out")(IDS)
    torch.testing.assert_close(got, want, atol=TOLERANCE, rtol=TOLERANCE)
    layers = config.moe_layers
    back = read_pruning_metadata(root / "out" / "pruning_metadata.json", "math", layers)
    assert back.content_hash == complete.content_hash
    shutil.rmtree(root)


def test_another_pool_would_have_shown(tmp_path: Path) -> None:
    torch.manual_seed(0)
    fields = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2}
    fields |= {"num_attention_heads": 2, "num_experts": 9, "num_experts_per_tok": 3}
    config = EmoConfig(**fields, initializer_range=0.5, pad_token_id=None, eos_token_id=0)
    save_checkpoint(EmoForCausalLM(config), tmp_path / "model")
    checkpoint = Checkpoint.open(tmp_path / "model")
    for name, ids in (("a", (0, 1, 2, 8)), ("b", (0, 1, 3, 8))):
        export_pool(a_pool([list(ids)] * 2), checkpoint, tmp_path / name)
    with torch.no_grad():
        a, b = (load_model(tmp_path / name)(IDS) for name in "ab")
    assert (a - b).abs().max() > 1000 * TOLERANCE


# -- weights and config --


def test_experts_are_renumbered_and_the_trunk_is_the_sources(tmp_path: Path, shared1: Path) -> None:
    kept = golden().pools["math"]
    export_pool(a_pool(kept), Checkpoint.open(shared1), tmp_path / "out")
    source = load_file(shared1 / "model.safetensors")
    got = load_file(tmp_path / "out" / "model.safetensors")
    for layer, ids in enumerate(kept):
        assert torch.equal(got.pop(gate_name(layer)), source[gate_name(layer)][ids])
        for new, old in enumerate(ids):
            for matrix in ("gate", "up", "down"):
                name = f"model.layers.{layer}.mlp.experts.{{}}.{matrix}_proj.weight"
                assert torch.equal(got.pop(name.format(new)), source[name.format(old)])
    assert got.keys() == set(Checkpoint.open(shared1).trunk_names()) - {
        gate_name(layer) for layer in range(3)
    }
    assert all(torch.equal(tensor, source[name]) for name, tensor in got.items())


def fields_of(case: str, kept: list[list[int]], tmp_path: Path) -> dict[str, Any]:
    """Return what a pool's export changes in config.json."""
    source = write_checkpoint(case, tmp_path)
    config, fields = load_config(source), json.loads((source / "config.json").read_text())
    pool = a_pool(kept).complete(config.moe_layers)
    new = pruned_config(fields, config.moe_layers, pool, config.num_experts_per_tok)
    return {key: value for key, value in new.items() if value != fields.get(key)}


def test_equal_layers_change_the_count_alone(tmp_path: Path) -> None:
    kept = [[0, 5, 6, 31], [1, 2, 3, 31], [7, 8, 9, 31]]
    assert fields_of("shared1", kept, tmp_path) == {"num_experts": 4}


def test_fewer_experts_than_a_token_takes(tmp_path: Path) -> None:
    kept = [[0, 31], [1, 31], [7, 31]]
    fields = fields_of("shared1", kept, tmp_path)
    assert fields == {"num_experts": 2, "num_experts_per_tok": 2}


def test_layers_that_differ_are_listed_and_the_fullest_says_how_many_a_token_takes(
    tmp_path: Path,
) -> None:
    assert fields_of("shared1", [[0, 31], [1, 2, 31], [7, 31]], tmp_path) == {
        "num_experts": 3,
        "num_experts_per_layer": [2, 3, 2],
        "num_experts_per_tok": 3,
    }


def test_a_listed_model_stays_listed(tmp_path: Path) -> None:
    fields = fields_of("dense-first", [[], [0, 5, 22, 23], [1, 2, 10, 11]], tmp_path)
    assert fields == {
        "num_experts": 5,
        "num_experts_per_layer": [0, 4, 5],  # 0 is always active in layer 2
        "always_active_experts_per_layer": [[], [], [0, 4]],
    }


def test_always_active_experts_get_a_list_a_layer_only_where_they_must(tmp_path: Path) -> None:
    fields = fields_of("always-active", [[1, 3, 7], [2, 3, 7], [0, 3, 7]], tmp_path / "a")
    assert (fields["always_active_experts"], fields["num_experts"]) == ([1, 2], 3)
    fields = fields_of("always-active", [[1, 3, 7], [3, 4, 7], [0, 3, 7]], tmp_path / "b")
    assert fields["always_active_experts"] is None
    assert fields["always_active_experts_per_layer"] == [[1, 2], [0, 2], [1, 2]]


def test_unknown_fields_are_kept(tmp_path: Path, shared1: Path) -> None:
    path = shared1 / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": {"A": "b.C"}}))
    export_pool(a_pool(golden().pools["math"]), Checkpoint.open(shared1), tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["auto_map"] == {"A": "b.C"}


@pytest.mark.parametrize(
    ("temperature", "dtype"),
    [(1.0, torch.bfloat16), (0.5, torch.bfloat16), (0.7, torch.float32)],
)
def test_gates_are_wider_only_where_they_would_be_rounded(
    tmp_path: Path, shared1: Path, temperature: float, dtype: torch.dtype
) -> None:
    pool = a_pool(golden().pools["math"], temperature)
    written = export_pool(pool, Checkpoint.open(shared1), tmp_path / "out")
    gate = Checkpoint.open(tmp_path / "out").tensor(gate_name(0))
    assert gate.dtype == dtype
    source = Checkpoint.open(shared1).tensor(gate_name(0))[golden().pools["math"][0]]
    torch.testing.assert_close(gate.float() * temperature, source.float(), atol=0, rtol=1e-6)
    assert ["router_temperature" in note for note in written.notes] == [True] * (temperature != 1)
    assert ["float32" in note for note in written.notes] == [dtype == torch.float32] * (
        temperature != 1
    )


def test_a_layer_the_released_code_cannot_run_is_named(tmp_path: Path, shared1: Path) -> None:
    kept = [golden().pools["math"][0], [1, 31], [2, 31]]
    (note,) = export_pool(a_pool(kept), Checkpoint.open(shared1), tmp_path / "out").notes
    assert note.startswith("layer 1 keeps 2 experts, and a token takes 4")


# -- files --


def shard(directory: Path, files: int = 3) -> None:
    """Cut a checkpoint's one file into several, with an index."""
    tensors = load_file(directory / "model.safetensors")
    weight_map = {name: f"part-{i % files}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(weight_map.values()):
        part = {name: tensors[name] for name in tensors if weight_map[name] == file}
        save_file(part, directory / file)
    (directory / "model.safetensors").unlink()
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))


def test_a_sharded_source_gives_shards_no_larger_than_its_own(
    tmp_path: Path, shared1: Path
) -> None:
    pool = a_pool(golden().pools["math"])
    export_pool(pool, Checkpoint.open(shared1), tmp_path / "whole")
    shard(shared1, files=5)
    written = export_pool(pool, Checkpoint.open(shared1), tmp_path / "out")
    parts = sorted((tmp_path / "out").glob("*.safetensors"))
    assert written.weight_files == len(parts) > 1
    largest = max(file.stat().st_size for file in shared1.glob("*.safetensors"))
    assert all(file.stat().st_size < largest + 10_000 for file in parts)  # and the header
    a, b = load_model(tmp_path / "whole").state_dict(), load_model(tmp_path / "out").state_dict()
    assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def test_weights_pass_through_in_pieces(
    tmp_path: Path, shared1: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = a_pool(golden().pools["math"])
    export_pool(pool, Checkpoint.open(shared1), tmp_path / "whole")
    checkpoint = Checkpoint.open(shared1)
    largest: list[int] = []
    read_rows = TensorFile.read_rows

    def spy(self: TensorFile, name: str, rows: slice, out: Any = None) -> torch.Tensor:
        piece = read_rows(self, name, rows, out)
        largest.append(piece.nbytes)
        return piece

    monkeypatch.setattr(pruning, "_PIECE_BYTES", 4096)
    monkeypatch.setattr(TensorFile, "read_rows", spy)
    export_pool(pool, checkpoint, tmp_path / "out")
    assert max(largest) == 4096
    files = [tmp_path / name / "model.safetensors" for name in ("whole", "out")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_what_a_loader_needs_beside_the_weights_is_copied_and_nothing_else(
    tmp_path: Path, shared1: Path
) -> None:
    (shared1 / "generation_config.json").write_text('{"temperature": 0.7}')
    for name in ("modeling_emo.py", "merges.txt", "LICENSE"):
        (shared1 / name).write_text(name)
    for name in ("README.md", ".gitattributes", "pytorch_model.bin", "model.gguf"):
        (shared1 / name).write_text("no")
    (shared1 / "pruning_metadata.json").write_text("{}")
    (shared1 / "original").mkdir()
    blob = shared1 / "original" / "blob"  # the Hub's cache holds links to blobs
    (shared1 / "tokenizer.json").rename(blob)
    (shared1 / "tokenizer.json").symlink_to(blob)
    export_pool(a_pool(golden().pools["math"]), Checkpoint.open(shared1), tmp_path / "out")
    own = {"config.json", "model.safetensors", "pruning_metadata.json"}
    copied = {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    copied |= {"modeling_emo.py", "merges.txt", "LICENSE"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == own | copied
    assert not (tmp_path / "out" / "tokenizer.json").is_symlink()
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == blob.read_bytes()


# -- the pool comes back --


def test_the_import_of_an_export_is_the_pool(tmp_path: Path, shared1: Path) -> None:
    checkpoint = Checkpoint.open(shared1)
    pool = a_pool(
        golden().pools["math"],
        0.7,
        description="sums",
        model=PoolModel("emo", checkpoint.fingerprint()),
        calibration=PoolCalibration("layerwise", 20),
    )
    export_pool(pool, checkpoint, tmp_path / "out")
    path = tmp_path / "out" / "pruning_metadata.json"
    assert read_pruning_metadata(path, "math", checkpoint.config.moe_layers) == pool
    assert json.loads(path.read_text())["prune_keep_k"] == len(pool.expert_ids[0])


def test_dense_layers_are_null(tmp_path: Path) -> None:
    source = write_checkpoint("dense-first", tmp_path / "model")
    export_pool(a_pool(pools_of("dense-first")["math"]), Checkpoint.open(source), tmp_path / "out")
    metadata = json.loads((tmp_path / "out" / "pruning_metadata.json").read_text())
    assert metadata["experts_kept_per_layer"][0] is None
    assert "prune_keep_k" not in metadata  # the layers keep 9 and 5
    assert metadata["num_shared_experts"] == 2


@pytest.mark.parametrize("temperature", [0, -1, "hot", True, math.inf])
def test_a_temperature_that_is_none_is_refused(tmp_path: Path, temperature: object) -> None:
    path = tmp_path / "m.json"
    kept = {"experts_kept_per_layer": [[1]], "router_temperature": temperature}
    path.write_text(json.dumps(kept))
    with pytest.raises(PoolFileError, match=r"m\.json: router_temperature is .*above 0"):
        read_pruning_metadata(path, "math", None)


# -- refusals leave nothing behind --


def test_a_directory_with_anything_in_it_is_refused(tmp_path: Path, shared1: Path) -> None:
    checkpoint, pool = Checkpoint.open(shared1), a_pool(golden().pools["math"])
    out = tmp_path / "out"
    out.mkdir()
    assert isinstance(export_pool(pool, checkpoint, out), PrunedCheckpoint)  # an empty one is fine
    before = {file: file.read_bytes() for file in out.iterdir()}
    with pytest.raises(ConfigError, match="out is not empty"):
        export_pool(pool, checkpoint, out)
    with pytest.raises(ConfigError, match="is a file"):
        export_pool(pool, checkpoint, out / "config.json")
    assert {file: file.read_bytes() for file in out.iterdir()} == before


def test_another_models_pool_is_refused(tmp_path: Path, shared1: Path) -> None:
    checkpoint = Checkpoint.open(shared1)
    for pool, message in (
        (a_pool([[32]] * 3), "layer 0: an expert is 32"),
        (a_pool([[1]] * 2), "the number of layers is 2"),
        (a_pool([[1]] * 3, model=PoolModel(None, "fed")), "model.fingerprint is 'fed'"),
    ):
        with pytest.raises(PoolFileError, match=message):
            export_pool(pool, checkpoint, tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_a_disk_that_fills_up_leaves_nothing(
    tmp_path: Path, shared1: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, pool = Checkpoint.open(shared1), a_pool(golden().pools["math"])

    def full(tensor: NewTensor) -> Iterator[torch.Tensor]:
        raise OSError(errno.ENOSPC, "No space left on device")

    tensors = pruned_checkpoint.kept_tensors(checkpoint, pool.expert_ids)
    last = tensors[-1]
    broken = NewTensor(last.name, last.dtype, last.shape, lambda: full(last))
    monkeypatch.setattr(pruned_checkpoint, "kept_tensors", lambda *_: [*tensors[:-1], broken])
    with pytest.raises(PoolStoreError, match="out cannot be written: No space left"):
        export_pool(pool, checkpoint, tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_a_disk_that_is_too_small_is_refused_first(
    tmp_path: Path, shared1: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ConfigError, match=r"takes .* GiB and its disk has 0\.000977 GiB free"):
        export_pool(a_pool(golden().pools["math"]), Checkpoint.open(shared1), tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_a_source_that_changes_meanwhile_is_refused(
    tmp_path: Path, shared1: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copyfile = shutil.copyfile

    def changing(source: Path, target: Path) -> None:
        copyfile(source, target)
        (shared1 / "model.safetensors").touch()

    checkpoint = Checkpoint.open(shared1)
    monkeypatch.setattr(shutil, "copyfile", changing)
    with pytest.raises(CheckpointError, match="replaced or written to"):
        export_pool(a_pool(golden().pools["math"]), checkpoint, tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_a_gate_of_another_shape_is_refused(shared1: Path) -> None:
    tensors = load_file(shared1 / "model.safetensors")
    tensors[gate_name(1)] = tensors[gate_name(1)][:-1].contiguous()
    save_file(tensors, shared1 / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.gate.*\(31, 128\).*\(32, 128\)"):
        Checkpoint.open(shared1)
