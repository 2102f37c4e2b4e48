"""The start-up summary, and a curl line that a shell accepts."""

from __future__ import annotations

import json
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from emo_serve.config import GIB
from emo_serve.server.startup.address import ServerAddress
from emo_serve.server.startup.machine_memory import MemoryLimit
from emo_serve.server.startup.memory import KvNeed, MemoryNeed, MemoryPlan, PoolSlots
from emo_serve.server.startup.summary import PoolLine, Summary, format_summary
from emo_serve.server.vllm_adapter.worker_calls import EngineFacts

FACTS = EngineFacts(
    num_ranks=1,
    num_stages=1,
    trunk_bytes=int(1.4 * GIB),
    slab_bytes=8 * GIB,
    slot_bytes=12582912,
    num_slots=(42,) * 16,
    kv_cache_bytes=GIB // 2,
    dtype="bfloat16",
    expert_dtype="bfloat16",
    moe_backend="cpu",
    routes_by_pool=True,
    records_routing=True,
)


SUMMARY = Summary(
    model="emo",
    facts=FACTS,
    memory=None,
    cache_tokens=6144,
    max_model_len=4096,
    experts_per_layer=(0, *[128] * 15),
    slots_per_layer=42,
    stream_slots=0,
    pools_source=Path("/pools"),
    pools=(
        PoolLine("base", (0, *[128] * 15), "too large for the slab"),
        PoolLine("math", (0, *[16] * 14, 20), "resident", is_default=True),
    ),
    refused=("bad.json: layer 1: an expert is 999",),
    address=ServerAddress(None, 8000),
    try_model="math",
)


def test_a_dense_model_has_no_slab() -> None:
    base = PoolLine("base", (0, 0), "resident", is_default=True)
    text = format_summary(replace(SUMMARY, experts_per_layer=(0, 0), pools=(base,), refused=()))
    assert "experts  none: a dense model, whose only pool is the base pool" in text
    assert "slab" not in text


def test_it_says_what_an_operator_asks() -> None:
    text = format_summary(SUMMARY)
    for line in (
        "emo is ready (bfloat16, expert backend: cpu)",
        "trunk    1.40 GiB",
        "slab     8.00 GiB: 42 slots per layer, 0.0117 GiB each",
        "KV cache 0.50 GiB: 6144 tokens, 1.5 contexts of 4096",
        "experts  128 x 15 MoE layers",
        "base      128 experts per layer  too large for the slab",
        "math    16-20 experts per layer  resident  (default)",
        "refused: bad.json: layer 1: an expert is 999",
        "URL      http://127.0.0.1:8000/v1",
        "try      curl ",
        "console  http://127.0.0.1:8000/console",
    ):
        assert line in text


def test_a_browser_cannot_open_a_unix_socket() -> None:
    address = ServerAddress(None, 8000, uds="/run/emo.sock")
    assert "console" not in format_summary(replace(SUMMARY, address=address))


MEMORY = MemoryPlan(
    MemoryNeed(
        trunk_bytes=int(1.4 * GIB),
        process_bytes=2 * GIB,
        host_expert_bytes=0,
        slot_bytes=12582912,
        experts_per_layer=(128,) * 15,
        pools=PoolSlots(16, 20),
        kv=KvNeed(128, 2**24, 4096, 128),
    ),
    num_slots=42,
    kv_bytes=GIB // 2,
    limit=MemoryLimit("cgroup /pod", 16 * GIB),
    slots_flag=None,
    kv_flag=None,
)
CHANGE_SLAB = "; chosen, change it with --expert-slots or --expert-memory"
CHANGE_CACHE = "; chosen, change it with --kv-cache-memory-bytes"


def test_a_devices_own_memory_is_vllms_to_divide() -> None:
    text = format_summary(SUMMARY)
    assert "chosen" not in text and "process" not in text and "free" not in text


def test_on_a_cpu_it_is_the_whole_account() -> None:
    lines = format_summary(replace(SUMMARY, memory=MEMORY)).splitlines()
    assert lines[1:6] == [
        "  trunk    1.40 GiB",
        f"  slab     8.00 GiB: 42 slots per layer, 0.0117 GiB each{CHANGE_SLAB}",
        f"  KV cache 0.50 GiB: 6144 tokens, 1.5 contexts of 4096{CHANGE_CACHE}",
        "  process  2.00 GiB kept for the processes: libraries and activations",
        "  memory   11.28 GiB of 16.00 GiB that was free (cgroup /pod)",
    ]


