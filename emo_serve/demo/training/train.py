"""Train the demo models: EMO, and its twin, a standard MoE that differs by one hook.

Every step takes documents of five domains, one window each. EMO's rule (`EmoPools`) draws, for
each document and layer, a pool size and keeps the experts the document's own tokens like best;
all its tokens must route inside. The twin routes freely. Everything else is the same: data, order
of batches, seed, losses.

Shapes: B documents, T tokens, E experts of a layer, S those that are not shared, V vocabulary.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from emo_serve.demo.training.tokenizer import END_OF_TEXT_ID, PAD_ID, VOCAB_SIZE
from emo_serve.emo.checkpoint import save_checkpoint
from emo_serve.emo.config import EmoConfig
from emo_serve.emo.model import EmoForCausalLM, EmoMoe, RouterRecord

__all__ = ["Batches", "EmoPools", "Recipe", "demo_config", "initialise", "train"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """The settings of a training run; the defaults made the shipped models.

    `stages` are (tokens per document, steps). The learning rate is constant after the warm-up and
    falls linearly over the last stage, so a run can be made shorter or longer by its first stage
    without being planned again. Longer documents come last: most steps are cheap, and the model
    still learns positions up to the longest.
    """

    emo: bool
    stages: tuple[tuple[int, int], ...] = ((256, 4800), (512, 2000))
    documents_per_step: int = 5
    learning_rate: float = 2e-3
    final_share: float = 0.02  # of the learning rate, at the end
    warmup_steps: int = 100
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    load_balance: float = 0.1
    z_loss: float = 1e-3
    count_decay: float = 0.9  # moving average of expert counts, in place of a large global batch
    smallest_pool: int = 3  # experts that are not shared
    seed: int = 0

    @property
    def total_steps(self) -> int:
        """Return the steps of all stages."""
        return sum(steps for _, steps in self.stages)


def demo_config() -> EmoConfig:
    """Return the shape of both demo models: 4 layers of 32 experts, one of them shared."""
    return EmoConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_experts=32,
        num_shared_experts=1,
        num_experts_per_tok=4,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=END_OF_TEXT_ID,
        eos_token_id=END_OF_TEXT_ID,
        pad_token_id=PAD_ID,
    )


def initialise(model: EmoForCausalLM) -> None:
    """Draw all weights: fan-in scaling, output matrices shrunk by depth, router logits of std 1."""
    config = model.config
    width, inner = config.hidden_size, config.intermediate_size
    depth = math.sqrt(2 * config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            continue  # norms start at 1
        std = width**-0.5
        if "embed_tokens" in name:
            std = 0.1
        elif "lm_head" in name:
            std /= 2
        elif "o_proj" in name:
            std /= depth
        elif name.endswith("w2"):
            std = inner**-0.5 / depth
        torch.nn.init.normal_(parameter, std=std)


# -- EMO's rule --


class EmoPools:
    """Choose each document's pool: a random size, filled by the document's own summed router mass.

    One object serves all layers of a model; each call draws fresh sizes.
    """

    def __init__(self, smallest: int, num_shared: int, generator: torch.Generator) -> None:
        self.smallest, self.num_shared, self.generator = smallest, num_shared, generator

    def __call__(self, logits_BTE: Tensor) -> Tensor:
        """Return the bool mask [B, E] of experts each document may use; shared ones always."""
        standard = logits_BTE.shape[-1] - self.num_shared
        mass_BS = logits_BTE[..., :standard].softmax(-1).sum(1)
        rank_BS = mass_BS.argsort(-1, descending=True).argsort(-1)
        shape = (len(mass_BS), 1)
        size_B1 = torch.randint(self.smallest, standard + 1, shape, generator=self.generator)
        return F.pad(rank_BS < size_B1, (0, self.num_shared), value=True)


# -- data --


class Batches:
    """Draw windows from the training documents, never across documents; domains take turns."""

    def __init__(self, tokens: Path, documents_per_step: int, seed: int) -> None:
        with np.load(tokens) as arrays:
            self.domains = sorted(key.split(".")[0] for key in arrays.files if key.endswith(".ids"))
            self.ids = {d: arrays[f"{d}.ids"].astype(np.int64) for d in self.domains}
            self.ends = {d: arrays[f"{d}.ends"] for d in self.domains}
        self.documents_per_step = documents_per_step
        self.generator = np.random.default_rng(seed)

    def draw(self, length: int, steps: int) -> Iterator[Tensor]:
        """Yield `steps` batches of ids [B, length + 1], each row opened by end-of-text.

        Every start inside a document is equally likely. Domains take turns: over any run of
        len(domains) rows each comes once.
        """
        starts = {domain: self._starts(domain, length) for domain in self.domains}
        turns: list[str] = []
        for _ in range(steps):
            rows = []
            for _ in range(self.documents_per_step):
                turns = turns or list(self.generator.permutation(self.domains))
                domain = turns.pop()
                rows.append(self._window(domain, starts[domain], length))
            yield torch.tensor(np.array(rows))

    def windows(self, domain: str, length: int, count: int) -> Iterator[Tensor]:
        """Yield `count` windows of one domain, ids [length + 1] opened by end-of-text."""
        starts = self._starts(domain, length)
        for _ in range(count):
            yield torch.tensor(self._window(domain, starts, length))

    def _window(self, domain: str, starts: NDArray[np.int64], length: int) -> NDArray[np.int64]:
        start = starts[self.generator.integers(len(starts))]
        return np.concatenate([[END_OF_TEXT_ID], self.ids[domain][start : start + length]])

    def _starts(self, domain: str, length: int) -> NDArray[np.int64]:
        ends = self.ends[domain]
        begins = np.concatenate([[0], ends[:-1]])
        spans = [np.arange(a, b - length + 1) for a, b in zip(begins, ends, strict=True)]
        return np.concatenate(spans)


# -- training --


def train(
    recipe: Recipe,
    config: EmoConfig,
    tokens: Path,
    directory: Path,
    save_every: int = 1000,
    advance: Callable[[int], None] = lambda steps: None,
) -> EmoForCausalLM:
    """Train one model and return it; it is saved to `directory` regularly and at the end.

    `advance` is called with the number of steps made, of `recipe.total_steps` in all.

    One thread, and the same result on the same machine for the same recipe and corpus.
    """
    torch.set_num_threads(1)  # the same numbers on every run, and room for the other model
    torch.manual_seed(recipe.seed)
    model = EmoForCausalLM(config)
    initialise(model)
    trainer = _Trainer(model, recipe)
    batches = Batches(tokens, recipe.documents_per_step, recipe.seed)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "recipe.json").write_text(json.dumps(asdict(recipe), indent=1) + "\n")
    model.train()
    for length, steps in recipe.stages:
        for batch_BT in batches.draw(length, steps):
            trainer.step(batch_BT)
            advance(1)
            if trainer.steps_done % save_every == 0:
                save_checkpoint(model, directory, torch.float32)
    save_checkpoint(model, directory, torch.float32)
    return model.eval()


class _Trainer:
    """Optimizer, schedule and losses of one run."""

    def __init__(self, model: EmoForCausalLM, recipe: Recipe) -> None:
        self.model, self.recipe = model, recipe
        matrices = [p for p in model.parameters() if p.dim() > 1]
        norms = [p for p in model.parameters() if p.dim() <= 1]
        groups: list[dict[str, Any]] = [
            {"params": matrices},
            {"params": norms, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            groups,
            lr=recipe.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=recipe.weight_decay,
            fused=True,
        )
        self.moes = [m for m in model.modules() if isinstance(m, EmoMoe)]
        self.loads = [torch.zeros(0) for _ in self.moes]
        if recipe.emo:
            generator = torch.Generator().manual_seed(recipe.seed)
            for moe in self.moes:
                moe.choose_pool = EmoPools(
                    recipe.smallest_pool, moe.moe.num_shared_experts, generator
                )
        self.steps_done = self.tokens_done = 0
        self.started = time.monotonic()
        self.recent: list[float] = []

    def learning_rate(self) -> float:
        """Return the learning rate of the next step."""
        recipe, step = self.recipe, self.steps_done
        last = recipe.stages[-1][1]
        left = min(1.0, (recipe.total_steps - step) / last)
        warm = min(1.0, (step + 1) / recipe.warmup_steps)
        share = recipe.final_share + (1 - recipe.final_share) * left
        return recipe.learning_rate * warm * share

    def step(self, batch_BT: Tensor) -> float:
        """Make one optimizer step on ids [B, T + 1]; return the cross entropy in nats per token."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        record: list[RouterRecord] = []
        # bf16 for the trunk's matrices, as served; experts, norms and losses stay fp32. On a CPU
        # with avx512_bf16 it made a step 1.45 times as fast (4,170 to 6,030 tokens/s, one thread).
        with torch.autocast("cpu", torch.bfloat16):
            logits_BTV = self.model(batch_BT[:, :-1], record=record).float()
        entropy = F.cross_entropy(logits_BTV.flatten(0, 1), batch_BT[:, 1:].flatten())
        self.optimizer.zero_grad(set_to_none=True)
        (entropy + self._router_losses(record)).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm)
        self.optimizer.step()
        self.steps_done += 1
        self.tokens_done += batch_BT[:, 1:].numel()
        self._report(entropy.item())
        return entropy.item()

    def _router_losses(self, record: list[RouterRecord]) -> Tensor:
        """Return load balance and z losses, summed over the layers."""
        total = torch.zeros(())
        for place, router in enumerate(record):
            probabilities_NS = router.probabilities_BTS.flatten(0, 1)
            standard = probabilities_NS.shape[-1]
            taken = torch.bincount(router.experts_NK.flatten(), minlength=standard)[:standard]
            share_S = taken / taken.sum()
            if not len(self.loads[place]):
                self.loads[place] = torch.full((standard,), 1 / standard)
            self.loads[place].lerp_(share_S, 1 - self.recipe.count_decay)
            balance = standard * (self.loads[place] * probabilities_NS.mean(0)).sum()
            inside_NS = router.logits_BTE[..., :standard].flatten(0, 1)
            inside_NS = inside_NS.masked_fill(probabilities_NS == 0, float("-inf"))
            z = inside_NS.logsumexp(-1).square().mean()
            total = total + self.recipe.load_balance * balance + self.recipe.z_loss * z
        return total

    def _report(self, entropy: float) -> None:
        self.recent.append(entropy)
        if self.steps_done % 100 == 0 or self.steps_done == self.recipe.total_steps:
            seconds = time.monotonic() - self.started
            logger.info(
                "step %d of %d: loss %.4f nats per token, %.0f tokens/s, %.0f s",
                self.steps_done,
                self.recipe.total_steps,
                sum(self.recent) / len(self.recent),
                self.tokens_done / seconds,
                seconds,
            )
            self.recent.clear()
