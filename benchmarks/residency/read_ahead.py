"""Could a streamed pool read ahead from one layer to the next? How good the best cheap guess is.

While a layer computes, the disk could read what the next one will choose, if that were known. The
guess here is the one of Eliseev and Mazur (arXiv 2312.17238): the next layer's gate, asked with
this layer's residual stream. The base pool runs over held-out texts, token by token as in decoding,
with slots for half of the experts, the least recently used out. Printed per layer: experts read per
token, the share of them that was guessed, and the share of guessed reads that were right. A wrong
one keeps the disk from a right one. Shared experts, which every token takes, are left out.

    python -m benchmarks.residency.read_ahead                            # the shipped model
    python -m benchmarks.residency.read_ahead --model DIR --random 64    # tokens drawn at random
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from cachetools import LRUCache
from torch import Tensor

from benchmarks.harness.results import append_result
from emo_serve import demo
from emo_serve.emo.checkpoint import Checkpoint
from emo_serve.emo.routing import route
from emo_serve.emo.tokenizer import ModelTokenizer
from emo_serve.pools.calibration.layer_walk import LayerWalk

_TOKENS = 256


def count_guesses(chosen_TK: Tensor, guessed_TK: Tensor, num_slots: int) -> tuple[int, int, int]:
    """Return how many experts were read, how many guessed, and how many of those were right."""
    slots: LRUCache[int, None] = LRUCache(num_slots)
    read = guessed = right = 0
    for chosen, guess in zip(chosen_TK.tolist(), guessed_TK.tolist(), strict=True):
        missing, expected = (set(experts) - set(slots) for experts in (chosen, guess))
        read += len(missing)
        guessed += len(expected)
        right += len(missing & expected)
        slots.update(dict.fromkeys(chosen))
    return read, guessed, right


def main() -> None:
    """Walk through the model, print a row per layer, append a result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", type=Path, help="an EMO checkpoint [the shipped model]")
    parser.add_argument("--random", type=int, metavar="N", help="N tokens drawn at random")
    parser.add_argument("--layers", type=int, help="the first so many only")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    directory = args.model or demo.model_dir()
    checkpoint = Checkpoint.open(directory)
    config = checkpoint.config
    if args.random:
        documents = [torch.randint(config.vocab_size, (args.random,))]
    else:
        tokenizer = ModelTokenizer(directory)
        texts = [demo.heldout(domain)[0] for domain in demo.domains()]
        documents = [torch.tensor(tokenizer.encode(text))[:_TOKENS] for text in texts]
    walk = LayerWalk(checkpoint, documents)
    rows, before_ND = [], None
    print("| layer | read a token | of these guessed | of guesses right |\n|---|---|---|---|")
    with torch.inference_mode():
        for index, moe in list(enumerate(config.moe_layers))[: args.layers]:
            walk.attend(index)
            if moe is None:
                walk.add_dense()
                continue
            logits_NE = walk.logits()
            num_chosen = moe.top_k - moe.num_shared_experts
            if before_ND is not None:
                gate_ED = checkpoint.tensor(checkpoint.facts.names.router(index)).float()
                chosen_TK, guessed_TK = (
                    route(logits, moe).experts_TK[:, :num_chosen]
                    for logits in (logits_NE, before_ND @ gate_ED.T)
                )
                counts = count_guesses(chosen_TK, guessed_TK, moe.num_experts // 2)
                read, guessed, right = counts
                rows.append({"layer": index, "read": read, "guessed": guessed, "right": right})
                print(
                    f"| {index} | {read / len(chosen_TK):.2f} | {right / max(1, read):.2f}"
                    f" | {right / max(1, guessed):.2f} |"
                )
            before_ND = walk.x_ND.clone()
            walk.add_experts(index, route(logits_NE, moe))
    print(f"appended to {append_result('read_ahead', vars(args), {'rows': rows})}")


if __name__ == "__main__":
    main()
