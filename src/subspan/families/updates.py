"""θ₀ + P w and Pᵀ g for tensors as they are: no vector of all weights, no copy of 16-bit ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from subspan import kernels
from subspan.cache import rooms
from subspan.families.operator import captured, compute, product

if TYPE_CHECKING:
    from subspan.families.base import Projection

LARGE = 1 << 22  # bytes of θ whose memory is used again
ROUND = 1 << 17  # numbers in float32 at a time, where a kernel computes for 16-bit vectors


def add(
    p: Projection,
    bases: Sequence[Tensor],
    w: Tensor,
    step: Tensor,
    start: int,
    *,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """Compute θ₀ + P w for rows from ``start`` on, unseen by autograd.

    The ``bases`` are tensors of θ₀, whose rows follow each other. The results are like them, but
    for the dtype if one is given. Sums have the precision of ``w``, (d,), and are rounded once; of
    one vector's rows of P w, BLOCK exist at a time.
    """
    outs = [_take_memory(base, dtype or base.dtype) for base in bases]
    _add(p, bases, w, step, start, outs)
    return outs


def add_(p: Projection, thetas: Sequence[Tensor], w: Tensor, step: Tensor, start: int) -> None:
    """Add P w in place, θ ← θ + P w, for contiguous tensors; arguments are those of :func:`add`."""
    _add(p, thetas, w, step, start, thetas)
    increment_version([theta for theta in thetas if not theta.is_inference()])


def _add(
    p: Projection,
    bases: Sequence[Tensor],
    w: Tensor,
    step: Tensor,
    start: int,
    outs: Sequence[Tensor],
) -> None:
    p.check_coordinates(w)
    kernel, times = _kernel_and_product(p, w)
    if kernel and kernel.added and (ready := _ready(bases, w)) and outs[0].dtype == w.dtype:
        kernel.added(p, ready, w.contiguous(), step, start, outs)
        return
    if kernel and kernel.added and all(_fits(base, w) for base in bases):
        for base, out in zip(bases, outs, strict=True):
            vectors = base.reshape(-1), w.contiguous()
            _add_rounded(kernel.added, p, *vectors, step, start, out.view(-1))
            start += base.numel()
        return
    sizes = [base.numel() for base in bases]
    if len(sizes) > 1:
        rows = times(w, step, p.recipe, start, start + sum(sizes), False).split(sizes)
        for base, part, out in zip(bases, rows, outs, strict=True):
            along = part.view(base.shape).to(base.device)
            if base.dtype == along.dtype == out.dtype:
                torch.add(base, along, out=out)
            else:
                out.copy_(base + along)
        return
    base, out = bases[0].reshape(-1), outs[0].view(-1)
    for block in p.blocks_of(range(start, start + len(base))):
        inside = slice(block.start - start, block.stop - start)
        rows = times(w, step, p.recipe, block.start, block.stop, False).to(base.device)
        out[inside] = base[inside] + rows  # in the wider dtype of both


def _add_rounded(
    added: Callable[..., None],
    p: Projection,
    base: Tensor,
    w: Tensor,
    step: Tensor,
    start: int,
    out: Tensor,
) -> None:
    """Put θ₀ + P w into ``out``, by a kernel for numbers of the precision of ``w``."""
    room = w.new_empty(min(ROUND, len(base)))
    for first in range(0, len(base), ROUND):
        part = room[: len(base) - first]
        part.copy_(base[first : first + ROUND])
        added(p, [part], w, step, start + first, [part])
        out[first : first + ROUND] = part


def gather(p: Projection, parts: Sequence[Tensor], w: Tensor, step: Tensor, start: int) -> Tensor:
    """Compute Pᵀ g, (d,) like ``w``, of vectors whose rows follow each other from ``start`` on.

    A 16-bit vector is never copied whole, nor are several put into one where a kernel takes them as
    they are. Autograd does not see it.
    """
    kernel, times = _kernel_and_product(p, w)
    if kernel and kernel.gathered and (ready := _ready(parts, w)):
        return kernel.gathered(p, ready, step, start)
    flat, out = [part.reshape(-1) for part in parts], torch.zeros_like(w)
    if kernel and kernel.gathered and all(_fits(part, w) for part in flat):
        length = max(ROUND, 32 * len(w))  # so that the sums of several threads are worth it
        for vector in flat:
            for part in vector.split(length) if len(vector) else ():
                out.add_(kernel.gathered(p, [part.to(w.dtype)], step, start))
                start += len(part)
        return out
    if len(flat) > 1:
        flat = [torch.cat([part.to(w.device, w.dtype) for part in flat])]
    for block in p.blocks_of(range(start, start + len(flat[0]))):
        part = flat[0][block.start - start : block.stop - start].to(w.device, w.dtype)
        out.add_(times(part, step, p.recipe, block.start, block.stop, True))
    return out


def _kernel_and_product(
    p: Projection, w: Tensor
) -> tuple[kernels.Kernel | None, Callable[..., Tensor]]:
    """Find the kernel for vectors like ``w``, and a product: in a graph, the operator alone."""
    return (None, product) if captured(w) else (kernels.find(p.family, w), compute)


def _take_memory(like: Tensor, dtype: torch.dtype) -> Tensor:
    """Take contiguous memory for a tensor; a large one gets what another one had before."""
    size = like.numel() * dtype.itemsize
    if size < LARGE or not like.is_cpu:
        return torch.empty(like.shape, dtype=dtype, device=like.device)
    return rooms.take(size).view(dtype).view(like.shape)


def _fits(tensor: Tensor, w: Tensor) -> bool:
    """Return whether sums with ``w`` have its precision and are made on its device."""
    return tensor.device == w.device and torch.promote_types(tensor.dtype, w.dtype) == w.dtype


def _ready(tensors: Sequence[Tensor], w: Tensor) -> list[Tensor]:
    """Return tensors as kernels take them; none if one has another dtype or device than ``w``."""
    dtype, device, ready = w.dtype, w.device, []
    for tensor in tensors:
        if tensor.dtype != dtype or tensor.device != device:
            return []
        ready.append(tensor.contiguous())
    return ready
