"""The JSON of GET /v1/residency: what is in every slot, and for whom."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from emo_serve.server.pool_admin.status import SlotMap

__all__ = ["LayerSlots", "SlotHolder", "SlotMapAnswer", "slot_map_answer"]


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True)


class SlotHolder(_Answer):
    """A pool that holds slots; pools of equal content hold them as one."""

    name: str = Field(description="the name that was loaded first")
    content_hash: str


class LayerSlots(_Answer):
    """The slots of one MoE layer, in order."""

    experts: list[int | None] = Field(description="the expert in each slot; null for a free one")
    holders: list[list[int]] = Field(
        description="for each slot, the pools that need its expert: places in `pools`"
    )
    loading: list[int] = Field(description="the slots whose expert is being copied")


class SlotMapAnswer(_Answer):
    """Which expert is in which slot, and which pools need it there.

    A slot is leased while a pool that needs it has running requests.
    """

    object: Literal["slots"] = "slots"
    pools: list[SlotHolder]
    layers: list[LayerSlots | None] = Field(
        description="one entry per layer, null for a dense layer"
    )


def slot_map_answer(slots: SlotMap) -> SlotMapAnswer:
    """Build the answer about what is in every slot."""
    return SlotMapAnswer(
        pools=[SlotHolder(name=one.name, content_hash=one.content_hash) for one in slots.pools],
        layers=[
            LayerSlots(
                experts=list(layer.experts),
                holders=list(map(list, layer.holders)),
                loading=list(layer.loading),
            )
            if layer.experts
            else None
            for layer in slots.layers
        ],
    )
