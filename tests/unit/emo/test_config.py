"""EmoConfig: defaults, the derived view, and what is refused with which words."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emo_serve.emo.config import DenseBaselineConfig, EmoConfig, load_config
from emo_serve.errors import ConfigError
from emo_serve.facts import MoeLayer
from tests.support.golden.checkpoints import CASES, config_of


def test_defaults_are_the_released_model() -> None:
    config = EmoConfig()
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (2048, 16, 100352)
    assert config.moe_layers == (MoeLayer(128, 1, (), 8),) * 16
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 500000.0}


def test_a_directory_may_be_given_as_a_path() -> None:
    """As transformers passes it on from AutoTokenizer.from_pretrained(Path(...))."""
    assert EmoConfig(name_or_path=Path("models/emo")).vocab_size == 100352


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


# -- the release under its other names --


def test_checkpoints_from_before_the_rename_have_defaults_of_their_own(tmp_path: Path) -> None:
    fields = {**config_of("shared1"), "model_type": "flex_olmo_noqknorm_prenorm"}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert load_config(tmp_path).facts == EmoConfig(**config_of("shared1")).facts
    del fields["num_shared_experts"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert load_config(tmp_path).moe_layers[0] == MoeLayer(32, 0, (), 4)


def test_the_dense_baseline_is_an_emo_without_experts(tmp_path: Path) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    fields = {"model_type": "olmo2_noqknorm_prenorm", "num_attention_heads": 4, **sizes}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    config = load_config(tmp_path)
    assert config.moe_layers == (None, None) and config.facts.is_dense
    assert (config.dense_intermediate_size, config.facts.expert_width) == (256, 0)
    assert (config.rms_norm_eps, config.vocab_size) == (1e-5, 50304)  # those of OLMo 2
    again = DenseBaselineConfig(**config.to_dict())
    assert again.facts == config.facts and again.rope_parameters == config.rope_parameters
    (tmp_path / "config.json").write_text(json.dumps({**fields, "num_experts": 8}))
    with pytest.raises(ConfigError, match="num_experts is 8; expected no experts"):
        load_config(tmp_path)


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
        ("[]", r"the file is \[\]; expected a JSON object"),
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


# -- any JSON in any field --

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.sampled_from(["", "x", "linear", "yarn", "llama3", "bfloat16", "bananas", "\ud800"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)
ROPE = st.fixed_dictionaries(
    {},
    optional={
        "rope_type": st.sampled_from(["default", "linear", "dynamic", "yarn", "llama3"]) | JSON,
        "type": JSON,
        "rope_theta": st.floats(-1, 1e6) | JSON,
        "factor": st.floats(0, 8) | JSON,
        "original_max_position_embeddings": st.integers(0, 600) | JSON,
        "attention_factor": JSON,
        "beta_fast": JSON,
        "beta_slow": JSON,
        "low_freq_factor": st.floats(0, 4) | JSON,
        "high_freq_factor": st.floats(0, 4) | JSON,
        "truncate": JSON,
    },
)
FIELDS = sorted(field.name for field in fields(EmoConfig))
OTHERS = ["torch_dtype", "num_labels", "layer_types", "quantization_config", "text_config", "x"]
CLASS_NAMES = ["moe_layers", "head_dim", "to_dict", "attribute_map", "__class__", "from_dict"]


def refusal_of(directory: Path, config: dict[str, Any]) -> str | None:
    """Return why a config.json is refused, None if it is not."""
    (directory / "config.json").write_text(json.dumps(config))
    try:
        loaded = load_config(directory)
        assert len(loaded.moe_layers) == 3
        json.dumps(loaded.to_dict())
    except ConfigError as error:
        return str(error)
    return None


def check_refusal(refusal: str | None, directory: Path) -> None:
    if refusal is not None:
        assert refusal.startswith(str(directory / "config.json"))
        assert "\n" not in refusal and refusal.isascii() and len(refusal) < 600


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([*FIELDS, *OTHERS, *CLASS_NAMES]), JSON)
def test_any_value_of_any_field_is_taken_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, field: str, value: object
) -> None:
    directory = tmp_path_factory.mktemp("model")
    check_refusal(refusal_of(directory, {**config_of("dense-first"), field: value}), directory)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(["rope_scaling", "rope_parameters"]), ROPE)
def test_any_rope_is_taken_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, field: str, value: object
) -> None:
    directory = tmp_path_factory.mktemp("model")
    config = {**config_of("shared1"), field: value}
    check_refusal(refusal_of(directory, config), directory)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear'; expected an object, or null"),
        ({"rope_scaling": ["linear", 2]}, "rope_scaling is ['linear', 2]; expected an object"),
        ({"rope_parameters": [1]}, "rope_parameters is [1]; expected an object, or null"),
        ({"rope_parameters": {"factor": "2"}}, "rope_parameters['factor'] is '2'; expected a"),
        ({"rope_parameters": {"x": {"y": 1}}}, "rope_parameters['x'] is {'y': 1}; expected"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2}}, "low_freq_factor < high"),
        ({"rope_theta": 10**30}, "rope_theta is 1000000000000000000000000000000; expected"),
        ({"rope_theta": True}, "rope_theta is True; expected a finite number above 0"),
        ({"torch_dtype": "bananas"}, "torch_dtype is 'bananas'; expected the name of a torch"),
        ({"dtype": "nn"}, "dtype is 'nn'; expected the name of a torch dtype"),
        ({"dtype": ["bfloat16"]}, "dtype is ['bfloat16']; expected"),
        ({"vocab_size": "320"}, "vocab_size is '320'; expected an integer of at least 1"),
        ({"hidden_size": 128.0}, "hidden_size is 128.0; expected an integer"),
        ({"hidden_size": 10**30}, "hidden_size is 1000000000000000000000000000000; expected"),
        ({"num_hidden_layers": 2**31}, "num_hidden_layers is 2147483648; expected"),
        ({"num_experts": None}, "num_experts is None; expected an integer"),
        ({"num_experts_per_layer": {"0": 8}}, "num_experts_per_layer is {'0': 8}; expected a list"),
        ({"num_experts_per_layer": [None] * 3}, "num_experts_per_layer is [None, None, None]"),
        ({"always_active_experts": 3}, "always_active_experts is 3; expected a list of"),
        ({"always_active_experts_per_layer": [1, 2, 3]}, "is [1, 2, 3]; expected a list with one"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6'; expected a finite number"),
        ({"rms_norm_eps": 1e39}, "rms_norm_eps is 1e+39; expected a finite number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan; expected a finite number"),
        ({"attention_bias": "false"}, "attention_bias is 'false'; expected true or false"),
        ({"dense_mlp_bias": 1}, "dense_mlp_bias is 1; expected true or false"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'; expected a token id or a list"),
        ({"architectures": "EmoForCausalLM"}, "architectures is 'EmoForCausalLM'; expected a list"),
        ({"id2label": "x"}, "id2label is 'x'; expected an object"),
        ({"num_labels": 10**9}, "num_labels is 1000000000; expected an integer"),
        ({"per_layer_config": {"0": {"hidden_size": 2}}}, "per_layer_config is"),
        ({"quantization_config": "fp8"}, "quantization_config is 'fp8'; expected an object"),
        ({"moe_layers": []}, "'moe_layers' is a field of the file; expected none of that name"),
        ({"to_dict": 1}, "'to_dict' is a field of the file"),
        ({"head_dim": 64}, "head_dim is 64: EMO's is hidden_size / heads, 32"),
        ({"x" * 500: 1, "hidden_act": "y" * 500}, "yyy...yyy"),
    ],
)
def test_a_field_of_a_wrong_kind_is_named_with_its_value(
    fields: dict[str, Any], words: str, tmp_path: Path
) -> None:
    refusal = refusal_of(tmp_path, {**config_of("shared1"), **fields})
    assert refusal is not None and words in refusal
    check_refusal(refusal, tmp_path)


@pytest.mark.parametrize(
    "fields",
    [
        {"rms_norm_eps": 1},
        {"attention_dropout": 0},
        {"pad_token_id": -1},
        {"eos_token_id": [1, 2]},
        {"head_dim": 32},
        {"dtype": None, "torch_dtype": "float16"},
        {"use_cache": None, "rope_theta": 10000, "architectures": None},
        {"rope_scaling": None, "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}},
        {"rope_scaling": {"type": "linear", "factor": 2, "note": None}},
        {"transformers_version": "4.57.0", "auto_map": {"AutoConfig": "a.B"}, "_note": [1, {}]},
    ],
)
def test_what_checkpoints_carry_is_taken(fields: dict[str, Any], tmp_path: Path) -> None:
    assert refusal_of(tmp_path, {**config_of("shared1"), **fields}) is None


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "nul", "\x00", ""])
def test_a_file_that_is_no_json_is_refused_in_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json cannot be read as JSON: [^\n]*$"):
        load_config(tmp_path)


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_of("shared1")), encoding="utf-8-sig")
    assert load_config(tmp_path).num_experts == 32
