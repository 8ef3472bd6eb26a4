"""Variants: ten thousand coordinate vectors of one recipe, and the one in use.

Source of the mixed batch: adapters by row in PEFT (``adapter_names``) and S-LoRA (Sheng et al.,
2023).
"""

from __future__ import annotations

import difflib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from subspan.errors import SubspanError
from subspan.subspace.model import SubspaceModel
from subspan.subspace.variant import Variant, using
from subspan.variants.places import Places
from subspan.variants.rows import check_rows, join_rows, take_rows
from subspan.variants.stored import Shelf, Source, Stored

Name = str | None  # of a variant; None is the base itself


class Variants:
    """Variants of one network, each a vector of coordinates, and what was trained fully.

    The network is used through them, and is itself otherwise. Threads, and tasks of asyncio, may
    use different variants at once, and add, remove and replace them meanwhile: a variant that is in
    use stays what it was until that use ends. Variants are for inference: their coordinates have no
    gradients.

    Args:
        model: a :class:`~subspan.SubspaceModel`, its network, or ``torch.compile`` of one.
        folder: of checkpoints; each is a variant named as its file, without ``.safetensors``. It is
            read when it is first used.
        resident: how many of the folder's variants stay in memory, the latest used.
        formed: of how many variants, the latest used, θ is kept between uses; of one variant, up
            to 2²⁵ weights are.

    Raises:
        SubspanError: for a model that is not in a subspace, or sharded over processes, and a folder
            without checkpoints.
    """

    def __init__(
        self,
        model: nn.Module,
        folder: str | os.PathLike[str] | None = None,
        *,
        resident: int = 1000,
        formed: int = 1,
    ) -> None:
        inner = getattr(model, "_orig_mod", model)  # of torch.compile
        found = SubspaceModel.of(inner) if isinstance(inner, nn.Module) else None
        if found is None:
            raise SubspanError(
                f"variants are those of a SubspaceModel, got {type(model).__name__}: wrap the "
                "network, or load a checkpoint around it"
            )
        if found.subspace.shards is not None:
            raise SubspanError("a network that is sharded over processes cannot have variants")
        for option, value, least in (("resident", resident, 1), ("formed", formed, 0)):
            if not isinstance(value, int) or value < least:
                raise SubspanError(f"{option} must be an integer of at least {least}, got {value}")
        self._files = _find_files(folder)
        self.model, self.resident, self.formed = model, resident, formed
        self._shelf, self._places = Shelf(found), Places(found.subspace)
        self._added: dict[str, Stored] = {}
        self._read: OrderedDict[str, Stored] = OrderedDict()  # from files, latest used last
        self._formed: OrderedDict[Any, tuple[Any, Variant]] = OrderedDict()  # likewise
        self._lock = threading.Lock()

    # ---- the collection ----------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """The names of all variants."""
        with self._lock:
            return [*self._files, *self._added]

    def __len__(self) -> int:
        return len(self._files) + len(self._added)

    def __contains__(self, name: object) -> bool:
        return name in self._added or name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def add(self, name: str, source: Source) -> None:
        """Add a variant.

        Args:
            name: that no other variant has.
            source: a vector of coordinates, (d,), beside which the model's own fully trained
                tensors count as they are now; the path of a checkpoint; or a model as it is now.

        Raises:
            SubspanError: for a name that is taken, and for a variant of another recipe or base.
        """
        self._refuse_taken(name)
        stored = self._shelf.take(source)
        with self._lock:
            self._refuse_taken(name)  # by another thread meanwhile
            self._added[name] = stored

    def replace(self, name: str, source: Source) -> None:
        """Put another variant in the place of one; whoever uses that one keeps it to the end.

        Args:
            name: of a variant.
            source: as for :meth:`add`.

        Raises:
            SubspanError: for an unknown name, and for a variant of another recipe or base.
        """
        self._check_known(name)
        stored = self._shelf.take(source)
        with self._lock:
            self._check_known(name)
            self._drop(name)
            self._added[name] = stored

    def remove(self, name: str) -> None:
        """Remove a variant; its file, if it has one, is left.

        Raises:
            SubspanError: for an unknown name.
        """
        with self._lock:
            self._check_known(name)
            self._drop(name)

    def _drop(self, name: str) -> None:
        self._files.pop(name, None)
        for stored in (self._added.pop(name, None), self._read.pop(name, None)):
            self._formed.pop(stored, None)

    def _refuse_taken(self, name: str) -> None:
        if not isinstance(name, str) or not name:
            raise SubspanError(
                f"the name of a variant is a text of at least one letter, got {name!r}"
            )
        if name in self:
            raise SubspanError(
                f"there is a variant {name!r} already: use replace(), or remove() it"
            )

    def _check_known(self, name: object) -> None:
        if name in self:
            return
        known = [*self._files, *self._added]
        near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
        raise SubspanError(f"unknown variant {name!r}: {hint}there are {len(known):,} variants")

    # ---- use ---------------------------------------------------------------------------------

    @contextmanager
    def use(self, name: Name) -> Iterator[nn.Module]:
        """Let the network be a variant in this thread, or task of asyncio.

        Args:
            name: of the variant; None for the base itself, θ₀ with the fully trained tensors that
                the model has.

        Yields:
            The model.

        Raises:
            SubspanError: for an unknown name, a network in training mode, or a file of the folder
                that cannot be read.
        """
        with using(self._find(name)):
            yield self.model

    def __call__(self, *args: Any, names: Name | Sequence[Name], **kwargs: Any) -> Any:
        """Run the network on a batch in which each row has a variant of its own, without gradients.

        The rows of one variant make one batch, and results come back in the order of the rows.

        Args:
            args: of the network; the first dimension of every tensor is the batch.
            names: of each row's variant, None for the base; or one name for all.
            kwargs: likewise.

        Raises:
            SubspanError: as :meth:`use`, and for arguments or results that have no rows.
        """
        with torch.no_grad():
            if names is None or isinstance(names, str):
                with self.use(names):
                    return self.model(*args, **kwargs)
            rows: dict[Name, list[int]] = {}
            for row, name in enumerate(names):
                rows.setdefault(name, []).append(row)
            found = {name: self._find(name) for name in rows}
            places = [
                *((f"argument {i + 1}", value) for i, value in enumerate(args)),
                *kwargs.items(),
            ]
            if not sum(check_rows(value, len(names), where) for where, value in places):
                raise SubspanError("no argument is a tensor with a batch as its first dimension")
            if len(rows) == 1:
                with using(found[names[0]]):
                    return self.model(*args, **kwargs)
            return self._run_apart(found, rows, args, kwargs)

    def _run_apart(
        self,
        found: dict[Name, Variant],
        rows: dict[Name, list[int]],
        args: Sequence[Any],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run one batch for each variant, and put the results together."""
        results = []
        for name, its_rows in rows.items():
            index = torch.tensor(its_rows)
            with using(found[name]):
                results.append(
                    self.model(
                        *(take_rows(value, index) for value in args),
                        **{key: take_rows(value, index) for key, value in kwargs.items()},
                    )
                )
        order = torch.tensor([row for its_rows in rows.values() for row in its_rows]).argsort()
        return join_rows(results, [len(its_rows) for its_rows in rows.values()], order)

    def _find(self, name: Name) -> Variant:
        """Return a variant ready for use; θ that was formed before is there if it is kept."""
        self._places.check()
        stored = None if name is None else self._load(name)
        state = self._shelf.weights.state()
        with self._lock:
            known = self._formed.get(stored)
            if known is not None and known[0] == state:
                self._formed.move_to_end(stored)
                return known[1]
        variant = self._shelf.make_base() if stored is None else self._shelf.make(str(name), stored)
        with self._lock:
            self._formed[stored] = state, variant
            self._formed.move_to_end(stored)
            while len(self._formed) > self.formed:
                self._formed.popitem(last=False)
        return variant

    def _load(self, name: str) -> Stored:
        """Return what is stored of a variant, from its file if it is not in memory."""
        with self._lock:
            self._check_known(name)
            if name in self._added:
                return self._added[name]
            if name in self._read:
                self._read.move_to_end(name)
                return self._read[name]
            path = self._files[name]
        stored = self._shelf.take(path)  # other threads need not wait
        with self._lock:
            if self._files.get(name) is path:
                self._read[name] = stored
            while len(self._read) > self.resident:
                self._read.popitem(last=False)
        return stored


def _find_files(folder: str | os.PathLike[str] | None) -> dict[str, Path]:
    """Find the checkpoints of a folder, by the names of their variants.

    Raises:
        SubspanError: if there are none.
    """
    if folder is None:
        return {}
    files = {path.stem: path for path in sorted(Path(folder).glob("*.safetensors"))}
    if not files:
        raise SubspanError(
            f"{folder} has no checkpoints of variants (*.safetensors): give a folder of files that "
            "subspan.save wrote"
        )
    return files
