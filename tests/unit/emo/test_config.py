"""EmoConfig: defaults, the derived view, and what is refused with which words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from emo_serve.emo.config import EmoConfig, MoeLayer, load_config
from emo_serve.errors import ConfigError
from tests.support.golden.checkpoints import CASES, config_of


def test_defaults_are_the_released_model() -> None:
    config = EmoConfig()
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (2048, 16, 100352)
    assert config.moe_layers == (MoeLayer(128, 1, (), 8),) * 16
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 500000.0}


@pytest.mark.parametrize("case", CASES)
def test_reads_every_corner(case: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_of(case)))
    config = load_config(tmp_path)
    assert len(config.moe_layers) == 3


def test_per_layer_view() -> None:
    config = EmoConfig(**config_of("dense-first"))
    assert config.moe_layers == (None, MoeLayer(24, 2, (), 4), MoeLayer(12, 1, (0, 11), 4))
    assert config.moe_layers[1] is not None
    assert config.moe_layers[1].implied == {22, 23}


def test_top_k_never_exceeds_a_layer() -> None:
    config = EmoConfig(num_hidden_layers=2, num_experts_per_layer=[3, 128])
    assert [moe.top_k for moe in config.moe_layers if moe] == [3, 8]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_attention_heads": 3}, "num_attention_heads is 3.*hidden_size 2048"),
        ({"num_key_value_heads": 5}, "num_key_value_heads is 5.*num_attention_heads 16"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok is 0.*at least 1"),
        ({"num_experts_per_tok": True}, "num_experts_per_tok is True.*integer"),
        ({"num_experts": -1}, "num_experts is -1.*at least 0"),
        ({"num_shared_experts": 200}, "num_shared_experts is 200.*128 experts"),
        ({"num_shared_experts": 9}, "num_experts_per_tok is 8.*forces 9"),
        ({"norm_topk_prob": True}, "norm_topk_prob is True.*shared"),
        ({"always_active_experts": [128]}, "always_active_experts is 128.*0..127"),
        ({"always_active_experts": [1, 1]}, "lists an expert twice"),
        ({"num_experts_per_layer": [8] * 3}, "num_experts_per_layer is .*16"),
        ({"num_experts_per_layer": [0] * 16}, "dense_intermediate_size is None.*layer 0"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'.*silu"),
        ({"tie_word_embeddings": True}, "untied"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "longrope.*must be one of"),
        ({"rope_scaling": {"rope_type": "linear"}}, "needs a factor"),
        ({"rms_norm_eps": 0.0}, "must be positive"),
    ],
)
def test_refuses_nonsense(fields: dict[str, Any], words: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "emo", **fields}))
    with pytest.raises(ConfigError, match=words) as error:
        load_config(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "model_type is 'list'"),
        ('{"model_type": "olmoe"}', "model_type is 'olmoe'"),
        ('{"model_type": "emo", "vocab_size": "many"}', "vocab_size"),
    ],
)
def test_refuses_other_files(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_config(tmp_path)


def test_missing_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(tmp_path / "nowhere")
