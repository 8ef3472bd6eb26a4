"""The cache of what is derived from seeds."""

import os
import sys
import threading

import pytest
import torch
from torch import Tensor

from subspan.cache import Cache, Rooms


def tensors(*sizes: int) -> tuple[Tensor, ...]:
    """Byte tensors of these sizes."""
    return tuple(torch.zeros(size, dtype=torch.uint8) for size in sizes)


def never() -> tuple[Tensor, ...]:
    raise AssertionError("built again")


def test_what_is_kept_is_built_once() -> None:
    cache = Cache(budget=100)
    built = tensors(10, 20)
    assert cache.get("a", lambda: built) is built
    assert cache.get("a", never) is built
    assert cache.held == 30


def test_sizes_are_bytes() -> None:
    cache = Cache(budget=100)
    cache.get("a", lambda: (torch.zeros(10, dtype=torch.int64),))
    assert cache.held == 80


def test_the_least_recently_used_goes_first() -> None:
    cache = Cache(budget=100)
    for key in "abc":
        cache.get(key, lambda: tensors(30))
    cache.get("a", never)
    cache.get("d", lambda: tensors(40))  # b must go
    assert list(cache._items) == ["c", "a", "d"]
    assert cache.held == 100
    rebuilt = tensors(100)  # exactly the budget: everything else goes
    assert cache.get("b", lambda: rebuilt) is rebuilt
    assert list(cache._items) == ["b"]
    assert cache.held == 100


def test_what_exceeds_the_budget_is_not_kept_and_drives_nothing_out() -> None:
    cache = Cache(budget=100)
    cache.get("a", lambda: tensors(60))
    large = tensors(101)
    assert cache.get("b", lambda: large) is large
    assert list(cache._items) == ["a"]
    assert cache.held == 60


def test_a_builder_that_fails_leaves_no_trace() -> None:
    cache = Cache(budget=100)
    with pytest.raises(AssertionError, match="built again"):
        cache.get("a", never)
    assert cache.held == 0
    assert cache.get("a", lambda: tensors(1))[0].numel() == 1


def test_threads_share_it() -> None:
    cache, errors = Cache(budget=50), []

    def work(offset: int) -> None:
        try:
            for n in range(2000):
                size = (n * 7 + offset) % 20 + 1
                (found,) = cache.get(size, lambda size=size: tensors(size))
                assert found.numel() == size
        except Exception as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        workers = [threading.Thread(target=work, args=(offset,)) for offset in range(8)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        sys.setswitchinterval(interval)
    assert errors == []
    assert cache.held == sum(t.numel() for item in cache._items.values() for t in item) <= 50


def test_nobody_waits_for_the_cache() -> None:
    """A handler of signals would wait for what it interrupts, and never end."""
    cache, answers = Cache(budget=50), []

    def ask() -> None:
        answers.append(cache.get("of the handler", lambda: tensors(40)))

    class Interrupted:
        def __hash__(self) -> int:  # wherever the cache looks for it
            handler = threading.Thread(target=ask, daemon=True)
            handler.start()
            handler.join(timeout=2)
            assert answers
            answers.clear()
            return 1

    key = Interrupted()
    for _ in range(2):
        assert cache.get(key, lambda: tensors(30))[0].numel() == 30
    assert 0 < cache.held <= 50


def test_memory_is_lent_again_once_nobody_has_it():
    rooms = Rooms(budget=100)
    first = rooms.take(40)
    place = first.data_ptr()
    part = first.view(torch.float32)[3:]
    assert rooms.take(40).data_ptr() != place
    del first
    assert rooms.take(40).data_ptr() != place  # a view still has it
    del part
    taken = [rooms.take(40).data_ptr() for _ in range(2)]
    assert place in taken


def test_memory_of_another_size_or_thread_is_not_lent_and_old_memory_goes():
    rooms, places = Rooms(budget=100), []
    here = rooms.take(60)
    thread = threading.Thread(target=lambda: places.append(rooms.take(60).data_ptr()))
    thread.start()
    thread.join()
    assert places != [here.data_ptr()]
    assert len(rooms.take(50)) == 50  # the older one has to go
    assert [room.nbytes for room, _ in rooms._rooms] == [50]
    here.fill_(7)
    assert bool((here == 7).all())  # whoever has it keeps it
    assert len(rooms.take(1000)) == 1000
    assert rooms._rooms == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="only where processes fork")
def test_a_forked_process_writes_into_memory_of_its_own():
    lent = Rooms(budget=100).take(50)
    lent.fill_(1)
    child = os.fork()
    if child == 0:
        lent.fill_(2)
        os._exit(0)
    os.waitpid(child, 0)
    assert bool((lent == 1).all())
