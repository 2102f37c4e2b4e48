"""Our flags and the refusal of vLLM's: values in, settings or one clear sentence out."""

from __future__ import annotations

import argparse
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest

from emo_serve.config import (
    GIB,
    ServeSettings,
    add_serve_flags,
    format_gib,
    parse_size,
    slots_for_memory,
)
from emo_serve.errors import ConfigError
from emo_serve.server.startup.unsupported_flags import refuse_unsupported


def settings_of(*flags: str) -> ServeSettings:
    parser = argparse.ArgumentParser()
    parser.add_argument("model_tag", nargs="?")
    add_serve_flags(parser)
    return ServeSettings.from_args(parser.parse_args(flags))


# -- sizes --


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("8GiB", 8 * GIB),
        ("8 gib", 8 * GIB),
        ("1.5GiB", 3 * GIB // 2),
        ("512MiB", 2**29),
        ("64KiB", 2**16),
        ("1TiB", 2**40),
        ("1048576", 2**20),
    ],
)
def test_sizes_are_binary(text: str, num_bytes: int) -> None:
    assert parse_size("--expert-memory", text) == num_bytes


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("8GB", "write 8GiB"),
        ("8G", "write 8GiB"),
        ("512mb", "write 512MiB"),
        ("lots", "give e.g. 8GiB"),
        ("-1GiB", "give e.g. 8GiB"),
        ("8GiBs", "give e.g. 8GiB"),
        ("", "give e.g. 8GiB"),
    ],
)
def test_another_size_is_refused_with_a_remedy(text: str, remedy: str) -> None:
    with pytest.raises(ConfigError, match=f"--expert-memory.*{remedy}"):
        parse_size("--expert-memory", text)


