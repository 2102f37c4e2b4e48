"""One answer about pools from those of all replicas: JSON in, JSON out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["merged_card", "merged_list"]

_Json = dict[str, Any]
_STATES = ("resident", "closing", "loading", "waiting", "streamed", "absent")  # the best first
_SUMS = ("running_requests", "waiting_requests", "hits", "misses")


def merged_list(answers: Mapping[str, _Json]) -> _Json:
    """Merge what GET /v1/pools answers on each replica; `answers` has at least one.

    Requests, hits and slots are sums. `replicas` says what is different on each.
    """
    lists = [answers[name] for name in sorted(answers)]
    names = dict.fromkeys(card["name"] for answer in lists for card in answer["data"])
    cards = {name: _by_name(answer) for name, answer in answers.items()}
    merged: _Json = {
        **lists[0],
        "data": [
            merged_card({one: have[name] for one, have in cards.items() if name in have})
            for name in names
        ],
        "slots": _merged_slots([answer["slots"] for answer in lists]),
        "building": next((answer["building"] for answer in lists if answer["building"]), None),
        "replicas": {name: _account(answers[name]) for name in sorted(answers)},
    }
    if "holders" in merged:
        merged["holders"] = _summed([answer["holders"] for answer in lists])
    for key in ("running_requests", "waiting_requests"):
        merged[key] = sum(answer[key] for answer in lists)
    merged["persists"] = all(answer["persists"] for answer in lists)
    return merged


def merged_card(cards: Mapping[str, _Json]) -> _Json:
    """Merge what the replicas answer about one pool; `cards` has at least one.

    The pool has the best of its states, and is pinned if it is anywhere. Its row and what its
    experts share are one replica's own, so they are left out.
    """
    ordered = [cards[name] for name in sorted(cards)]
    best = min(ordered, key=lambda card: _STATES.index(card["state"]))
    merged: _Json = {
        **best,
        "row": None,
        "pinned": any(card["pinned"] for card in ordered),
        "resident": any(card["resident"] for card in ordered),
        "persisted": any(card["persisted"] for card in ordered),
        "coverage": _mean_coverage(ordered),
        "last_used": max(card["last_used"] or 0 for card in ordered) or None,
        "replicas": {
            name: {key: cards[name][key] for key in ("state", "pinned", *_SUMS)}
            for name in sorted(cards)
        },
    }
    if "holders" in merged:
        merged["holders"] = _summed([card["holders"] for card in ordered])
    for key in _SUMS:
        merged[key] = sum(card[key] for card in ordered)
    return merged


def _by_name(answer: _Json) -> dict[str, _Json]:
    return {card["name"]: card for card in answer["data"]}


def _merged_slots(accounts: list[_Json]) -> _Json:
    return {
        key: value if key == "bytes_per_slot" else sum(account[key] for account in accounts)
        for key, value in accounts[0].items()
    }


def _account(answer: _Json) -> _Json:
    return {
        "resident": [card["name"] for card in answer["data"] if card["resident"]],
        "pinned": [card["name"] for card in answer["data"] if card["pinned"]],
        "slots": answer["slots"],
        "running_requests": answer["running_requests"],
        "waiting_requests": answer["waiting_requests"],
    }


def _summed(maps: list[list[list[int]]]) -> list[list[int]]:
    """Add up, expert by expert, how many resident pools hold it on each replica."""
    layers = zip(*maps, strict=True)
    return [[sum(counts) for counts in zip(*layer, strict=True)] for layer in layers]


def _mean_coverage(cards: list[_Json]) -> float | None:
    """Return the mean over requests, as far as the cards tell their number."""
    shares = [(card["coverage"], card["hits"] + card["misses"]) for card in cards]
    known = [(share, max(1, count)) for share, count in shares if share is not None]
    total = sum(count for _, count in known)
    return sum(share * count for share, count in known) / total if total else None
