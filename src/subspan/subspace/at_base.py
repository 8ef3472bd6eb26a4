"""A network at θ₀ for a while, as PEFT's ``disable_adapter()`` has it.

Inside of ``at_base`` every read of a weight gives θ₀ itself, without a copy and without P w. It
holds for one thread, or one task of asyncio: others go on with θ. A compiled graph has θ in it, so
that compiled code runs uncompiled meanwhile.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, TypeVar

import torch

from subspan.errors import SubspanError
from subspan.subspace.callers import runs_twice

if TYPE_CHECKING:
    from subspan.subspace.network import Network

T = TypeVar("T")

_resting: ContextVar[tuple[Network, ...]] = ContextVar("subspan_resting", default=())
_lock = threading.Lock()
_open = 0  # how many `at_base` there are now, in all threads; graphs are compiled for 0
_eager = ExitStack()  # while there are some, nothing runs compiled


@contextmanager
def at_base(weights: Network) -> Iterator[None]:
    """Let reads of a network's weights give θ₀, in this thread.

    Raises:
        SubspanError: if the network is sharded, or was unwrapped; inside of compiled code.
    """
    weights.network()
    if weights.shards is not None:
        raise SubspanError(
            "at_base() does not know networks in shards (FSDP): compare with the network that was "
            "wrapped in a process of its own, or before fully_shard"
        )
    _count(1)
    try:
        with first_in_context(_resting, weights, "at_base()"):
            yield
    finally:
        _count(-1)


@contextmanager
def first_in_context(state: ContextVar[tuple[T, ...]], value: T, called: str) -> Iterator[None]:
    """Put a value before all others that this context has, until the ``with`` ends.

    Raises:
        SubspanError: at the end, if others have begun and not ended, or this is another context: a
            generator has stopped inside of the ``with``, which people know as ``called``.
    """
    state.set((value, *state.get()))
    try:
        yield
    except BaseException:
        _take_out(state, value)
        raise
    if not _take_out(state, value):
        raise SubspanError(
            f"{called} has not ended where it began: a generator that yields inside of it leaves "
            "it to its caller, and may itself go on with that of another, or with none in another "
            "thread, so that results are wrong: end it before each yield"
        )


def _take_out(state: ContextVar[tuple[T, ...]], value: T) -> bool:
    """Remove a value from those of this context; return whether it was the first."""
    held = state.get()
    if value in held:
        place = held.index(value)
        state.set((*held[:place], *held[place + 1 :]))
    return held[:1] == (value,)


def is_at_base(weights: Network) -> bool:
    """Return whether a read gives θ₀ here and now; no graph may be made meanwhile."""
    if not _open:
        return False
    if torch.compiler.is_compiling():
        raise SubspanError(
            "a network in a subspace cannot be compiled or exported while at_base() is open: do it "
            "outside"
        )
    resting = weights in _resting.get()
    if resting and torch._C._is_tracing():
        raise SubspanError(
            "a trace of a network in a subspace follows its coordinates, and would keep θ₀ while "
            "at_base() is open: trace it outside, or trace the network of unwrap()"
        )
    return resting


def refuse_running_again(inside: str) -> None:
    """Refuse activation checkpoints ``inside`` of what may have ended when they run again."""
    if torch.is_grad_enabled():
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
        twice = hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint"
        again = torch._C._current_autograd_node() is not None
    else:  # so are both modes in the forward of a function of autograd
        again = not torch._C._is_fwd_grad_enabled() and not torch.is_inference_mode_enabled()
        twice = False
    if twice or (again and runs_twice(sys._getframe(1))):
        raise SubspanError(
            f"an activation checkpoint runs its part twice, and one of both may be inside of "
            f"{inside} and the other outside, with other weights: use torch.no_grad() inside of it "
            "and call backward() outside, or use no checkpoints"
        )


def _count(change: int) -> None:
    global _open
    with _lock:
        if not _open and "torch._dynamo" in sys.modules:
            try:
                _eager.enter_context(torch.compiler.set_stance("force_eager"))
            except RuntimeError as error:
                raise SubspanError(
                    "at_base() cannot begin inside of compiled code: begin it around the call"
                ) from error
        _open += change
        if not _open:
            _eager.close()
