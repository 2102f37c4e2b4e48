"""Which pool a prompt gets: by the router's mass, by a classifier of text, and by neither."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emo_serve import demo
from emo_serve.config import ServeSettings, add_serve_flags
from emo_serve.emo.config import load_config
from emo_serve.errors import ConfigError, LoadDeadlineExceeded, RequestError, TooManyWaiting
from emo_serve.facts import MoeLayer
from emo_serve.metrics import AUTO_PROBE_POOL
from emo_serve.pools.pool import ExpertPool, LayerExperts
from emo_serve.server.auto import by_classifier, by_vote, choice, example_text
from emo_serve.server.auto.by_classifier import TfidfChooser
from emo_serve.server.auto.by_router import RouterChooser, coverages, trunk_pool
from emo_serve.server.auto.by_vote import VotingChooser
from emo_serve.server.auto.candidates import Candidates
from emo_serve.server.auto.choice import make_chooser, read_auto_examples
from emo_serve.server.auto.prompt_prefix import PromptPrefix
from emo_serve.server.auto.prompt_text import Prompt
from emo_serve.vllm_plugin.contract import RouterMass
from tests.support.fake_engine import FakeEngine, settle
from tests.support.pool_services import MOE_LAYERS, ServiceUnderTest, pool, service_of
from tests.support.residency_world import A, B, C, Client, in_virtual_time, loaded
from tests.support.served_tokenizer import FileTokenizer

VOCABULARY = 3072  # of the demo model, whose tokenizer reads the prompts
TEXTS = {
    "math": ["two plus two equals four", "the sum of 3 and 4 is 7", "half of 18 equals 9"],
    "code": ["def f(x): return x", "import os; os.path.join(a, b)", "for i in range(n): pass"],
    "law": ["the court finds the defendant liable", "the plaintiff may appeal the verdict"],
}


class FakeProbe:
    """A router whose mass lies on the experts the test names, alike in every layer."""

    max_tokens = 12

    def __init__(self, mass: Sequence[float] = (1.0,) * 7) -> None:
        self.mass_of_layer = mass
        self.error: Exception | None = None
        self.asked: list[tuple[ExpertPool, list[int]]] = []

    async def mass(
        self, pool: ExpertPool, token_ids: Sequence[int], *, priority: int = 0
    ) -> RouterMass:
        assert priority == 0
        self.asked.append((pool, list(token_ids)))
        if self.error is not None:
            raise self.error
        total, tokens = sum(self.mass_of_layer), len(token_ids)
        layer = tuple(tokens * share / total for share in self.mass_of_layer) + (float(tokens),)
        return RouterMass(tokens, ((), layer, layer))


def prefix_of(num_tokens: int = 256, directory: Path | None = None) -> PromptPrefix:
    return PromptPrefix(FileTokenizer(directory or demo.model_dir()), num_tokens, VOCABULARY)


def router(
    service: ServiceUnderTest, probe: FakeProbe, num_tokens: int = 256, min_coverage: float = 0.4
) -> RouterChooser:
    start = prefix_of(num_tokens)
    candidates = Candidates(service.lookup, service.manager)
    return RouterChooser(probe, candidates, start, MOE_LAYERS, min_coverage, service.temporary)  # type: ignore[arg-type]


async def with_base() -> ServiceUnderTest:
    """Return a service whose base pool is resident."""
    service = service_of()
    await service.residency.load("base")
    return service


# -- coverage --


def test_coverage_is_the_mean_share_over_tokens_and_layers() -> None:
    layers = (None, MoeLayer(4, 1, (), 2), MoeLayer(4, 1, (0,), 2), MoeLayer(2, 2, (), 2))
    # 10 tokens; the second MoE layer has one softmax over all, the third nothing but shared ones
    mass = RouterMass(10, ((), (5, 3, 2, 10), (2, 2, 2, 4), (6, 4)))
    first = ExpertPool("a", (None, *(LayerExperts((0, 1)),) * 3)).complete(layers)
    nothing = ExpertPool("b", (None, *(LayerExperts(()),) * 3)).complete(layers)
    everything = ExpertPool.base(layers)
    found = coverages(mass, [first, nothing, everything], layers)
    assert found == pytest.approx([(0.8 + 0.8) / 2, (0.0 + 0.6) / 2, 1.0])


@given(st.data())
def test_a_larger_pool_covers_no_less(data: st.DataObject) -> None:
    shares = data.draw(st.lists(st.floats(0.01, 1), min_size=7, max_size=7))
    experts = data.draw(st.sets(st.integers(0, 6)))
    more = data.draw(st.sets(st.integers(0, 6))) | experts
    layer = (*(share / sum(shares) for share in shares), 1.0)
    mass = RouterMass(1, ((), layer, layer))
    small, large = coverages(mass, [pool("a", *experts), pool("b", *more)], MOE_LAYERS)
    assert -1e-9 <= small <= large + 1e-9 <= 1 + 2e-9


# -- candidates --


@in_virtual_time
async def test_asking_what_may_be_chosen_promises_nobody_a_place() -> None:
    clock = asyncio.get_running_loop().time
    lookup: Any = SimpleNamespace(named=(A, B, C))

    async def retry_after(times: int) -> int:
        engine = FakeEngine(load_seconds=5)
        manager = await loaded(engine, A, slots=2, max_waiting=1, clock=clock)
        running, waiting = Client(manager, A), Client(manager, B)
        await settle()
        for _ in range(times):
            assert Candidates(lookup, manager).pools() == [A, B, C], "though the queue is full"
        with pytest.raises(TooManyWaiting) as caught:
            manager.check_admissible(C)
        await running.finish()
        await waiting.finish()
        return caught.value.retry_after_seconds

    assert await retry_after(9) == await retry_after(0)


# -- router --


async def test_the_pool_that_covers_most_wins() -> None:
    service = await with_base()
    probe = FakeProbe((0, 0, 5, 5, 1, 0, 0))
    chosen = await router(service, probe).choose(Prompt("x = 1"))
    assert chosen.name == "code"
    ((asked, ids),) = probe.asked
    assert asked.content_hash == service.lookup.base_pool.content_hash
    assert asked.name == AUTO_PROBE_POOL, "it is no request for the base pool"
    assert ids == await prefix_of().ids(Prompt("x = 1"))


async def test_without_the_base_pool_the_trunk_is_asked() -> None:
    service, probe = service_of(), FakeProbe((0, 0, 1, 1, 9, 9, 9))
    assert (await router(service, probe).choose(Prompt("x"))).name == "law"
    ((asked, _),) = probe.asked
    assert asked.expert_ids == ((), (7,), (7,))  # the shared expert of each layer


def test_the_trunk_has_an_expert_in_every_layer() -> None:
    layers = (None, MoeLayer(4, 1, (), 2), MoeLayer(4, 0, (), 2), MoeLayer(4, 0, (2,), 2))
    assert trunk_pool(layers).complete(layers).expert_ids == ((), (3,), (0,), (2,))


async def test_too_little_coverage_means_the_base_pool_where_it_is_resident() -> None:
    even = (1.0,) * 7  # three of seven experts cover 0.43
    for service, expected in ((await with_base(), "base"), (service_of(), "law")):
        chooser = router(service, FakeProbe(even), min_coverage=0.5)
        assert (await chooser.choose(Prompt("x"))).name == expected
    chooser = router(await with_base(), FakeProbe(even), min_coverage=0.4)
    assert (await chooser.choose(Prompt("x"))).name == "law"


async def test_equal_coverage_goes_to_the_smaller_pool_and_then_by_name() -> None:
    service, probe = service_of(), FakeProbe((1, 0, 0, 0, 0, 0, 0))
    await service.definitions.add(pool("arith", 0, 1))
    assert (await router(service, probe).choose(Prompt("x"))).name == "arith"
    await service.definitions.add(pool("sums", 0))
    assert (await router(service, probe).choose(Prompt("x"))).name == "sums"


async def test_pools_come_and_go() -> None:
    service, probe = service_of(), FakeProbe((1, 1, 0, 0, 0, 0, 0))
    chooser = router(service, probe)
    assert (await chooser.choose(Prompt("x"))).name == "math"
    await service.definitions.remove("math")
    assert (await chooser.choose(Prompt("x"))).name != "math"


async def test_a_pool_that_the_slab_cannot_hold_is_not_chosen() -> None:
    service = service_of(slots=3)  # law has three experts and the shared one
    probe = FakeProbe((0, 0, 1, 0, 9, 9, 9))
    assert (await router(service, probe).choose(Prompt("x"))).name == "hot"


async def test_only_the_first_tokens_are_run() -> None:
    service = await with_base()
    for num_tokens, expected in ((4, 4), (256, FakeProbe.max_tokens)):
        probe = FakeProbe()
        await router(service, probe, num_tokens).choose(Prompt("one two three " * 50))
        assert len(probe.asked[0][1]) == expected
    probe = FakeProbe()
    await router(service, probe, 3).choose(Prompt(ids=(9, 8, 7, 6)))
    assert probe.asked[0][1] == [9, 8, 7]


async def test_one_pool_and_nothing_else_needs_no_question() -> None:
    service, probe = service_of(), FakeProbe()
    for name in ("code", "law", "hot"):
        await service.definitions.remove(name)
    assert (await router(service, probe).choose(Prompt("x"))).name == "math"
    await service.definitions.remove("math")
    with pytest.raises(RequestError, match="'auto' has no pool to choose: the slab can hold none"):
        await router(service, probe).choose(Prompt("x"))
    await service.residency.load("base")
    assert (await router(service, probe).choose(Prompt("x"))).name == "base"
    assert probe.asked == []


async def test_what_the_probe_raises_is_raised() -> None:
    probe = FakeProbe()
    probe.error = LoadDeadlineExceeded("too late")
    with pytest.raises(LoadDeadlineExceeded):
        await router(service_of(), probe).choose(Prompt("x"))


@pytest.mark.parametrize("token", [-1, VOCABULARY, 2**40])
async def test_ids_the_model_does_not_have_are_refused(token: int) -> None:
    probe = FakeProbe()
    with pytest.raises(RequestError, match=f"token id {token}; expected 0 to 3071"):
        await router(service_of(), probe).choose(Prompt(ids=(3, token)))
    assert probe.asked == []


async def test_a_text_with_half_a_surrogate_pair_is_read() -> None:
    assert (await prefix_of().text(Prompt("a\ud800b"))).startswith("a")


async def test_a_model_without_a_tokenizer_takes_ids(tmp_path: Path) -> None:
    start = prefix_of(directory=tmp_path)
    assert await start.ids(Prompt(ids=(3, 4))) == [3, 4]
    with pytest.raises(RequestError, match=r"cannot read this prompt: .*tokenizer\.json"):
        await start.ids(Prompt("x"))


# -- classifier --


async def taught(service: ServiceUnderTest, *names: str) -> TfidfChooser:
    chooser = TfidfChooser(Candidates(service.lookup, service.manager), prefix_of())
    for name in names:
        chooser.add_examples(name, TEXTS[name])
    await chooser.fitted()
    return chooser


async def test_a_text_goes_to_the_pool_whose_examples_it_is_like() -> None:
    chooser = await taught(service_of(), *TEXTS)
    for text, name in (
        ("three plus nine equals", "math"),
        ("import sys\nreturn os.path", "code"),
        ("the defendant may appeal", "law"),
    ):
        assert (await chooser.choose(Prompt(text))).name == name
        ids = tuple(await prefix_of().ids(Prompt(text)))
        assert (await chooser.choose(Prompt(ids=ids))).name == name


async def test_a_text_like_none_goes_to_the_base_pool_where_it_is_resident(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(by_classifier, "MIN_MARGIN", 0.2)
    known, strange = Prompt(TEXTS["law"][0]), Prompt("colourless green ideas sleep furiously")
    for service, expected in ((await with_base(), {"base"}), (service_of(), set(TEXTS))):
        chooser = await taught(service, *TEXTS)
        assert (await chooser.choose(strange)).name in expected
        assert (await chooser.choose(known)).name == "law"


async def test_it_learns_what_is_added() -> None:
    service = service_of()
    chooser = await taught(service, "math", "code")
    prompt = Prompt("the court finds the defendant liable")
    assert (await chooser.choose(prompt)).name != "law"
    chooser.add_examples("law", TEXTS["law"])
    await chooser.fitted()
    assert (await chooser.choose(prompt)).name == "law"


async def test_examples_wait_for_their_pool_and_a_removed_one_is_not_chosen() -> None:
    service = service_of()
    await service.definitions.remove("law")
    chooser = await taught(service, *TEXTS)
    prompt = Prompt(TEXTS["law"][0])
    assert (await chooser.choose(prompt)).name != "law"
    await service.definitions.add(pool("law", 4, 5))
    assert (await chooser.choose(prompt)).name == "law"


async def test_with_fewer_than_two_to_choose_from_it_is_the_base_pool_or_nothing() -> None:
    assert (await (await taught(await with_base(), "math")).choose(Prompt("1"))).name == "base"
    for names in ((), ("math",)):
        with pytest.raises(RequestError, match="fewer than two pools have examples"):
            await (await taught(service_of(), *names)).choose(Prompt("1"))


async def test_what_one_pool_may_teach_is_bounded(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(example_text, "_MAX_CHARACTERS", 30)
    service = service_of()
    chooser = TfidfChooser(Candidates(service.lookup, service.manager), prefix_of())
    chooser.add_examples("math", ["  ", "plus " * 5, "the court finds the defendant"])
    chooser.add_examples("law", [TEXTS["law"][0][:30]])
    await chooser.fitted()
    assert "pool math: auto learns from only the first 30 characters" in caplog.text
    assert "pool law" not in caplog.text
    assert (await chooser.choose(Prompt("the court finds the defendant"))).name == "law"


# -- both --


def vote(service: ServiceUnderTest, classifier: TfidfChooser, probe: FakeProbe) -> VotingChooser:
    candidates = Candidates(service.lookup, service.manager)
    return VotingChooser(candidates, classifier, router(service, probe))


async def all_taught(service: ServiceUnderTest) -> TfidfChooser:
    await service.definitions.remove("hot")
    return await taught(service, *TEXTS)


async def test_where_the_classifier_is_sure_the_engine_is_not_asked() -> None:
    service, probe = service_of(), FakeProbe((1, 1, 0, 0, 0, 0, 0))
    chooser = vote(service, await all_taught(service), probe)
    for name, texts in TEXTS.items():
        assert (await chooser.choose(Prompt(texts[0]))).name == name
    assert probe.asked == []


async def test_where_it_is_not_sure_the_router_votes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    service = service_of()
    classifier = await all_taught(service)
    monkeypatch.setattr(by_vote, "SURE_LEAD", 9.0)
    for mass, expected in (
        ((1, 1, 0, 0, 0, 0, 0), "math"),
        ((0, 0, 1, 1, 0, 0, 0), "code"),
        ((0, 0, 0, 0, 1, 1, 1), "law"),
    ):
        probe = FakeProbe(mass)
        assert (await vote(service, classifier, probe).choose(Prompt("xyz"))).name == expected
        assert len(probe.asked) == 1


async def test_the_classifier_decides_while_the_router_cannot_be_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(by_vote, "SURE_LEAD", 9.0)
    service, probe = service_of(), FakeProbe((1, 1, 0, 0, 0, 0, 0))
    chooser = vote(service, await all_taught(service), probe)
    probe.error = LoadDeadlineExceeded("too late")
    assert (await chooser.choose(Prompt(TEXTS["law"][0]))).name == "law"


@pytest.mark.parametrize("bound", ["UNSURE_LEAD", "LEAST_MARGIN"])
async def test_a_vote_that_nobody_wins_goes_to_the_base_pool_where_it_is_resident(
    bound: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody wins by a lead too small, nor by a margin that says it is none of the pools."""
    monkeypatch.setattr(by_vote, "SURE_LEAD", 9.0)
    monkeypatch.setattr(by_vote, bound, 9.0)
    for service, expected in ((await with_base(), "base"), (service_of(), "code")):
        chooser = vote(service, await all_taught(service), FakeProbe((0, 0, 1, 1, 0, 0, 0)))
        assert (await chooser.choose(Prompt("xyz"))).name == expected


