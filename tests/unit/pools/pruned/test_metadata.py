"""Import of `pruning_metadata.json` as the released pruning scripts write it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from emo_serve.errors import PoolFileError
from emo_serve.facts import MoeLayer
from emo_serve.pools.document import read_pool, write_pool
from emo_serve.pools.pool import PoolCalibration, PoolModel
from emo_serve.pools.pruned.metadata import read_pruning_metadata

MODEL = (None, MoeLayer(num_experts=8, num_shared_experts=1, always_active=(), top_k=4))


def metadata(path: Path, **changes: Any) -> Path:
    """Write what greedy_prune_layerwise.py saves, with changes."""
    fields = {
        "original_model": "allenai/Emo_1b14b_1T",
        "prune_keep_k": 3,
        "num_shared_experts": 1,
        "pruning_method": "greedy_layerwise",
        "task": "gsm8k",
        "split": "validation",
        "num_shots_override": None,
        "num_calibration": 64,
        "prune_seed": 0,
        "experts_kept_per_layer": [None, [2, 5, 7]],
    }
    path.write_text(json.dumps(fields | changes))
    return path


def test_the_kept_experts_become_a_pool_with_its_provenance(tmp_path: Path) -> None:
    pool = read_pruning_metadata(metadata(tmp_path / "m.json"), "math", MODEL)
    assert pool.expert_ids == ((), (2, 5, 7))
    assert pool.layers[0] is None
    assert (pool.name, pool.description) == ("math", "kept for the task gsm8k")
    assert pool.model == PoolModel("allenai/Emo_1b14b_1T")
    assert pool.calibration == PoolCalibration("greedy_layerwise", 64)
    write_pool(pool, tmp_path / "math.json")
    assert read_pool(tmp_path / "math.json") == pool


def test_the_kept_list_alone_is_enough(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    path.write_text(json.dumps({"experts_kept_per_layer": [None, [7, 2]]}))
    pool = read_pruning_metadata(path, "math", None)
    assert pool.expert_ids == ((), (2, 7))
    assert (pool.description, pool.model, pool.calibration) == ("", None, None)


def test_provenance_of_an_unexpected_type_is_left_out(tmp_path: Path) -> None:
    path = metadata(tmp_path / "m.json", original_model=None, task=3, num_calibration="all")
    pool = read_pruning_metadata(path, "math", MODEL)
    assert (pool.description, pool.model) == ("", None)
    assert pool.calibration == PoolCalibration("greedy_layerwise")


def test_null_means_unpruned_where_the_variable_width_script_wrote_it(tmp_path: Path) -> None:
    path = metadata(
        tmp_path / "m.json",
        experts_kept_per_layer=[None, None],
        pruning_method="greedy_layerwise_variable",
    )
    assert read_pruning_metadata(path, "math", MODEL).expert_ids == ((), tuple(range(8)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts_kept_per_layer": [None, [2, 8]]}, "layer 1: an expert is 8; expected an id"),
        ({"experts_kept_per_layer": [None, [2, 2]]}, "layer 1: experts[1] is 2; expected each"),
        ({"experts_kept_per_layer": [None, [True]]}, "layer 1: experts[0] is True"),
        ({"experts_kept_per_layer": [None, 3]}, "layer 1: experts_kept_per_layer is 3"),
        ({"experts_kept_per_layer": [None, None]}, "layer 1: the entry is None"),
        ({"experts_kept_per_layer": [[1], [1]]}, "layer 0: experts is [1]; expected null"),
        ({"experts_kept_per_layer": [None]}, "the number of layers is 1"),
        ({"experts_kept_per_layer": {}}, "experts_kept_per_layer is {}"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = metadata(tmp_path / "m.json", **changes)
    with pytest.raises(PoolFileError) as caught:
        read_pruning_metadata(path, "math", MODEL)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)


def test_a_file_without_the_list_and_a_bad_name_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    path.write_text('{"prune_keep_k": 8}')
    with pytest.raises(PoolFileError, match="'experts_kept_per_layer' is missing"):
        read_pruning_metadata(path, "math", None)
    path.write_text("[]")
    with pytest.raises(PoolFileError, match="expected an object"):
        read_pruning_metadata(path, "math", None)
    with pytest.raises(PoolFileError, match="reserved for unions"):
        read_pruning_metadata(metadata(path), "a+b", None)
