"""Run a checkpoint over documents one layer at a time, in bounded memory.

The whole model is never held. At any moment there are the residual stream of all documents, the
trunk of one layer, and one expert of it, read with pread and dropped when its tokens are done.
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

from emo_serve.emo.checkpoint import Checkpoint, parse_expert_name
from emo_serve.emo.model import DecoderLayer, EmoMoe, inverse_frequencies, rotation
from emo_serve.emo.routing import Routing
from emo_serve.errors import CheckpointError

__all__ = ["LayerWalk", "Mixture"]

_ROWS = 4096  # rows at once where every token is independent: bounds what an MLP's inside takes
_STACKED_EXPERTS = {"mlp.w13", "mlp.w2"}


@dataclass(frozen=True)
class Mixture:
    """What one MoE layer did to its tokens.

    norms_NK is the L2 norm of each taken expert's own output, beside the routing's experts_TK and 0
    where a token takes none; cosines_N that of the residual stream before and after the layer's
    experts.
    """

    norms_NK: Tensor
    cosines_N: Tensor


class LayerWalk:
    """The residual stream of some documents, on its way through a checkpoint's layers.

    For each layer in order call `attend`, then `logits` and `add_experts` of a MoE layer or
    `add_dense` of another. `experts_read` counts the experts read, a layer each; `bytes_read` is
    their weights'. `advance` is called with the number of steps made, of `num_steps` in all.
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
        self._layer = None  # the last one goes before the next is read
        self._layer = self._read_trunk(index)
        cos_TC, sin_TC = self._rope
        for span in self.spans:
            length = span.stop - span.start
            rope = (cos_TC[:length], sin_TC[:length])
            self.x_ND[span] = self._layer.attend(self.x_ND[span][None], rope)[0]
            self.advance(1)

    def logits(self) -> Tensor:
        """Return the gate's logits_NE of the layer attended to; needs no expert."""
        gate = cast(EmoMoe, self._trunk.mlp).gate
        return torch.cat([gate(self._normed(rows)) for rows in self._parts()])

    def add_dense(self) -> None:
        """Apply the MLP of a layer without experts."""
        for rows in self._parts():
            self.x_ND[rows] += self._trunk.mlp(self._normed(rows))

    def add_experts(self, index: int, routing: Routing) -> Mixture:
        """Apply the layer's experts that tokens take, one at a time; no other one is read."""
        y_ND = torch.zeros_like(self.x_ND)
        norms_NK = torch.zeros_like(routing.weights_TK)
        taken_NK = routing.weights_TK != 0  # a place left over has weight 0 and id 0
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
        """Return what the layer's MLP or MoE reads of these tokens; cheaper made than kept."""
        return self._trunk.pre_feedforward_layernorm(self.x_ND[rows])  # type: ignore[no-any-return]

    def _parts(self) -> Iterator[slice]:
        return (slice(start, start + _ROWS) for start in range(0, len(self.x_ND), _ROWS))

    def _read_trunk(self, index: int) -> DecoderLayer:
        """Return the layer with everything but its experts, which stay without storage."""
        config, prefix = self.checkpoint.config, f"model.layers.{index}."
        with torch.device("meta"):
            layer = DecoderLayer(config, config.moe_layers[index], index)
        state = {
            name.removeprefix(prefix): self.checkpoint.tensor(name).float()
            for name in self.checkpoint.trunk_names()
            if name.startswith(prefix) and parse_expert_name(name) is None
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
