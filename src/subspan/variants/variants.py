"""Variants: ten thousand coordinate vectors of one recipe, and the one in use.

Sources of the mixed batch: adapters by row in PEFT (``adapter_names``), and Sheng et al., "S-LoRA:
serving thousands of concurrent LoRA adapters", MLSys 2024.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from subspan.errors import SubspanError
from subspan.subspace.model import SubspaceModel
from subspan.subspace.variant import MixedVariant, NotByRowError, Variant, using
from subspan.variants.library import Key, Library, Recent
from subspan.variants.places import Places
from subspan.variants.rows import Shape, check_result, check_rows, join_rows, take_rows
from subspan.variants.stored import Shelf, Source, StoredVariant

Name = str | None  # of a variant; None is the base itself
Found = dict[Name, StoredVariant | None]


class Variants:
    """Variants of one network: each is a vector of coordinates, and what was trained fully.

    The network is used through them, and is itself otherwise. Threads, and tasks of asyncio, may
    use different variants at once, and add, remove and replace them meanwhile: a variant that is in
    use stays what it was until that use ends. Variants are for inference: their coordinates have no
    gradients, and the network must be in evaluation mode.

    Args:
        model: a :class:`~subspan.SubspaceModel`, its network, or ``torch.compile`` of either.
        folder: of checkpoints; each is a variant named as its file, without ``.safetensors``, or
            ``.subspan`` of a compact one. A file is read when its variant is used, and again when
            it has changed since.
        resident: how many of the folder's variants stay in memory, the latest used.
        formed: of how many uses θ is kept for the next one with the same variants. Of one variant,
            up to 2²⁵ weights are kept.

    Raises:
        SubspanError: for a model that is not in a subspace, or is sharded over processes, and for a
            folder without checkpoints.
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
                raise SubspanError(
                    f"{option} must be an integer of at least {least}, got {value!r}"
                )
        self.model = model
        self._shelf = Shelf(found)
        self._library = Library(self._shelf.take, folder, resident)
        self._recent = Recent(formed)
        self._places = Places(found.subspace)
        self._by_row = self._places.by_row and inner is model
        self._proven: set[str] = set()
        self._known: set[tuple[str, Shape]] = set()

    # ---- the collection ----------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """The names of all variants."""
        return self._library.names()

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self._library

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise SubspanError(
            "Variants cannot be copied or pickled, for they are those of one network and its "
            "threads: make new ones around a copy of the model, or of the same folder in another "
            "process"
        )

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
        self._library.add(name, source)

    def replace(self, name: str, source: Source) -> None:
        """Put another variant in the place of one; whoever uses that one keeps it to the end.

        Args:
            name: of a variant.
            source: as for :meth:`add`.

        Raises:
            SubspanError: for an unknown name, and for a variant of another recipe or base.
        """
        self._recent.forget(self._library.replace(name, source))

    def remove(self, name: str) -> None:
        """Remove a variant; its file, if it has one, is left.

        Raises:
            SubspanError: for an unknown name.
        """
        self._recent.forget(self._library.remove(name))

    # ---- use ---------------------------------------------------------------------------------

    @contextmanager
    def use(self, name: Name) -> Iterator[nn.Module]:
        """Let the network be a variant in this thread, or task of asyncio.

        Args:
            name: of the variant; None for the base itself: θ₀, with the fully trained tensors and
                buffers that the model has.

        Yields:
            The model.

        Raises:
            SubspanError: for an unknown name, a network in training mode, and a file of the folder
                that is no variant of it.
        """
        with using(self._ready([name], [self._find(name)])):
            yield self.model

    def __call__(self, *args: Any, names: Name | Iterable[Name], **kwargs: Any) -> Any:
        """Run the network on a batch whose rows have variants of their own, without gradients.

        Over LoRA factors that is one run with batched products. Otherwise the rows of each variant
        are a batch by themselves, and results come back in the order of the rows.

        Args:
            args: of the network; the first dimension of every tensor is the batch.
            names: of each row's variant, None for the base; or one name for all.
            kwargs: as ``args``.

        Returns:
            The network's result: tensors with a row for each row, in tuples, lists, dictionaries
            and dataclasses.

        Raises:
            SubspanError: as :meth:`use`, and for arguments or results that have no rows.
        """
        with torch.no_grad():
            if names is None or isinstance(names, str):
                with self.use(names):
                    return self.model(*args, **kwargs)
            if isinstance(names, Set | Mapping) or not isinstance(names, Iterable):
                raise SubspanError(
                    f"names is a {type(names).__name__}, and each row needs one: give a list, with "
                    "a name or None for each row"
                )
            names = list(names)
            places = {f"argument {i + 1}": value for i, value in enumerate(args)} | kwargs
            if not sum(check_rows(value, len(names), where) for where, value in places.items()):
                raise SubspanError("no argument is a tensor whose first dimension is a batch")
            found = {name: self._find(name) for name in names or [None]}
            if len(found) == 1:
                with using(self._ready([*found], [*found.values()])):
                    return self.model(*args, **kwargs)
            if self._by_row:
                try:
                    return self._run_by_row(names, found, args, kwargs)
                except NotByRowError as reason:
                    self._by_row = not reason.args[0]
            return self._run_apart(names, found, args, kwargs)

    def _run_by_row(
        self, names: Sequence[Name], found: Found, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> Any:
        """Run the batch at once; before that some rows, where it is not known where rows lie.

        Raises:
            NotByRowError: if they do not lie where they would, or that is still not known.
        """
        whole = self._ready(names, [found[name] for name in names])
        try:
            with using(whole):
                result = self.model(*args, **kwargs)
        except NotByRowError as reason:
            if reason.args[0]:
                raise
            rows = [row for row, name in enumerate(names) if name == names[0]]
            members = [self._shelf.make(names[0], found[names[0]])] * len(rows)
            some = MixedVariant(members, self._shelf.beside(), self._proven, proves=True)
            self._run_rows(some, rows, args, kwargs)
            with using(whole):
                result = self.model(*args, **kwargs)
        self._check(result, len(names), names[0], found, args, kwargs)
        return result

    def _run_apart(
        self, names: Sequence[Name], found: Found, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> Any:
        """Run one batch for each variant, and put the results together."""
        rows = {name: [row for row, n in enumerate(names) if n == name] for name in found}
        results = [
            self._run_rows(self._ready([name], [stored]), rows[name], args, kwargs)
            for name, stored in found.items()
        ]
        counts = [len(its_rows) for its_rows in rows.values()]
        order = torch.tensor([row for its_rows in rows.values() for row in its_rows], device="cpu")
        joined = join_rows(results, counts, order.argsort())
        if len({*counts}) == 1:  # so that tables of all rows by all rows have the same shapes
            self._check(results[0], counts[0], names[0], found, args, kwargs)
        return joined

    def _check(
        self,
        result: Any,
        rows: int,
        name: Name,
        found: Found,
        args: Sequence[Any],
        kwargs: dict[str, Any],
    ) -> None:
        """Refuse a result that has not a row for each row; ``name`` is that of the first row."""

        def run(many: int) -> Any:
            variant = self._make([name], (found[name],)).follow(self._shelf.beside())
            return self._run_rows(variant, [0] * many, args, kwargs)

        check_result(result, rows, run, self._known)

    def _run_rows(
        self, variant: Variant, rows: Sequence[int], args: Sequence[Any], kwargs: dict[str, Any]
    ) -> Any:
        index = torch.tensor(rows, dtype=torch.int64, device="cpu")
        with using(variant):
            return self.model(*take_rows(args, index), **take_rows(kwargs, index))

    def _find(self, name: Name) -> StoredVariant | None:
        return None if name is None else self._library.load(name)

    def _ready(self, names: Sequence[Name], stored: Sequence[StoredVariant | None]) -> Variant:
        """Return the variant of all rows, or one for each; θ that is kept need not be formed."""
        self._places.check()
        key: Key = tuple(stored)
        made = self._recent.get(key, self._shelf.state(), lambda: self._make(names, key))
        return made.follow(self._shelf.beside())

    def _make(self, names: Sequence[Name], key: Key) -> Variant:
        named = dict(zip(key, names, strict=True))
        members = {stored: self._shelf.make(name, stored) for stored, name in named.items()}
        if len(key) == 1:
            return members[key[0]]
        return MixedVariant([members[stored] for stored in key], self._shelf.beside(), self._proven)
