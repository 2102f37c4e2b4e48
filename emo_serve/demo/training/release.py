"""Turn trained models into the shipped files: bf16 checkpoints, tokenizer, pools, held-out texts.

Pools are calibrated on windows of the TRAINING documents, with the checkpoint as it ships (bf16
weights, computed in fp32), so that their fingerprint is the shipped one's.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from tokenizers import Tokenizer
from torch import Tensor

from emo_serve.demo.training.tokenizer import save_tokenizer
from emo_serve.demo.training.train import Batches
from emo_serve.emo.checkpoint import Checkpoint, save_checkpoint
from emo_serve.emo.model import EmoForCausalLM
from emo_serve.pools.calibration.build import calibrate, model_record
from emo_serve.pools.document import write_pool

__all__ = ["POOL_SIZE", "calibration_documents", "release_model"]

POOL_SIZE = 8  # experts per layer, the shared one included: a quarter
_CALIBRATION_DOCUMENTS = 32
_CALIBRATION_TOKENS = 384
_CALIBRATION_SEED = 1


def release_model(
    name: str, model: EmoForCausalLM, corpus: Path, directory: Path, pool_size: int = POOL_SIZE
) -> None:
    """Write `models/<name>`, `pools/<name>` and `heldout` under `directory`.

    `corpus` is the directory `build_corpus` filled.
    """
    model_directory = directory / "models" / name
    save_checkpoint(model, model_directory)
    tokenizer = Tokenizer.from_file(str(corpus / "tokenizer.json"))
    save_tokenizer(tokenizer, model_directory, model.config.max_position_embeddings)
    shutil.copytree(corpus / "heldout", directory / "heldout", dirs_exist_ok=True)
    shipped = Checkpoint.open(model_directory)
    made_for = model_record(shipped)
    pools = directory / "pools" / name
    pools.mkdir(parents=True, exist_ok=True)
    for domain, documents in calibration_documents(corpus / "tokens.npz").items():
        found = calibrate(shipped, documents, pool_size, "router")
        description = f"{pool_size} of {model.config.num_experts} experts per layer for {domain}"
        pool = found.pool(domain, made_for, description)
        write_pool(pool, pools / f"{domain}.json")


def calibration_documents(tokens: Path) -> dict[str, list[Tensor]]:
    """Return windows of training documents, ids [T] opened by end-of-text, by domain."""
    batches = Batches(tokens, 1, _CALIBRATION_SEED)
    steps = _CALIBRATION_DOCUMENTS
    return {
        domain: list(batches.windows(domain, _CALIBRATION_TOKENS - 1, steps))
        for domain in batches.domains
    }
