"""Run a checkpoint over documents one layer at a time, in bounded memory.

The whole model is never in memory, only the residual stream of all documents, the trunk of one
layer, and one expert of it, which is read with pread and dropped when its tokens are done.
Arithmetic is fp32 whatever the checkpoint's dtype, as in the reference model.

Shapes: N tokens of all documents, T tokens of one, D hidden size, E experts, K experts a token
takes, R rows of one expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from emo_serve.emo.checkpoint import Checkpoint
from emo_serve.emo.model import DecoderLayer, EmoMoe, inverse_frequencies, rotation
from emo_serve.emo.routing import Routing
from emo_serve.errors import CheckpointError

__all__ = ["LayerWalk", "Mixture"]

_ROWS = 4096  # tokens at once where they are independent: bounds an MLP's activations
_STACKED_EXPERTS = {"mlp.w13", "mlp.w2"}


@dataclass(frozen=True)
class Mixture:
    """What one MoE layer did to its tokens.

    norms_NK is the L2 norm of each taken expert's own output, in the order of the routing's
    experts_TK, 0 in unused places. cosines_N is the cosine between the residual stream before and
    after the layer's experts.
    """

    norms_NK: Tensor
    cosines_N: Tensor


class LayerWalk:
    """Carry the residual stream of some documents through a checkpoint's layers.

    For each layer in order call `attend`, then `logits` and `add_experts` for a MoE layer, or
    `add_dense`. `experts_read` counts the experts read per layer, `bytes_read` their weights.
    `advance` is called with the number of steps made, of `num_steps` in all.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        documents: Sequence[Tensor],
        advance: Callable[[int], None] = lambda steps: None,
    ) -> None:
        self.checkpoint, self.advance = checkpoint, advance
        self.x_ND = checkpoint.tensor("model.embed_tokens.weight")[torch.cat(list(documents))]
        self.x_ND = self.x_ND.float()
        lengths = [len(ids_T) for ids_T in documents]
        ends = torch.tensor(lengths).cumsum(0).tolist()
        self.spans = [slice(end - n, end) for n, end in zip(lengths, ends, strict=True)]
        self._rope = rotation(*inverse_frequencies(checkpoint.config), max(lengths))
        self._layer: DecoderLayer | None = None
        self.experts_read = [0] * checkpoint.config.num_hidden_layers
        self.bytes_read = 0

    def attend(self, index: int) -> None:
        """Read the layer's trunk and apply its attention, document by document."""
        self._layer = None  # freed before the next one is read
        self._layer = self._read_trunk(index)
        cos_TC, sin_TC = self._rope
        for span in self.spans:
            length = span.stop - span.start
            rope = (cos_TC[:length], sin_TC[:length])
            self.x_ND[span] = self._layer.attend(self.x_ND[span][None], rope)[0]
            self.advance(1)

    def logits(self) -> Tensor:
        """Return the gate's logits_NE of the current layer; needs no expert."""
        gate = cast(EmoMoe, self._trunk.mlp).gate
        return torch.cat([gate(self._normed(rows)) for rows in self._parts()])

    def add_dense(self) -> None:
        """Apply the MLP of a layer without experts."""
        for rows in self._parts():
            self.x_ND[rows] += self._trunk.mlp(self._normed(rows))

    def add_experts(self, index: int, routing: Routing) -> Mixture:
        """Apply the experts that tokens take, one at a time; no others are read."""
        y_ND = torch.zeros_like(self.x_ND)
        norms_NK = torch.zeros_like(routing.weights_TK)
        taken_NK = routing.weights_TK != 0  # an unused place has weight 0 and id 0
        for expert in routing.experts_TK[taken_NK].unique().tolist():
            weights = self.checkpoint.expert(index, expert)
            self.experts_read[index] += 1
            self.bytes_read += weights.num_bytes
            gate_FD, up_FD, down_DF = (
                w.float() for w in (weights.gate_FD, weights.up_FD, weights.down_DF)
            )
            rows_R, places_R = (taken_NK & (routing.experts_TK == expert)).nonzero(as_tuple=True)
            for rows, places in zip(rows_R.split(_ROWS), places_R.split(_ROWS), strict=True):
                x_RD = self._normed(rows)
                out_RD = (F.silu(x_RD @ gate_FD.T) * (x_RD @ up_FD.T)) @ down_DF.T
                norms_NK[rows, places] = out_RD.norm(dim=-1)
                y_ND.index_add_(0, rows, out_RD * routing.weights_TK[rows, places, None])
            self.advance(1)
        cosines = []
        for part in self._parts():
            after_RD = self.x_ND[part] + y_ND[part]
            cosines.append(F.cosine_similarity(self.x_ND[part], after_RD, dim=-1))
            self.x_ND[part] = after_RD
        return Mixture(norms_NK, torch.cat(cosines))

    # -- parts --

    @property
    def _trunk(self) -> DecoderLayer:
        assert self._layer is not None, "attend comes first"
        return self._layer

    def _normed(self, rows: slice | Tensor) -> Tensor:
        """Return the input of the layer's MLP or MoE; cheaper to recompute than to keep."""
        return self._trunk.pre_feedforward_layernorm(self.x_ND[rows])  # type: ignore[no-any-return]

    def _parts(self) -> Iterator[slice]:
        return (slice(start, start + _ROWS) for start in range(0, len(self.x_ND), _ROWS))

    def _read_trunk(self, index: int) -> DecoderLayer:
        """Return the layer without its experts, which stay on the meta device."""
        config, prefix = self.checkpoint.config, f"model.layers.{index}."
        with torch.device("meta"):
            layer = DecoderLayer(config, config.moe_layers[index], index)
        state = {
            name.removeprefix(prefix): self.checkpoint.tensor(name).float()
            for name in self.checkpoint.trunk_names()
            if name.startswith(prefix)
        }
        try:
            found = layer.load_state_dict(state, strict=False, assign=True)
        except RuntimeError as error:
            raise self._misfit(str(error)) from error
        if found.unexpected_keys or not set(found.missing_keys) <= _STACKED_EXPERTS:
            raise self._misfit(f"layer {index}: {found}")
        return layer.eval().requires_grad_(False)

    def _misfit(self, reason: str) -> CheckpointError:
        return CheckpointError(
            f"{self.checkpoint.directory} does not fit its config.json: {reason}"
        )
