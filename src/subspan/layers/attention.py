"""``nn.MultiheadAttention`` with projections that are layers of their own."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from subspan.errors import SubspanError

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


class Attention(nn.Module):
    """What an ``nn.MultiheadAttention`` computes, by four ordinary linear layers.

    It is called as the original is, also by ``nn.TransformerEncoderLayer`` and its like, which
    then do without their fused path.

    Args:
        of: the original; its weights are copied.

    Raises:
        SubspanError: if it has ``add_bias_kv`` or ``add_zero_attn``.
    """

    # What PyTorch's Transformer layers look at before they take a path around `forward`.
    _qkv_same_embed_dim = False
    in_proj_bias = None

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    out_proj: nn.Module

    def __init__(self, of: nn.MultiheadAttention) -> None:
        super().__init__()
        if of.bias_k is not None or of.add_zero_attn:
            raise SubspanError(
                "an attention with add_bias_kv or add_zero_attn cannot be factorised: exclude it"
            )
        self.embed_dim, self.num_heads, self.head_dim = of.embed_dim, of.num_heads, of.head_dim
        self.dropout, self.batch_first = of.dropout, of.batch_first
        if of._qkv_same_embed_dim:
            weights = of.in_proj_weight.chunk(3)
        else:
            weights = (of.q_proj_weight, of.k_proj_weight, of.v_proj_weight)
        biases = (None, None, None) if of.in_proj_bias is None else of.in_proj_bias.chunk(3)
        for name, weight, bias in zip(
            PROJECTIONS, (*weights, of.out_proj.weight), (*biases, of.out_proj.bias), strict=True
        ):
            n, m = weight.shape
            layer = nn.Linear(m, n, bias=bias is not None, device="meta")
            layer.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
            if bias is not None:
                layer.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
            self.add_module(name, layer)
        self.train(of.training)

    @torch.no_grad()
    def original(self) -> nn.MultiheadAttention:
        """The ``nn.MultiheadAttention`` with these projections, which must be linear layers."""
        layers = [getattr(self, name) for name in PROJECTIONS]
        q, k, v, out = (layer.weight for layer in layers)
        net = nn.MultiheadAttention(
            self.embed_dim, self.num_heads, self.dropout, bias=layers[0].bias is not None,
            kdim=k.shape[1], vdim=v.shape[1], batch_first=self.batch_first, device=q.device,
            dtype=q.dtype,
        )  # fmt: skip
        if net._qkv_same_embed_dim:
            net.in_proj_weight.copy_(torch.cat([q, k, v]))
        else:
            for name, weight in zip(PROJECTIONS, (q, k, v), strict=False):
                getattr(net, f"{name}_weight").copy_(weight)
        net.out_proj.weight.copy_(out)
        if net.in_proj_bias is not None:
            net.in_proj_bias.copy_(torch.cat([layer.bias for layer in layers[:3]]))
            net.out_proj.bias.copy_(layers[3].bias)
        return net.train(self.training)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None,
        need_weights: bool = True, attn_mask: Tensor | None = None,
        average_attn_weights: bool = True, is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """As :meth:`torch.nn.MultiheadAttention.forward`.

        Args:
            query: (L, E), (L, N, E), or (N, L, E) with ``batch_first``.
            key: (S, E_k), (S, N, E_k), or (N, S, E_k).
            value: likewise with E_v.
            key_padding_mask: (S,) or (N, S); True, or −∞, leaves a position out.
            need_weights: whether to return the weights, too.
            attn_mask: (L, S) or (N · heads, L, S); True, or −∞, leaves a pair out.
            average_attn_weights: whether weights are the mean over heads.
            is_causal: a hint that ``attn_mask`` is the causal one, which must be given, too.

        Returns:
            The output in the shape of ``query``; the weights, (N, L, S) or (N, heads, L, S), or
            None.
        """
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

    def _mask(self, pairs: Tensor | None, keys: Tensor | None, q: Tensor) -> Tensor | None:
        """Both masks as one that is added to scores (N, heads, L, S)."""

        def added(mask: Tensor) -> Tensor:
            if mask.dtype != torch.bool:
                return mask.to(q)
            return torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask, -torch.inf)

        found = []
        if pairs is not None:
            mask = added(pairs)
            found.append(mask.unflatten(0, (-1, self.num_heads)) if mask.dim() == 3 else mask)
        if keys is not None:
            found.append(added(keys)[:, None, None, :])
        return sum(found[1:], found[0]) if found else None