def test_gib_are_shown_with_figures_that_say_something() -> None:
    assert format_gib(25 * GIB) == "25.00 GiB"
    assert format_gib(GIB // 100) == "0.0100 GiB"
    assert format_gib(1024) == "1024 bytes"


# -- settings --


def test_without_flags_everything_is_held_and_loaded() -> None:
    settings = settings_of()
    assert settings == ServeSettings()
    assert settings.expert_slots is settings.expert_memory_bytes is settings.preload is None


def test_flags_become_settings(tmp_path: Path) -> None:
    settings = settings_of(
        "MODEL",
        *("--pools", str(tmp_path)),
        *("--default-pool", "math+code"),
        *("--expert-memory", "2GiB"),
        *("--preload", "math,code,"),
        *("--moe-backend", "triton"),
        *("--expert-dtype", "fp8_e4m3"),
        *("--max-pools", "8"),
        *("--drain-timeout", "1.5"),
        *("--auto-method", "router"),
        *("--auto-examples", str(tmp_path)),
        *("--auto-tokens", "64"),
        *("--elastic-min-experts", "4"),
        *("--router-temperatures", "0.5,2"),
        *("--auto-min-coverage", "0.3"),
    )
    assert settings == ServeSettings(
        model="MODEL",
        pools_dir=tmp_path,
        default_pool="math+code",
        expert_memory_bytes=2 * GIB,
        preload=("math", "code"),
        moe_backend="triton",
        expert_dtype="fp8_e4m3",
        max_pools=8,
        drain_timeout_seconds=1.5,
        auto_method="router",
        auto_examples=tmp_path,
        auto_tokens=64,
        elastic_min_experts=4,
        router_temperatures=(0.5, 2.0),
        auto_min_coverage=0.3,
    )


def test_settings_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        ServeSettings().max_pools = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--expert-memory", "1GiB", "--expert-slots", "4"], "give one"),
        (["--expert-memory", "0"], "--expert-memory is 0 bytes"),
        (["--expert-slots", "0"], "at least 1"),
        (["--stream-slots", "-1"], "--stream-slots is -1; give 0 or more"),
        (["--expert-slots", "few"], "--expert-slots is 'few'; give a whole number"),
        (["--pools", "/no/such/place"], "--pools /no/such/place is not a directory"),
        (["--moe-backend", "magic"], "give one of auto, triton, cpu, reference"),
        (["--expert-dtype", "int4"], "give one of auto, fp8_e4m3"),
        (
            ["--expert-dtype", "fp8_e4m3", "--moe-backend", "cpu"],
            "--expert-dtype fp8_e4m3 needs --moe-backend triton on a CUDA device; --moe-backend is"
            " cpu; leave",
        ),
        (["--expert-dtype", "fp8_e4m3", "--moe-backend", "reference"], "--moe-backend is ref"),
        (["--max-pools", "1"], "the base pool takes one row"),
        (["--load-deadline", "0"], "--load-deadline is 0.0; give a finite number above 0"),
        (["--step-deadline", "0"], "--step-deadline is 0.0; give a finite number above 0"),
        (["--step-deadline", "nan"], "--step-deadline is nan; give a finite number above 0"),
        (["--drain-timeout", "-1"], "0 or more"),
        (["--drain-timeout", "inf"], "0 or more"),
        (["--drain-timeout", "nan"], "0 or more"),
        (["--drain-timeout", "soon"], "give a number of seconds"),
        (["--default-experts", "0"], "--default-experts is 0; give at least 1"),
        (["--elastic-min-experts", "0"], "--elastic-min-experts is 0; give at least 1"),
        (["--router-temperatures", "2"], "is '2'; give two numbers, such as 0.5,2"),
        (
            ["--router-temperatures", "2,0.5"],
            "is 2,0.5; give two finite numbers above 0, the",
        ),
        (["--router-temperatures", "0,1"], "--router-temperatures is 0,1; give two finite"),
        (["--router-temperatures", "1,inf"], "--router-temperatures is 1,inf; give two finite"),
        (["--default-pool", "math@08"], "--default-pool: 'math@08' cannot be the name of a pool"),
        (["--default-pool", "Math"], "--default-pool: 'Math' cannot be the name of a pool"),
        (["--preload", "math,co de"], "--preload: 'co de' cannot be the name of a pool"),
        (["--preload", "math,math"], "names a pool twice"),
        (["--auto-method", "guess"], "--auto-method is 'guess'; give one of tfidf, router"),
        (["--auto-examples", "/no/such"], "--auto-examples /no/such is not a directory"),
        (["--auto-tokens", "0"], "--auto-tokens is 0; give at least 1"),
        (["--auto-tokens", "all"], "--auto-tokens is 'all'; give a whole number"),
        (["--auto-min-coverage", "1.5"], "is 1.5; give a share from 0 to 1"),
        (["--auto-min-coverage", "nan"], "is nan; give a share from 0 to 1"),
        (["--auto-min-coverage", "half"], "is 'half'; give a number from 0 to 1"),
    ],
)
def test_nonsense_is_refused_by_flag_and_value(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        settings_of(*flags)
    assert message in str(refusal.value)


# -- slots --


def test_slots_are_the_most_that_fit() -> None:
    assert slots_for_memory(4 * 10 * 100, 100, [32] * 4) == 10
    assert slots_for_memory(4 * 10 * 100 - 1, 100, [32] * 4) == 9
    assert slots_for_memory(10**9, 100, [32] * 4) == 32


def test_a_small_layer_leaves_its_share_to_the_others() -> None:
    # 8 + 8 + 4 slots: the third layer has only four experts
    assert slots_for_memory(20 * 100, 100, [32, 32, 4]) == 8


def test_a_budget_below_one_slot_per_layer_is_refused() -> None:
    with pytest.raises(ConfigError, match="is too small: one slot in each of 4 MoE layers"):
        slots_for_memory(399, 100, [32] * 4)


# -- vLLM's flags --


def namespace(**values: Any) -> argparse.Namespace:
    return argparse.Namespace(**values)


def test_vllms_defaults_pass() -> None:
    refuse_unsupported(
        namespace(
            enable_lora=None,
            api_server_count=None,
            data_parallel_size=1,
            pipeline_parallel_size=2,
            quantization=None,
            runner="auto",
            load_format="auto",
            worker_cls="auto",
            worker_extension_cls="",
            additional_config={"another": 1},
        ),
        environ={},
    )


@pytest.mark.parametrize(
    ("option", "value", "flag"),
    [
        ("enable_lora", True, "--enable-lora"),
        ("lora_modules", ["a=b"], "--lora-modules"),
        ("api_server_count", 2, "--api-server-count"),
        ("headless", True, "--headless"),
        ("grpc", True, "--grpc"),
        ("data_parallel_size", 2, "--data-parallel-size"),
        ("data_parallel_rank", 0, "--data-parallel-rank"),
        ("enable_expert_parallel", True, "--enable-expert-parallel"),
        ("enable_eplb", True, "--enable-eplb"),
        ("prefill_context_parallel_size", 2, "--prefill-context-parallel-size"),
        ("spec_model", "ngram", "--spec-model"),
        ("quantization", "fp8", "--quantization"),
        ("cpu_offload_gb", 1.0, "--cpu-offload-gb"),
        ("enable_sleep_mode", True, "--enable-sleep-mode"),
        ("kv_transfer_config", {"kv_role": "kv_both"}, "--kv-transfer-config"),
        ("kv_offloading_size", 1.0, "--kv-offloading-size"),
        ("enable_return_routed_experts", True, "--enable-return-routed-experts"),
        ("runner", "pooling", "--runner"),
        ("convert", "embed", "--convert"),
        ("model_impl", "transformers", "--model-impl"),
        ("load_format", "safetensors", "--load-format"),
        ("worker_cls", "mine.Worker", "--worker-cls"),
        ("worker_extension_cls", "mine.Extension", "--worker-extension-cls"),
    ],
)
def test_what_cannot_be_carried_is_refused_with_a_reason(
    option: str, value: object, flag: str
) -> None:
    with pytest.raises(ConfigError) as refusal:
        refuse_unsupported(namespace(**{option: value}), environ={})
    message = str(refusal.value)
    assert message.startswith(f"{flag} is {value!r}, which emo-serve does not support yet: ")
    assert message.endswith("; leave it out")


NGRAM = {"method": "ngram", "num-speculative-tokens": 4, "prompt_lookup_min": 2}


@pytest.mark.parametrize(
    "given",
    [
        {"speculative_config": {**NGRAM, "prompt_lookup_max": 3}},
        {"spec_method": "ngram", "spec_tokens": 4},
        {"spec_method": "ngram", "speculative_config": {"num_speculative_tokens": 4}},
    ],
)
def test_drafts_from_the_text_itself_are_accepted(given: dict[str, object]) -> None:
    refuse_unsupported(namespace(**given), environ={})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"spec_method": "mtp"}, "--spec-method: the method is 'mtp', .* drafts, has no pools"),
        (
            {"speculative_config": {"model": "another", "num_speculative_tokens": 2}},
            "--speculative-config: the method is None, .* a draft model, .* use ngram",
        ),
        (
            {"speculative_config": {"method": "suffix"}},
            "the method is 'suffix', .* needs a package that is not among the pinned ones",
        ),
        ({"spec_method": "ngram_gpu"}, "drafts on the GPU for ngram, too"),
        (
            {"spec_method": "ngram", "pipeline_parallel_size": 2},
            "--pipeline-parallel-size is 2, .* the first stage does not learn",
        ),
        (
            {"speculative_config": {**NGRAM, "enable_adaptive_verification": True}},
            "has 'enable_adaptive_verification', .* with method, num_speculative_tokens, prompt_",
        ),
    ],
)
def test_other_drafts_are_refused_with_a_reason(given: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        refuse_unsupported(namespace(**given), environ={})


def test_our_own_load_format_may_be_named() -> None:
    refuse_unsupported(namespace(load_format="emo"), environ={})


def test_our_key_of_additional_config_is_ours() -> None:
    with pytest.raises(
        ConfigError, match="--additional-config: the key 'emo_serve' belongs to emo-serve"
    ):
        refuse_unsupported(namespace(additional_config={"emo_serve": {}}), environ={})


@pytest.mark.parametrize("variable", ["VLLM_ALLOW_RUNTIME_LORA_UPDATING", "VLLM_USE_RUST_FRONTEND"])
def test_variables_that_change_the_front_end_are_refused(variable: str) -> None:
    refuse_unsupported(namespace(), environ={variable: "0"})
    with pytest.raises(ConfigError, match=variable):
        refuse_unsupported(namespace(), environ={variable: "1"})
