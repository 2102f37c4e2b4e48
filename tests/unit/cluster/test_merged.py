"""What all replicas answer about pools, as one answer."""

from __future__ import annotations

from typing import Any

from emo_serve.cluster.merged import merged_card, merged_list


def card(name: str = "math", state: str = "absent", **fields: Any) -> dict[str, Any]:
    counts = dict.fromkeys(("running_requests", "waiting_requests", "hits", "misses"), 0)
    found = {"name": name, "state": state, "resident": state == "resident", "pinned": False}
    found |= {"persisted": False, "row": 3, "coverage": None, "last_used": None}
    return {**found, **counts, **fields}


def listing(*cards: dict[str, Any], **fields: Any) -> dict[str, Any]:
    slots = {"total": 8, "used": 2, "bytes_per_slot": 64}
    found = {"data": list(cards), "slots": slots, "building": None, "persists": True}
    return {**found, "running_requests": 1, "waiting_requests": 2, **fields}


def test_the_best_state_counts_and_requests_are_summed() -> None:
    merged = merged_card(
        {
            "b": card(state="loading", hits=1, misses=3, last_used=5, coverage=0.5),
            "a": card(state="resident", hits=4, running_requests=2, coverage=1.0, pinned=True),
        }
    )
    assert merged["state"] == "resident"
    assert merged["resident"] and merged["pinned"]
    assert (merged["hits"], merged["misses"], merged["running_requests"]) == (5, 3, 2)
    assert (merged["row"], merged["last_used"], merged["coverage"]) == (None, 5, 0.75)
    assert list(merged["replicas"]) == ["a", "b"]
    assert merged["replicas"]["b"]["state"] == "loading"


def test_holders_are_added_up() -> None:
    merged = merged_card({"a": card(holders=[[1, 0], []]), "b": card(holders=[[1, 2], []])})
    assert merged["holders"] == [[2, 2], []]
    lists = {"a": listing(holders=[[1], [0]]), "b": listing(holders=[[0], [3]])}
    assert merged_list(lists)["holders"] == [[1], [3]]


def test_lists_have_every_pool_and_say_what_each_replica_has() -> None:
    merged = merged_list(
        {
            "a": listing(card("base"), card("math", "resident"), building={"name": "x"}),
            "b": listing(card("base"), card("code", "resident", pinned=True), persists=False),
        }
    )
    assert [one["name"] for one in merged["data"]] == ["base", "math", "code"]
    assert merged["slots"] == {"total": 16, "used": 4, "bytes_per_slot": 64}
    assert (merged["running_requests"], merged["waiting_requests"]) == (2, 4)
    assert merged["building"] == {"name": "x"}
    assert not merged["persists"]
    assert merged["replicas"]["a"]["resident"] == ["math"]
    assert merged["replicas"]["b"]["pinned"] == ["code"]
    assert list(merged["data"][1]["replicas"]) == ["a"]
