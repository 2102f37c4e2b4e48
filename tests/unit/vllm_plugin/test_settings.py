"""What the plugin refuses, with which words, on stand-ins for vLLM's configuration."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import CUDAGraphMode

from emo_serve.emo.config import EmoConfig
from emo_serve.errors import ConfigError
from emo_serve.vllm_plugin.contract import PluginSettings
from emo_serve.vllm_plugin.settings import (
    backend_for,
    has_front_end,
    read_settings,
    refuse_what_cannot_work,
    rope_for_vllm,
)
from tests.support.golden.checkpoints import config_of

GOOD = {
    "num_slots": 4,
    "num_pools": 8,
    "moe_backend": "auto",
    "expert_dtype": "auto",
    "host_expert_bytes": 0,
    "records_routing": True,
    "stream_slots": 0,
}


def vllm_config(config: EmoConfig | None = None, **changes: Any) -> SimpleNamespace:
    parallel = {
        "tensor_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "enable_expert_parallel": False,
    }
    fields: dict[str, Any] = {
        "model_config": SimpleNamespace(
            hf_config=config or EmoConfig(),
            max_model_len=changes.pop("max_model_len", 4096),
            dtype=torch.bfloat16,
        ),
        "parallel_config": SimpleNamespace(
            **{key: changes.pop(key, value) for key, value in parallel.items()}
        ),
        "compilation_config": SimpleNamespace(cudagraph_mode=CUDAGraphMode.NONE),
        "quant_config": None,
        "lora_config": None,
        "speculative_config": None,
        "additional_config": {},
    }
    return SimpleNamespace(**{**fields, **changes})


def test_plain_vllm_holds_everything() -> None:
    expected = PluginSettings(128, 1, "auto", "auto", 0, records_routing=False)
    for nothing in ({}, None, {"other": 1}):
        given = vllm_config(additional_config=nothing)
        assert read_settings(given) == expected and not has_front_end(given)


def test_a_front_end_decides() -> None:
    given = vllm_config(additional_config={"emo_serve": GOOD})
    expected = PluginSettings(4, 8, "auto", "auto", 0, records_routing=True)
    assert read_settings(given) == expected and has_front_end(given)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"num_slots": 4}, r"has \['num_slots'\], expected"),
        ({**GOOD, "pools": 3}, "pools"),
        ({**GOOD, "moe_backend": "fast"}, "not one of auto, triton, cpu, reference"),
        (
            {**GOOD, "expert_dtype": "fp4"},
            "expert_dtype is 'fp4', which is not one of auto, fp8_e4m3",
        ),
        ({**GOOD, "num_slots": 0}, "at least 1"),
        ({**GOOD, "stream_slots": -1}, "stream_slots must be at least 0"),
    ],
)
def test_bad_settings(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_settings(vllm_config(additional_config={"emo_serve": given}))


@pytest.mark.parametrize(
    ("expert_dtype", "one_expert"),  # half of it on each of two ranks
    [
        ("auto", 3 * 2048 * 512 * 2),
        ("fp8_e4m3", 3 * 2048 * 512 + (2 * 512 + 2048) * 4),
    ],
)
def test_host_memory_holds_an_expert_or_is_none_at_all(expert_dtype: str, one_expert: int) -> None:
    def read(host_expert_bytes: int) -> PluginSettings:
        changes = {"expert_dtype": expert_dtype, "host_expert_bytes": host_expert_bytes}
        ours = {"emo_serve": {**GOOD, **changes}}
        return read_settings(vllm_config(additional_config=ours, tensor_parallel_size=2))

    assert read(one_expert).host_expert_bytes == one_expert
    for bad in (one_expert - 1, 1, -1):
        with pytest.raises(ConfigError, match=f"{bad} bytes; one expert takes {one_expert}"):
            read(bad)


def test_a_plain_configuration_is_accepted() -> None:
    refuse_what_cannot_work(vllm_config())
    refuse_what_cannot_work(vllm_config(speculative_config=SimpleNamespace(method="ngram")))
    refuse_what_cannot_work(vllm_config(pipeline_parallel_size=2))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {
                "pipeline_parallel_size": 2,
                "speculative_config": SimpleNamespace(method="ngram"),
            },
            "--pipeline-parallel-size 2: the first stage does not learn",
        ),
        ({"enable_expert_parallel": True}, "--enable-expert-parallel"),
        ({"quant_config": object()}, "--quantization"),
        ({"lora_config": object()}, "--enable-lora"),
        ({"speculative_config": SimpleNamespace(method="eagle")}, "'eagle' needs a draft model"),
        ({"tensor_parallel_size": 3}, "3 does not divide an expert's width, 1024"),
    ],
)
def test_refusals(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        refuse_what_cannot_work(vllm_config(**changes))


def test_dynamic_rope_is_served_within_the_context_only() -> None:
    config = EmoConfig(**config_of("dynamic"))
    assert rope_for_vllm(config) == {"rope_type": "default", "rope_theta": 500000.0}
    refuse_what_cannot_work(vllm_config(config, max_model_len=512))
    with pytest.raises(ConfigError, match="--max-model-len 1024 is over 512"):
        refuse_what_cannot_work(vllm_config(config, max_model_len=1024))


def test_reference_maths_alone_and_cuda_graphs_exclude_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    graphs = SimpleNamespace(cudagraph_mode=CUDAGraphMode.FULL)
    cuda = torch.device("cuda")

    def choose(name: str, **changes: Any) -> str:
        settings = PluginSettings(4, 8, name, "auto", 0, records_routing=True)
        return backend_for(vllm_config(**changes), settings, cuda).name

    assert choose("reference") == "reference"
    with pytest.raises(ConfigError, match="add --enforce-eager"):
        choose("reference", compilation_config=graphs)
    assert choose("triton", compilation_config=graphs) == "triton"
    assert choose("auto", compilation_config=graphs) == "triton"


def test_only_backends_of_a_cpu_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    settings = PluginSettings(4, 8, stream_slots=2)
    assert backend_for(vllm_config(), settings, torch.device("cpu")).name == "cpu"
    with pytest.raises(ConfigError, match="--stream-slots 2 works with .* triton runs on cuda"):
        backend_for(vllm_config(), settings, torch.device("cuda"))


def test_an_experts_width_is_each_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    settings = PluginSettings(4, 8, "triton", "auto", 0, records_routing=True)
    config = EmoConfig(intermediate_size=96)
    assert backend_for(vllm_config(config, tensor_parallel_size=6), settings, torch.device("cuda"))
    with pytest.raises(ConfigError, match="each rank 8 .*divided by --tensor-parallel-size"):
        backend_for(vllm_config(config, tensor_parallel_size=12), settings, torch.device("cuda"))


def test_another_config_class() -> None:
    config = vllm_config()
    config.model_config.hf_config = SimpleNamespace()
    with pytest.raises(ConfigError, match="without --trust-remote-code"):
        refuse_what_cannot_work(config)
