"""What crosses between front end and workers arrives as it was sent, in vLLM's own encoding."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import TypeAdapter
from vllm.v1.engine import UtilityOutput
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder, UtilityResult

from emo_serve.vllm_plugin.contract import (
    CoverageReading,
    CoverageRow,
    EngineDescription,
    LoadProgress,
    PluginSettings,
    PoolUsage,
    RequestTag,
    RouterMass,
)

RECORDS = [
    LoadProgress(1, "failed", "model.safetensors is gone", 3, 2**40, 7, 2, 1),
    EngineDescription(
        rank=1,
        stage=0,
        trunk_bytes=2,
        slab_bytes=3,
        slot_bytes=4,
        num_slots=(5, 6),
        kv_cache_bytes=13,
        bytes_read=7,
        disk_reads=8,
        host_hits=9,
        host_bytes=10,
        host_experts=11,
        peak_rss_bytes=12,
        dtype="bfloat16",
        expert_dtype="float8_e4m3fn",
        moe_backend="triton",
        model_runner="v2",
        records_routing=True,
        routes_by_pool=False,
    ),
    CoverageReading((CoverageRow(2**40, 1.5, 2), CoverageRow(3, 0.0, 4)), 3),
    CoverageReading((), 0, streamed_experts=7, stream_seconds=0.25),
    RouterMass(3, ((0.1, 2.9), (), (3.0,))),
    PoolUsage(3, ((1, 2), (), (3,))),
]


def through_vllm(reply: dict[str, Any]) -> dict[str, Any]:
    """Return a reply as the front end gets it from the engine's process."""
    output = UtilityOutput(call_id=1, result=UtilityResult(reply))
    decoded = MsgpackDecoder(UtilityOutput).decode(MsgpackEncoder().encode(output))
    arrived: dict[str, Any] = decoded.result.result
    return arrived


@pytest.mark.parametrize("is_insecure", [False, True])
@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_replies_survive_vllms_serialisation(
    monkeypatch: pytest.MonkeyPatch, record: Any, is_insecure: bool
) -> None:
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", str(int(is_insecure)))
    arrived = through_vllm({"call_id": 7, "ok": True, "error": None, **vars(record)})
    assert arrived["call_id"] == 7
    assert TypeAdapter(type(record)).validate_python(arrived) == record


def test_settings_reach_the_workers_as_they_were_given() -> None:
    for settings in (PluginSettings(4, 8), PluginSettings(1, 2, "cpu", "auto", 1 << 30, False)):
        config = json.loads(json.dumps({"other": 1, **settings.to_config()}))
        assert PluginSettings.from_config(config) == settings


def test_tags_reach_the_workers_as_they_were_given() -> None:
    for tag in (RequestTag(), RequestTag(3), RequestTag(7, account=2**40, mass_slot=0)):
        extra_args = json.loads(json.dumps({"other": 1, **tag.to_extra_args()}))
        assert RequestTag.from_extra_args(extra_args, num_rows=8) == tag
