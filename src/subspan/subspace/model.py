"""SubspaceModel: any network, trained through d coordinates. θ = θ₀ + P w.

Source: Li, Farkhoor, Liu and Yosinski, "Measuring the intrinsic dimension of objective landscapes",
ICLR 2018; per layer: Minut 2023; on fine-tuning: Aghajanyan, Zettlemoyer and Gupta, ACL 2021.

The network is wrapped in place: it keeps its class, its parameters (frozen, at θ₀) and its methods,
and every read of a weight gives θ (:mod:`subspan.subspace.modules`,
:mod:`subspan.subspace.weights`). A SubspaceModel is a handle to it, an ordinary module whose
parameters are the coordinates and what is trained fully, so that optimizers, DDP, compilers and
checkpoints need to know nothing.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from subspan import families
from subspan.errors import SubspanError
from subspan.subspace import init
from subspan.subspace.at_base import at_base
from subspan.subspace.attach import attach, detach
from subspan.subspace.compartments import Compartment, Patterns, Rules
from subspan.subspace.handle import Handle, with_signature
from subspan.subspace.links import FINGERPRINT, check_network, find_link
from subspan.subspace.parameters import changed_buffers
from subspan.subspace.sharded import refuse_whole
from subspan.subspace.summary import Summary, TensorSummary
from subspan.subspace.targets import HEAD_RATE, default_rate
from subspan.subspace.variant import refuse_in_use
from subspan.subspace.weights import Weights
from subspan.subspace.wrapping import prepare


class SubspaceModel(Handle):
    """A network whose weights are θ₀ + P w, with w its parameters.

    The network is changed in place, not copied: its parameters are frozen at θ₀, and reading them
    from their modules gives θ. It may be used and trained without this handle, too. :meth:`merge`
    gives an ordinary network with the trained weights, :meth:`unwrap` the network as it was.

    Args:
        net: any module.
        dim: d, the number of coordinates in all; or of each compartment; None where rules say it.
        projection: a family of :func:`subspan.projections`.
        compartments: "global", "layer", "tensor", "uniform:k" or {pattern: dimension}. Presets
            stand for patterns here, too.
        allocation: how a total is divided between compartments: "sqrt" of their size, "equal"
            or by "size".
        targets: patterns of the parameters to train (see
            :func:`subspan.subspace.compartments.matches`), or presets (see
            :mod:`subspan.subspace.targets`): "attention", "mlp", "norms-and-biases", "all-linear",
            "head"; by default all that require a gradient. The others stay at θ₀.
        exclude: patterns of parameters that stay at θ₀.
        train_fully: patterns of parameters that are trained directly and stored as they are (a
            new head).
        padding: whether rows of embeddings at ``padding_idx`` stay at θ₀ ("keep"), as they do when
            all weights are trained, or move with the others ("train"). A tensor that is also used
            elsewhere, a tied head say, moves in either case.
        seed: of the projection, in [0, 2⁶⁴).
        options: what the family has beyond these (``s`` of ``sparse``).

    Raises:
        SubspanError: for anything that cannot be trained as asked; the network is then untouched.
    """

    def __init__(
        self,
        net: nn.Module,
        dim: int | Sequence[int] | None = None,
        *,
        projection: str = "hash",
        compartments: Rules = "global",
        allocation: str = "sqrt",
        targets: Patterns = None,
        exclude: Patterns = None,
        train_fully: Patterns = None,
        padding: Literal["keep", "train"] = "keep",
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__()
        recipe = {
            "dim": dim,
            "projection": projection,
            "compartments": compartments,
            "allocation": allocation,
            "targets": targets,
            "exclude": exclude,
            "train_fully": train_fully,
            "seed": seed,
        }
        weights = prepare(net, recipe, padding, options)
        signature_of = type(net)
        attach(weights)  # the last that can fail; from here on the network is changed
        self._take(net, weights, signature_of)

    def _take(self, net: nn.Module, weights: Weights, signature_of: type) -> None:
        self.subspace = weights
        self.body = net
        vars(self)["training"] = net.training  # from_pretrained gives networks in eval mode
        self.__class__ = with_signature(type(self), signature_of)  # type: ignore[arg-type]

    @classmethod
    def of(cls, net: nn.Module) -> SubspaceModel | None:
        """Return a handle of a network that is in a subspace; None of any other network."""
        if isinstance(net, SubspaceModel):
            return net
        check_network(net)
        link = find_link(net)
        if link is None or link.weights.root is not net:
            return None
        model = cls.__new__(cls)
        nn.Module.__init__(model)
        model._take(net, link.weights, type(net))
        return model

    @classmethod
    def from_seed(
        cls,
        build: Callable[[], nn.Module],
        dim: int | Sequence[int] | None = None,
        *,
        init_seed: int = 0,
        **options: Any,
    ) -> Self:
        """Return a model whose θ₀ is drawn from a seed, so that a checkpoint holds nothing but w.

        Args:
            build: makes the network; its parameters are overwritten by
                :func:`subspan.subspace.init.initialize`.
            dim: as for the class.
            init_seed: of θ₀, in [0, 2⁶⁴).
            options: as for the class.
        """
        net = init.build(build, init_seed)
        model = cls(net, dim, **options)
        model.init_seed = init_seed
        return model

    # ---- the network and its coordinates -------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the network at θ₀ + P w; arguments and results are the network's own."""
        self.subspace.network()  # refuses what was unwrapped
        return self.body(*args, **kwargs)

    @property
    def compartments(self) -> tuple[Compartment, ...]:
        """Which weights share which coordinates."""
        return self.subspace.compartments

    @property
    def projections(self) -> tuple[families.Projection, ...]:
        """P of each compartment."""
        return self.subspace.projections

    @property
    def recipe(self) -> dict[str, Any]:
        """The arguments that make this model of its network, as JSON."""
        return self.subspace.recipe

    @property
    def init_seed(self) -> int | None:
        """The seed of θ₀, if it has one."""
        return self.subspace.init_seed

    @init_seed.setter
    def init_seed(self, seed: int | None) -> None:
        self.subspace.init_seed = seed

    @property
    def base_fingerprint(self) -> str:
        """A digest of θ₀ and the buffers as they were when the network was wrapped."""
        return self.subspace.fingerprint[:32]

    @property
    def layout(self) -> str:
        """A digest of what the coordinates mean."""
        return self.subspace.fingerprint[32:]

    @property
    def fingerprint(self) -> Tensor:
        """Both digests, byte by byte, as the buffer that a ``state_dict`` carries."""
        return self.subspace.network().get_buffer(FINGERPRINT)

    def weights(self) -> dict[str, Tensor]:
        """Return θ of every tensor that is not trained fully, by name, differentiable in w."""
        weights, thetas = self.subspace, self.subspace.dense()
        rest = {*weights.fully, *weights.factors}
        return {
            name: thetas[name] if name in thetas else weights.resting(name)
            for name in weights.requires_grad
            if name not in rest
        }

    @torch.inference_mode(False)  # what is made in it could not be trained
    @torch.no_grad()
    def merge(self) -> nn.Module:
        """Return an ordinary network with the weights θ₀ + P w; this model is left as it is.

        Layers whose quantised weights are trained become dense ones: ``nn.Linear`` in the dtype
        that was quantised.
        """
        refuse_whole(self.subspace, "merged")
        refuse_in_use(self.subspace, "merged")
        thetas = self.subspace.dense()
        twin = copy.deepcopy(self)
        return detach(twin.subspace, {name: theta.clone() for name, theta in thetas.items()})

    def unwrap(self) -> nn.Module:
        """Return the network that was wrapped, at θ₀ exactly; this model cannot be used any more.

        What was trained fully, and buffers, keep what training made of them.
        """
        return detach(self.subspace)

    def at_base(self) -> AbstractContextManager[None]:
        """Let the network compute θ₀ inside of a ``with``, as PEFT's ``disable_adapter()`` does.

        Every read of a weight gives θ₀ itself, without a copy and without a gradient of w; so do
        :meth:`weights`, :meth:`merge` and ``save_pretrained``. What is trained fully keeps what
        training has made of it, since the numbers that it had are nowhere: PEFT gives those of
        ``modules_to_save`` back. It holds for this thread, or task of asyncio, and may be nested.
        Code that ``torch.compile`` has compiled runs uncompiled meanwhile, in all threads.

        Raises:
            SubspanError: if the network is sharded (FSDP). Inside, activation checkpoints need
                ``torch.no_grad()``, and nothing can be compiled or exported.
        """
        return at_base(self.subspace)

    def parameter_groups(
        self, lr: float | None = None, head_lr: float | None = None
    ) -> list[dict[str, Any]]:
        """Return groups of parameters for any optimizer of PyTorch, each with its own rate.

        ``torch.optim.AdamW(model.parameter_groups())`` trains a network and its new head.
        Schedulers multiply the rate of each group. ``Trainer`` of transformers takes
        ``optimizers=(torch.optim.AdamW(model.parameter_groups()), None)``, and makes the scheduler;
        or ``optimizer_cls_and_kwargs=(torch.optim.AdamW, {"params": model.parameter_groups()})``.

        Args:
            lr: of the coordinates; by default one that works with Adam on pretrained networks, by
                the preset in ``targets`` and the number of coordinates
                (:func:`subspan.subspace.targets.default_rate`).
            head_lr: of what is trained fully.

        Returns:
            One group of coordinates, and one of all else that requires a gradient, if there are
            such.

        Raises:
            SubspanError: if all is frozen.
        """
        own = {id(w) for w in self.coordinates.values()}
        trained = [p for p in self.parameters() if p.requires_grad]
        dim = sum(part.dim for part in self.compartments)
        rate = default_rate(self.recipe["targets"], dim) if lr is None else lr
        groups = [
            {"params": [p for p in trained if id(p) in own], "lr": rate},
            {
                "params": [p for p in trained if id(p) not in own],
                "lr": HEAD_RATE if head_lr is None else head_lr,
            },
        ]
        if not trained:
            raise SubspanError("all parameters are frozen: unfreeze some, by requires_grad_()")
        return [group for group in groups if group["params"]]

    def fully_trained(self) -> dict[str, nn.Parameter]:
        """Return the parameters of ``train_fully`` by name."""
        return {name: self.body.get_parameter(name) for name in self.subspace.fully}

    def changed_buffers(self) -> dict[str, Tensor]:
        """Return the network's saved buffers that are not what they were when it was wrapped."""
        return changed_buffers(self.body, self.subspace.base_buffers)

    def summary(self) -> Summary:
        """Tensor by tensor: weights, compartment, coordinates. Print it, or read its rows."""
        parts: dict[str, list[Compartment]] = {}
        for part in self.compartments:
            for piece in part.pieces:
                parts.setdefault(piece.tensor, []).append(part)
        rows = [
            TensorSummary.of(
                name,
                self.subspace.held(name).shape,
                name in self.subspace.fully,
                parts.get(name, []),
            )
            for name in self.subspace.requires_grad
        ]
        return Summary(tuple(rows), sum(part.dim for part in self.compartments))

    def print_trainable_parameters(self) -> None:
        """Print the counts in one line, as PEFT does: "all" are the weights of the network."""
        print(self.summary().line())

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Publish the coordinates on the Hugging Face Hub: :func:`subspan.push_to_hub`.

        The network's own ``push_to_hub`` publishes all of its weights, at θ.

        Args:
            repo_id: the repository (``"user/name"``).
            options: as for the function.

        Returns:
            The address of the commit.
        """
        # That function stands above this module, which must not import it: it is looked up.
        publish: Callable[..., str] = sys.modules["subspan"].push_to_hub
        return publish(self, repo_id, **options)


SubspaceModel._own_names = {**vars(Handle), **vars(SubspaceModel)}