# -- which of them --


async def test_the_router_is_asked_while_a_pool_has_no_examples(
    caplog: pytest.LogCaptureFixture,
) -> None:
    service, probe = service_of(), FakeProbe((1, 1, 0, 0, 0, 0, 0))
    await service.definitions.remove("hot")
    classifier = await taught(service, "math")
    chooser, code = vote(service, classifier, probe), Prompt(TEXTS["code"][0])
    assert (await chooser.choose(code)).name == "math"
    assert caplog.text == ""  # there never were two pools to tell apart
    chooser.add_examples("code", TEXTS["code"])
    await classifier.fitted()
    for _ in range(2):
        assert (await chooser.choose(code)).name == "math"
    assert caplog.text.count("auto uses the router: no examples of pool law") == 1
    assert len(probe.asked) == 3
    chooser.add_examples("law", TEXTS["law"])
    await classifier.fitted()
    assert (await chooser.choose(code)).name == "code"
    await service.definitions.remove("law")
    assert (await chooser.choose(code)).name == "code"
    assert len(probe.asked) == 3


# -- at start --


def settings_of(*flags: str) -> ServeSettings:
    parser = argparse.ArgumentParser()
    parser.set_defaults(model_tag=None)
    add_serve_flags(parser)
    return ServeSettings.from_args(parser.parse_args(flags))


