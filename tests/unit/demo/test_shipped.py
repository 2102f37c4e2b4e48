"""What ships: files that open and fit, and the effect they are shipped to show."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from emo_serve import demo
from emo_serve.demo.training.corpus import HELDOUT_TOKENS
from emo_serve.demo.training.documents import READERS
from emo_serve.demo.training.evaluate import Experiment
from emo_serve.emo.checkpoint import Checkpoint
from emo_serve.pools.catalog import PoolCatalog

MIB = 2**20


@pytest.mark.parametrize("name", demo.MODELS)
def test_checkpoint_opens(name: str) -> None:
    checkpoint = Checkpoint.open(demo.model_dir(name))
    assert checkpoint.config.moe_layers[0].num_experts == 32
    expert = checkpoint.expert(3, 31)
    assert expert.gate_FD.isfinite().all()
    assert expert.num_bytes == checkpoint.expert_bytes == 3 * 192 * 64 * 2


@pytest.mark.parametrize("name", demo.MODELS)
def test_pools_fit_the_model_they_name(name: str) -> None:
    checkpoint = Checkpoint.open(demo.model_dir(name))
    moe_layers = checkpoint.config.moe_layers
    catalog = PoolCatalog.read(demo.pools_dir(name), moe_layers, checkpoint.fingerprint())
    assert not catalog.refused
    assert list(catalog.pools) == demo.domains()
    for pool in catalog.pools.values():
        assert pool.model is not None
        assert pool.model.name == name
        assert pool.calibration is not None
        assert [len(experts) for experts in pool.expert_ids] == [8] * 4
        assert all(31 in experts for experts in pool.expert_ids), "the shared expert"


@pytest.mark.parametrize("name", demo.MODELS)
def test_tokenizer_returns_what_it_was_given(name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo.model_dir(name))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 0, 1)
    assert len(tokenizer) == Checkpoint.open(demo.model_dir(name)).config.vocab_size
    for text in ("def f(x):\n\treturn 12 + x\n", "¿Qué?  ∀x ☃", demo.heldout("c")[0]):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    digits = tokenizer("1234", add_special_tokens=False)["input_ids"]
    assert len(digits) == 4


def test_chat_template_continues_the_text() -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo.model_dir())
    messages = [{"role": "system", "content": "a"}, {"role": "user", "content": "def f("}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|endoftext|>a\ndef f("


def test_both_models_share_one_tokenizer() -> None:
    first, second = ((demo.model_dir(n) / "tokenizer.json").read_bytes() for n in demo.MODELS)
    assert first == second


def test_every_domain_has_heldout_texts() -> None:
    assert demo.domains() == sorted(READERS)
    tokenizer = AutoTokenizer.from_pretrained(demo.model_dir())
    for domain in demo.domains():
        texts = demo.heldout(domain)
        assert len(set(texts)) == len(texts) >= 24
        lengths = [len(tokenizer(text)["input_ids"]) - 1 for text in texts]
        assert min(lengths) >= HELDOUT_TOKENS
        assert max(lengths) <= 520


def test_size_of_everything_that_ships() -> None:
    root = Path(demo.__file__).parent
    size = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
    assert size <= 40 * MIB


# Rise over the full model, mean of these domains, 3 texts each, as measured at shipping:
# EMO own pool -0.004, wrong pool +2.12; the twin's own pool +1.00.
DOMAINS = ("c", "spanish", "math", "arithmetic")
WRONG = {"c": "spanish", "spanish": "math", "math": "arithmetic", "arithmetic": "c"}


def test_a_pool_keeps_its_domain_and_only_its_domain() -> None:
    rises: dict[str, list[float]] = {}
    for name in demo.MODELS:
        experiment = Experiment.shipped(name, texts=3)
        for domain in DOMAINS:
            full = experiment.loss(domain, 32)
            rises.setdefault(f"{name} own", []).append(experiment.loss(domain, 8) - full)
            wrong = experiment.loss(domain, 8, pool_of=WRONG[domain]) - full
            rises.setdefault(f"{name} wrong", []).append(wrong)
    means = {key: sum(values) / len(values) for key, values in rises.items()}
    assert means["emo-demo own"] < 0.05
    assert means["emo-demo wrong"] > 1.5
    assert means["standard-moe-demo own"] > 0.7