def test_what_the_user_gave_has_no_other_flag() -> None:
    memory = replace(MEMORY, slots_flag="--expert-slots", kv_flag="--kv-cache-memory-bytes")
    assert "chosen" not in format_summary(replace(SUMMARY, memory=memory))


def test_it_says_what_not_every_machine_has() -> None:
    tight = replace(MEMORY, num_slots=18, limit=None)
    text = format_summary(replace(SUMMARY, memory=tight))
    assert f"{CHANGE_SLAB} (every pool needs 20)\n" in text
    assert "free" not in text
    host = replace(MEMORY, need=replace(MEMORY.need, host_expert_bytes=GIB))
    text = format_summary(replace(SUMMARY, memory=host))
    assert "  host     1.00 GiB for experts that were read once, at most\n" in text


def test_it_says_how_many_slots_are_kept_to_stream() -> None:
    text = format_summary(replace(SUMMARY, stream_slots=8))
    assert ": 42 slots per layer and 8 to stream pools that do not fit, 0.0117 GiB each" in text


def test_it_names_the_experts_dtype_where_it_is_another() -> None:
    facts = replace(FACTS, expert_dtype="float8_e4m3fn", moe_backend="triton")
    text = format_summary(replace(SUMMARY, facts=facts))
    assert "(bfloat16, experts in float8_e4m3fn, expert backend: triton)" in text


@pytest.mark.parametrize(
    ("address", "url"),
    [
        (ServerAddress(None, 8000), "http://127.0.0.1:8000"),
        (ServerAddress("0.0.0.0", 80), "http://127.0.0.1:80"),
        (ServerAddress("::", 80), "http://[::1]:80"),
        (ServerAddress("gpu7", 1, is_tls=True), "https://gpu7:1"),
        (ServerAddress(None, 1, uds="/run/emo.sock"), "http://localhost"),
    ],
)
def test_the_url_works_on_this_machine(address: ServerAddress, url: str) -> None:
    assert address.url == url


@pytest.mark.parametrize(
    ("host", "is_local"),
    [
        ("127.0.0.1", True),
        ("127.8.9.10", True),
        ("::1", True),
        ("localhost", True),
        (None, False),
        ("", False),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.7", False),
        ("gpu7", False),
        ("localhost.example.org", False),
    ],
)
def test_only_a_loopback_address_or_a_unix_socket_is_local(
    host: str | None, is_local: bool
) -> None:
    assert ServerAddress(host, 80).is_local is is_local
    assert ServerAddress(host, 80, uds="/run/emo.sock").is_local


def test_the_curl_line_is_one_command() -> None:
    words = shlex.split(ServerAddress("127.0.0.1", 8000).curl("math"))
    assert words[0] == "curl"
    assert "http://127.0.0.1:8000/v1/completions" in words
    assert json.loads(words[words.index("-d") + 1])["model"] == "math"


@pytest.mark.parametrize("name", ["it's mine", "a b", 'say "hi"', "$HOME", "back\\slash", "x;ls"])
def test_the_curl_line_is_one_command_whatever_the_names(name: str) -> None:
    uds = f"/run/{name}.sock"
    line = ServerAddress(None, 1, uds=uds, key_variable="VLLM_API_KEY").curl(name)
    echoed = subprocess.run(
        ["sh", "-c", f"curl() {{ printf '%s\\0' \"$@\"; }}; {line}"],
        capture_output=True,
        text=True,
        check=True,
        env={"HOME": "/nowhere", "VLLM_API_KEY": "k"},
    )
    words = echoed.stdout.split("\0")
    assert words[words.index("--unix-socket") + 1] == uds
    assert json.loads(words[words.index("-d") + 1])["model"] == name
    assert "Authorization: Bearer k" in words and words[-2] == words[words.index("-d") + 1]


def test_a_key_stays_in_a_variable_and_a_socket_is_named() -> None:
    line = ServerAddress(None, 1, uds="/run/emo.sock", key_variable="VLLM_API_KEY").curl("emo")
    words = shlex.split(line)
    assert words[words.index("-H") + 1] == "Authorization: Bearer $VLLM_API_KEY"
    assert words[words.index("--unix-socket") + 1] == "/run/emo.sock"