@pytest.fixture
def examples(tmp_path: Path) -> str:
    (tmp_path / "math.jsonl").write_text('"1 + 1"\n{"text": "2 + 2"}\n')
    (tmp_path / "math.txt").write_text("3 + 3")
    chat = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "so"}]
    (tmp_path / "law.jsonl").write_text(json.dumps({"messages": chat}))
    (tmp_path / "README.md").write_text("not an example")
    (tmp_path / ".law.txt").write_text("nor this")
    return str(tmp_path)


def test_examples_are_read_by_the_name_of_their_pool(examples: str) -> None:
    found = {"law": ["why?\nso"], "math": ["1 + 1", "2 + 2", "3 + 3"]}
    assert read_auto_examples(settings_of("--auto-examples", examples)) == found
    tfidf = ("--auto-method", "tfidf", "--auto-examples", examples)
    assert read_auto_examples(settings_of(*tfidf)) == found


def test_examples_that_are_not_used_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "math.jsonl").write_text("{")
    where = ("--auto-examples", str(tmp_path))
    assert read_auto_examples(settings_of(*where, "--auto-method", "router")) == {}
    assert read_auto_examples(settings_of()) == {}
    with pytest.raises(ConfigError, match=r"math\.jsonl:1: is not JSON"):
        read_auto_examples(settings_of(*where))


