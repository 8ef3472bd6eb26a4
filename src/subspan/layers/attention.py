"""``nn.MultiheadAttention`` with projections that are layers of their own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from subspan.errors import SubspanError
from subspan.layers.handover import hand_over, stand_for
from subspan.layers.plain import linear

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


class Attention(nn.Module):
    """An ``nn.MultiheadAttention`` whose projections are four ordinary linear layers.

    It is called as the original is, also by ``nn.TransformerEncoderLayer`` and its like, which
    then do without their fused path.

    Args:
        of: the original, without ``add_bias_kv`` and ``add_zero_attn``; its weights are copied.
    """

    # What PyTorch's Transformer layers look at before they take a path around `forward`.
    _qkv_same_embed_dim = False
    in_proj_bias = None
    bias_k = bias_v = None
    add_zero_attn = False

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    out_proj: nn.Module

    def __init__(self, of: nn.MultiheadAttention) -> None:
        super().__init__()
        self.embed_dim, self.num_heads, self.head_dim = of.embed_dim, of.num_heads, of.head_dim
        self.kdim, self.vdim = of.kdim, of.vdim
        self.dropout, self.batch_first = of.dropout, of.batch_first
        self.training = of.training
        out = of.out_proj
        if of._qkv_same_embed_dim:
            weights = [(part, of.in_proj_weight) for part in of.in_proj_weight.chunk(3)]
        else:
            weights = [(w, w) for w in (of.q_proj_weight, of.k_proj_weight, of.v_proj_weight)]
        # Each with the parameter that it is part of.
        biases: list[tuple[Tensor | None, Tensor | None]] = [(None, None)] * 3
        if (inside := of.in_proj_bias) is not None:
            biases = [(part, inside) for part in inside.chunk(3)]
        parts = zip([*weights, (out.weight,) * 2], [*biases, (out.bias,) * 2], strict=True)
        for name, ((weight, of_weight), (bias, of_bias)) in zip(PROJECTIONS, parts, strict=True):
            layer = linear(weight, bias)
            stand_for(layer.weight, of_weight)
            if of_bias is not None:
                stand_for(layer.bias, of_bias)
            self.add_module(name, layer.train(of.training))
        hand_over("out_proj", of.out_proj, self.out_proj, nn.Linear(1, 1, device="meta"))

    def obstacle(self, layers: Sequence[nn.Module]) -> str | None:
        """Say why these four linear layers cannot be an ``nn.MultiheadAttention``; or None."""
        for part in ("weight", "bias"):
            trained = {
                p.requires_grad for layer in layers[:3] if (p := getattr(layer, part)) is not None
            }
            if len(trained) > 1:
                return (
                    f"nn.MultiheadAttention has the {part} of q_proj, k_proj and v_proj in one "
                    "parameter, and only some of them are frozen: freeze all or none of them"
                )
        if len({layer.bias is None for layer in layers}) > 1:
            return "only some of its projections have a bias: give all of them one"
        return None

    @torch.no_grad()
    def original(self, layers: Sequence[nn.Linear]) -> nn.MultiheadAttention:
        """Make the ``nn.MultiheadAttention`` with these four projections."""
        q, k, v, out = layers
        net = nn.MultiheadAttention(
            self.embed_dim,
            self.num_heads,
            self.dropout,
            bias=q.bias is not None,
            kdim=k.weight.shape[1],
            vdim=v.weight.shape[1],
            batch_first=self.batch_first,
            device="meta",
        )
        if net._qkv_same_embed_dim:
            net.in_proj_weight = _joined(q.weight, k.weight, v.weight)
        else:
            for name, layer in zip(PROJECTIONS, (q, k, v), strict=False):
                setattr(net, f"{name}_weight", _joined(layer.weight))
        net.out_proj.weight = _joined(out.weight)
        if q.bias is not None:
            net.in_proj_bias = _joined(q.bias, k.bias, v.bias)
            net.out_proj.bias = _joined(out.bias)
        return net.train(self.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Do as :meth:`torch.nn.MultiheadAttention.forward`, with its shapes and masks."""
        self._check(query, key, value, key_padding_mask, attn_mask)
        alone = query.dim() == 2
        if alone:
            query, key, value = (t.unsqueeze(0) for t in (query, key, value))
            if key_padding_mask is not None:
                key_padding_mask = key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        if is_causal and attn_mask is None:
            raise SubspanError("is_causal needs attn_mask, as in nn.MultiheadAttention")
        q, k, v = (
            projection(t).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for projection, t in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        mask = self._mask(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) * self.head_dim**-0.5
            weights = (scores if mask is None else scores + mask).softmax(dim=-1)
            weights = F.dropout(weights, dropout)
            out = weights @ v
            weights = weights.mean(dim=1) if average_attn_weights else weights
        else:
            out = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        if alone:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1), weights

    def _check(
        self, query: Tensor, key: Tensor, value: Tensor, keys: Tensor | None, pairs: Tensor | None
    ) -> None:
        """Refuse shapes that would be broadcast, as ``nn.MultiheadAttention`` does."""
        if query.dim() not in (2, 3) or not query.dim() == key.dim() == value.dim():
            raise SubspanError(
                "query, key and value must all have 3 dimensions, or 2 without a batch, got "
                f"{query.dim()}, {key.dim()} and {value.dim()}"
            )
        sequence, batch = (1, 0) if self.batch_first else (0, 1)
        if query.dim() == 2:
            L, S, N = len(query), len(key), 1
            same = key.shape[:1] == value.shape[:1]
        else:
            L, S, N = query.shape[sequence], key.shape[sequence], query.shape[batch]
            same = key.shape[:2] == value.shape[:2] and key.shape[batch] == N
        if not same:
            raise SubspanError(
                f"query, key and value must agree in batch and length, got {list(query.shape)}, "
                f"{list(key.shape)} and {list(value.shape)}"
            )
        of_keys, of_pairs = (S,) if query.dim() == 2 else (N, S), (L, S)
        of_heads = (N * self.num_heads, L, S)
        if keys is not None and keys.shape != of_keys:
            raise SubspanError(
                f"key_padding_mask must have shape {of_keys}, got {tuple(keys.shape)}"
            )
        if pairs is not None and pairs.shape not in (of_pairs, of_heads):
            raise SubspanError(
                f"attn_mask must have shape {of_pairs} or {of_heads}, got {tuple(pairs.shape)}"
            )

    def _mask(self, pairs: Tensor | None, keys: Tensor | None, q: Tensor) -> Tensor | None:
        """Join both masks to one that is added to scores (N, heads, L, S)."""

        def added(mask: Tensor) -> Tensor:
            if mask.dtype != torch.bool:
                return mask.to(q)
            return torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask, -torch.inf)

        masks = []
        if pairs is not None:
            mask = added(pairs)
            masks.append(mask.unflatten(0, (-1, self.num_heads)) if mask.dim() == 3 else mask)
        if keys is not None:
            masks.append(added(keys)[:, None, None, :])
        return sum(masks[1:], masks[0]) if masks else None


def _joined(*parts: Tensor) -> nn.Parameter:
    """Join copies of several parameters, below each other, to one."""
    joined = nn.Parameter(torch.cat([p.detach() for p in parts]))
    stand_for(joined, *parts)
    return joined
