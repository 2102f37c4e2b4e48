"""Golden text of the series of pools, and what routers read out of it.

`Picker` reads as the endpoint pickers are described that follow vLLM's series. Of the series whose
lists are not both empty, the one with the greatest value is the state; without one, the last state
stays. Lists are split at commas, and nothing is trimmed. A name in the running list scores highest;
then any name, while both lists together are shorter than `max_lora`; then one in the waiting list.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import vllm.v1.metrics.loggers
from prometheus_client.parser import text_string_to_metric_families

from emo_serve.exposition import Exposition
from emo_serve.names import is_pool_or_union
from emo_serve.router_metrics import NO_POOL, PoolsAtHand, pools_family

GOLDEN = """\
# HELP vllm:lora_requests_info Pools as LoRA adapters, for routers: names, and how many of them fit without eviction
# TYPE vllm:lora_requests_info gauge
vllm:lora_requests_info{max_lora="6",running_lora_adapters="math,emo:math,emo",waiting_lora_adapters="law,emo:law"} 1.7e+09
"""  # noqa: E501
AT_HAND = PoolsAtHand(("math", "emo:math", "emo"), ("law", "emo:law"), num_more=1)


def text_of(pools: PoolsAtHand, now: float = 1.7e9) -> str:
    return Exposition().text([pools_family(pools, now)]).decode()


class Picker:
    """A router's picture of one server."""

    def __init__(self) -> None:
        self.running: set[str] = set()
        self.waiting: set[str] = set()
        self.most = 0

    def scrape(self, text: str) -> None:
        """Read one answer."""
        families = {family.name: family for family in text_string_to_metric_families(text)}
        family = families["vllm:lora_requests_info"]
        assert family.type == "gauge", "readers ask for the value of a gauge"
        newest, newest_value = None, 0.0
        for sample in family.samples:
            labels = sample.labels
            is_empty = not (labels["running_lora_adapters"] or labels["waiting_lora_adapters"])
            if not is_empty and sample.value > newest_value:
                newest, newest_value = labels, sample.value
        if newest is not None:
            self.running, self.waiting = (
                set(newest[name].split(",")) if newest[name] else set()
                for name in ("running_lora_adapters", "waiting_lora_adapters")
            )
            self.most = int(newest["max_lora"])

    def score(self, model: str) -> float:
        """Return how good a place for a request this server is."""
        if model in self.running:
            return 1.0
        if len(self.running) + len(self.waiting) < self.most:
            return 0.8
        return 0.6 if model in self.waiting else 0.0


def test_the_text_is_this() -> None:
    assert text_of(AT_HAND) == GOLDEN


def test_names_and_labels_are_vllms() -> None:
    source = Path(vllm.v1.metrics.loggers.__file__).read_text()
    (sample,) = pools_family(AT_HAND, 1.0).samples
    for name in (sample.name, *sample.labels):
        assert f'"{name}"' in source


def test_a_router_prefers_what_is_resident_then_room_then_what_is_awaited() -> None:
    picker = Picker()
    picker.scrape(text_of(AT_HAND))
    assert [picker.score(name) for name in ("math", "emo:math", "emo")] == [1.0] * 3
    assert [picker.score(name) for name in ("law", "code")] == [0.8] * 2
    picker.scrape(text_of(PoolsAtHand(AT_HAND.resident, AT_HAND.awaited, num_more=0)))
    assert [picker.score(name) for name in ("math", "law", "code")] == [1.0, 0.6, 0.0]


@pytest.mark.parametrize(("num_more", "score"), [(3, 0.8), (0, 0.0)])
def test_an_empty_server_is_seen_to_be_empty(num_more: int, score: float) -> None:
    picker = Picker()
    picker.scrape(text_of(AT_HAND))
    picker.scrape(text_of(PoolsAtHand((), (), num_more), now=1.7e9 + 1))
    assert picker.running == {NO_POOL} and not picker.waiting
    assert picker.score("math") == score
    assert not is_pool_or_union(NO_POOL), "no client can ask for it"


def test_a_name_that_the_list_cannot_hold_is_left_out_and_not_counted() -> None:
    picker = Picker()
    picker.scrape(text_of(PoolsAtHand(("math", "a,b:math", "a,b"), ("a,b:law",), 0)))
    assert (picker.running, picker.waiting, picker.most) == ({"math"}, set(), 1)