def test_a_classifier_with_nothing_to_learn_from_is_refused(examples: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="learns from examples; give --auto-examples DIR"):
        read_auto_examples(settings_of("--auto-method", "tfidf"))
    Path(examples, "law.jsonl").unlink()
    with pytest.raises(ConfigError, match="has examples for 1 pools, expected at least two"):
        read_auto_examples(settings_of("--auto-method", "tfidf", "--auto-examples", str(tmp_path)))


def test_without_scikit_learn_the_router_is_asked_or_the_start_refused(
    examples: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(choice, "is_installed", lambda: False)
    where = ("--auto-examples", examples)
    assert read_auto_examples(settings_of(*where)) == {}
    assert "auto uses the router: scikit-learn is not installed" in caplog.text
    with pytest.raises(ConfigError, match=r"pip install 'emo-serve\[auto\]'"):
        read_auto_examples(settings_of(*where, "--auto-method", "tfidf"))


@pytest.mark.parametrize(
    ("flags", "kind"),
    [
        ((), VotingChooser),
        (("--auto-method", "tfidf"), TfidfChooser),
        (("--auto-method", "router"), RouterChooser),
    ],
)
async def test_the_flag_says_who_chooses(flags: tuple[str, ...], kind: type) -> None:
    tokenizer, config = FileTokenizer(demo.model_dir()), load_config(demo.model_dir())
    service, probe = service_of(), FakeProbe()
    await service.definitions.remove("hot")
    candidates = Candidates(service.lookup, service.manager)
    chooser = await make_chooser(
        settings_of(*flags), candidates, service.temporary, probe, tokenizer, config, TEXTS
    )  # type: ignore[arg-type]
    assert type(chooser) is kind
    if kind is not RouterChooser:
        assert (await chooser.choose(Prompt(TEXTS["law"][0]))).name == "law"
        assert probe.asked == []


async def test_without_scikit_learn_only_the_router_can_choose(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(choice, "is_installed", lambda: False)
    tokenizer, config = FileTokenizer(demo.model_dir()), load_config(demo.model_dir())
    service = service_of()
    candidates = Candidates(service.lookup, service.manager)
    chooser = await make_chooser(
        settings_of(), candidates, service.temporary, FakeProbe(), tokenizer, config, {}
    )  # type: ignore[arg-type]
    assert isinstance(chooser, RouterChooser)
