"""The optimizers over MPI: gradients averaged, states and step divided among the ranks."""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from fastopt import _config, _core
from fastopt._checks import integer, number, shown, switch
from fastopt._tree import Array, rebuild
from fastopt.distributed._saving import Shards, save
from fastopt.distributed._shards import BLOCK, Exchange, Piece, cut, piece_of
from fastopt.distributed._together import (
    Peers,
    agree,
    check_same,
    communicator,
    share_of_threads,
    together,
)
from fastopt.optimizers.base import _RULES, ArrayTree, GradientTree, Optimizer
from fastopt.optimizers.groups import ParamGroup
from fastopt.optimizers.options import Schedule
from fastopt.optimizers.schedule_free import Averaging

__all__ = ["DistributedOptimizer"]


class DistributedOptimizer(Averaging):
    """
    An optimizer of parameters that all ranks of a communicator have: data-parallel training.

    Every rank calls it with the gradients of its part of the batch; the step is that of their
    mean, and leaves the same parameters on all. One rank has the bits of the plain optimizer.

    Parameters
    ----------
    cls : type
        The optimizer: ``fastopt.AdamW``.
    params : array or tree of arrays, or list of groups, optional
        As for ``cls``, and the same on all ranks: see `broadcast`. Without, `update` gives them.
    comm : mpi4py.MPI.Intracomm, optional
        By default ``MPI.COMM_WORLD``.
    shard : bool, default True
        Each rank has a part of the states, and steps that (ZeRO-1). False: all have all.
    reproducible : bool, default False
        Gradients are added in the order of the ranks: the bits are the same for every MPI and
        every `bucket_bytes`, sharded or not.
    bucket_bytes : int, default 2**25
        Gradients and parameters go over the wire in pieces of about so many. Parameters that
        `flatten` made one array go at once.
    check_every : int, default 0
        After so many steps, again and again, a checksum tells whether all ranks have the same
        parameters. 0: never.
    **options
        The hyper-parameters of ``cls``.

    Raises
    ------
    TypeError, ValueError
        On all ranks, if an argument does not fit on one, or is not the same on all.

    Notes
    -----
    Rules whose elements do not know of each other are cut at multiples of 1024 elements of each
    array in C order; others (with sums over an array, rows and columns, or matrices) have whole
    arrays, balanced by size, as have arrays that are not in C order. What is rounded at random, and
    8-bit states, are those of the plain optimizer.

    Every method that steps, saves or loads is called by all ranks. An error on one is an error of
    the same type on all, with its rank in the message, and nothing is changed.

    The ranks of a machine divide its processors, unless a number of threads was chosen.

    References
    ----------
    Rajbhandari, Rasley, Ruwase, He, ZeRO: memory optimizations toward training trillion parameter
    models, 2020.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> from fastopt.distributed import DistributedOptimizer
    >>> params = {"W": np.ones(2)}
    >>> opt = DistributedOptimizer(fastopt.SGD, params, lr=0.5)
    >>> opt.step({"W": np.ones(2)})
    >>> params["W"]
    array([0.5, 0.5])
    """

    _model: _core.BoundOptimizer  # of the whole arrays, once there are some

    def __init__(
        self,
        cls: type[Optimizer],
        params: ArrayTree | None = None,
        comm: MPI.Intracomm | None = None,
        *,
        shard: bool = True,
        reproducible: bool = False,
        bucket_bytes: int = 2**25,
        check_every: int = 0,
        **options: Any,
    ) -> None:
        caller = "DistributedOptimizer"
        self._comm = communicator(f"{caller}: comm", comm)
        with together(self._comm):
            if not (isinstance(cls, type) and issubclass(cls, Optimizer)):
                raise TypeError(f"{caller}: cls is {shown(cls)}, expected a class of optimizers")
            self._name = cls.__name__
            self._is_sharded = switch(f"{caller}: shard", shard) and self._comm.size > 1
            self._reproducible = switch(f"{caller}: reproducible", reproducible)
            self._bucket_bytes = integer(f"{caller}: bucket_bytes", bucket_bytes, 1)
            self._check_every = integer(f"{caller}: check_every", check_every, 0)
            self._optimizer = cls(None, **options)
        self._threads = share_of_threads(self._comm)
        own = {
            "cls": self._name,
            "shard": self._is_sharded,
            "reproducible": self._reproducible,
            "bucket_bytes": self._bucket_bytes,
            "check_every": self._check_every,
            "params": None if params is None else "given",
        }
        check_same(self._comm, caller, own)
        self._forget()
        if params is not None:
            self._bind(params)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_") or hasattr(type(self), name):
            super().__setattr__(name, value)
        else:
            setattr(self._optimizer, name, value)  # it says what was meant

    def __repr__(self) -> str:
        return f"rank {self._comm.rank} of {self._comm.size} has {self._optimizer!r}"

    def _forget(self) -> None:
        """Binds nothing."""
        self._optimizer._forget()
        self._params: Any = None
        self._grouped = False
        self._divisible: list[bool] = []
        self._fitting: Sequence[Mapping[str, Any]] = []  # the options that go with the pieces
        self._pieces: list[list[Piece]] = [[] for _ in range(self._comm.size)]
        self._exchanges: list[Exchange] = []

    @property
    def _arrays(self) -> list[Array]:
        return [] if self._optimizer._bound is None else self._model.params

    @property
    def _own(self) -> list[Piece]:
        return self._pieces[self._comm.rank]

    def _bind(self, params: Any) -> None:
        grouped = Optimizer._is_grouped(params)
        groups: Any = params if grouped else [{"params": params}]
        self._add(groups, [group["params"] for group in groups] if grouped else params, grouped)

    def _add(self, groups: Sequence[Mapping[str, Any]], trees: Any, grouped: bool) -> None:
        """Binds these groups, the last of all the trees, on all ranks or on none."""
        optimizer, known, comm = self._optimizer, len(self._divisible), self._comm
        before = dict(vars(optimizer))
        try:
            with together(comm):
                model = _core.BoundOptimizer(self._name, trees, grouped)
                optimizer._check_params(model)
                arrays, owners = model.params[known:], model.groups[known:]
                of_groups = [optimizer._options_of({**group, "params": None}) for group in groups]
                first = max(model.groups, default=0) + 1 - len(groups)
                divisible = [
                    not self._is_sharded or self._can_be_cut(of_groups[owner - first], array)
                    for array, owner in zip(arrays, owners, strict=True)
                ]
                pieces = cut([array.size for array in arrays], divisible, comm.size)
                pieces = [old + new for old, new in zip(self._pieces, pieces, strict=True)]
                divisible = self._divisible + divisible
                if self._is_sharded:
                    self._bind_pieces(model, groups, pieces[comm.rank], divisible, grouped)
                else:
                    pieces = cut([array.size for array in model.params], divisible, comm.size)
                    self._bind_to(groups, grouped)
            self._check_same_everywhere(model)
        except Exception:
            vars(optimizer).clear()
            vars(optimizer).update(before)
            raise
        self._model, self._params, self._grouped = model, trees, grouped
        self._pieces, self._divisible = pieces, divisible
        dtypes = [array.dtype for array in model.params]
        self._exchanges = [
            Exchange(
                comm,
                [i for i, own in enumerate(dtypes) if own == dtype],
                pieces,
                dtype,
                self._bucket_bytes,
                self._reproducible,
                not self._is_sharded,
            )
            for dtype in dict.fromkeys(dtypes)
        ]

    def _bind_pieces(
        self,
        model: _core.BoundOptimizer,
        groups: Sequence[Mapping[str, Any]],
        pieces: Sequence[Piece],
        divisible: Sequence[bool],
        grouped: bool,
    ) -> None:
        optimizer, known = self._optimizer, len(self._divisible)
        optimizer._sizes = dict(enumerate(array.size for array in model.params))
        own = iter(list(map(piece_of, model.params, pieces, divisible))[known:])
        self._bind_to([{**g, "params": rebuild(g["params"], own)} for g in groups], grouped)
        assert optimizer._bound is not None
        for i, (begin, _) in enumerate(pieces):
            optimizer._bound.set_first(i, begin)

    def _bind_to(self, groups: Sequence[Mapping[str, Any]], grouped: bool) -> None:
        if self._divisible:
            self._optimizer.add_param_group(groups[0])
        else:
            self._optimizer._bind(groups if grouped else groups[0]["params"])

    def _can_be_cut(self, options: Mapping[str, Any], array: Array) -> bool:
        in_order = array.flags.c_contiguous
        return in_order and (array.ndim == 0 or not self._is_one(options, array))

    def _is_one(self, options: Mapping[str, Any], array: Array) -> bool:
        rule = self._optimizer._rule_for(options, array)
        states, _, adds_up = _RULES[rule]
        shapes = {self._optimizer._declared(name).shape for name in states}
        return adds_up or bool(shapes - {"like"}) or self._optimizer._between(options) is not None

    def _pieces_of(self, arrays: Sequence[Array]) -> list[Array]:
        return list(map(piece_of, arrays, self._own, self._divisible))

    def _tree_of(self, arrays: Sequence[Array | None]) -> Any:
        pieces: Any = iter(arrays)
        if self._grouped:
            return [rebuild(tree, pieces) for tree in self._params]
        return rebuild(self._params, pieces)

    def _check_same_everywhere(self, model: _core.BoundOptimizer) -> None:
        about: dict[str, Any] = {"the names of params": model.names, **self._options()}
        for name, array in zip(model.names, model.params, strict=True):
            layout = "in C order" if array.flags.c_contiguous else "not in C order"
            about[f"params[{name!r}]"] = (str(array.dtype), array.shape, layout)
        check_same(self._comm, "DistributedOptimizer", about)

    def _options(self) -> dict[str, Any]:
        """The hyper-parameters of all groups, by name; a schedule may have no repr of its own."""
        return {
            f"param_groups[{i}][{name!r}]": value
            for i, group in enumerate(self._optimizer._groups)
            for name, value in group._options.items()
            if not callable(value)
        }

    def step(
        self,
        grads: GradientTree,
        *,
        loss_scale: float = 1.0,
        max_norm: float | None = None,
        skip_nonfinite: bool = False,
        zero_grads: bool = False,
        weight: float | None = None,
    ) -> float | None:
        """
        Make the step of the mean of all ranks' gradients, on all ranks or on none.

        Parameters
        ----------
        grads : array or tree of arrays
            This rank's, as for `fastopt.Optimizer.step`; ``None`` for an array is so on all ranks.
        loss_scale, max_norm, skip_nonfinite, zero_grads
            As for `fastopt.Optimizer.step`, of the mean; the same on all ranks.
        weight : float, optional
            How much this rank's gradients weigh in the mean: the number of its examples, where
            these differ. With 0 they are not read. By default all weigh the same.

        Returns
        -------
        float or None
            The global norm of the mean, as `fastopt.Optimizer.step`.

        Raises
        ------
        TypeError, ValueError, RuntimeError
            On all ranks, if an array does not fit on one, the arguments are not the same on all,
            or ``check_every`` finds that parameters are not.

        Examples
        --------
        >>> import numpy as np, fastopt
        >>> from fastopt.distributed import DistributedOptimizer
        >>> w = np.array([1.0, 2.0])
        >>> opt = DistributedOptimizer(fastopt.SGD, w, lr=0.1)
        >>> opt.step(np.array([3.0, 4.0]), max_norm=1.0)
        5.0
        """
        if self._optimizer._bound is None:
            name = self._name
            raise ValueError(f"{name}.step: no parameters yet: give them to it, or use update")
        if self._comm.size == 1:
            if weight is not None:
                number(f"{self._name}.step: weight", weight, 0.0, above=True)
            self._optimizer._params = self._params
            return self._optimizer.step(
                grads,
                loss_scale=loss_scale,
                max_norm=max_norm,
                skip_nonfinite=skip_nonfinite,
                zero_grads=zero_grads,
            )
        said = {
            "loss_scale": loss_scale,
            "max_norm": max_norm,
            "skip_nonfinite": skip_nonfinite,
            "zero_grads": zero_grads,
        }
        arrays, own, scale, flats = self._look(grads, said, weight)
        flat_grads, flat_params = flats[: len(self._exchanges)], flats[len(self._exchanges) :]
        with np.errstate(all="ignore"):
            sums = self._sum_up(arrays, own, 1.0 if weight is None else float(weight), flat_grads)
        steps = self._optimizer.steps
        norm = self._step(arrays, sums, scale, max_norm, skip_nonfinite)
        if zero_grads:
            for grad in own:
                if grad is not None:
                    grad[...] = 0
        if self._optimizer.steps > steps:
            self._share(arrays, flat_params)
            if self._check_every and self._optimizer.steps % self._check_every == 0:
                self._check_copies(arrays)
        return norm

    def update(self, params: ArrayTree, grads: GradientTree, **options: Any) -> float | None:
        """
        Step ``params``, which the first call binds: ``opt.update(params, grads)`` in a loop.

        Parameters
        ----------
        params : array or tree of arrays
            May be other arrays of the same names, shapes and dtypes at every call.
        grads, **options
            As for `step`.

        Returns
        -------
        float or None
            As `step`.

        Raises
        ------
        TypeError, ValueError, RuntimeError
            On all ranks, as `step`.

        Examples
        --------
        >>> import numpy as np, fastopt
        >>> from fastopt.distributed import DistributedOptimizer
        >>> w = np.ones(2)
        >>> opt = DistributedOptimizer(fastopt.SGD, lr=0.5)
        >>> opt.update(w, np.ones(2))
        >>> w
        array([0.5, 0.5])
        """
        is_first, before = self._optimizer._bound is None, self._params
        if is_first:
            self._bind(params)
        else:
            groups: Any = params
            grouped = Optimizer._is_grouped(params)
            self._params = [group["params"] for group in groups] if grouped else params
        try:
            return self.step(grads, **options)
        except BaseException:
            if is_first:
                self._forget()
            else:
                self._params = before
            raise

    def add_param_group(self, group: Mapping[str, Any]) -> None:
        """
        Add parameters, on all ranks, as `fastopt.Optimizer.add_param_group`.

        Parameters
        ----------
        group : mapping
            ``{"params": ..., "lr": ...}``. The ranks divide it among them; what they have stays.

        Raises
        ------
        TypeError, ValueError, RuntimeError
            On all ranks, if the group does not fit on one. Nothing is changed then.

        Examples
        --------
        >>> import numpy as np, fastopt
        >>> from fastopt.distributed import DistributedOptimizer
        >>> head, body = np.ones(2), np.ones(2)
        >>> opt = DistributedOptimizer(fastopt.SGD, [{"params": head}], lr=0.5)
        >>> opt.add_param_group({"params": body, "lr": 0.25})
        >>> opt.step([np.ones(2), np.ones(2)])
        >>> head, body
        (array([0.5, 0.5]), array([0.75, 0.75]))
        """
        with together(self._comm):
            if not Optimizer._is_grouped([group]):
                raise TypeError(
                    f"{self._name}.add_param_group: group is {shown(group)}, "
                    "expected a mapping with 'params'"
                )
        trees = self._params if self._grouped else [self._params]
        known = [] if self._optimizer._bound is None else trees
        self._add([group], [*known, group["params"]], True)

    def _look(
        self, grads: Any, said: dict[str, Any], weight: Any
    ) -> tuple[list[Array], list[Array | None], float, list[Array | None]]:
        """
        Checks all that all ranks need.

        Returns arrays, gradients, what divides their sum; and for each exchange the gradients, then
        the arrays, as one where they are one on all ranks.
        """
        caller, comm = f"{self._name}.step", self._comm
        error, looked, digest, own_weight = None, [], 0, 1.0
        flats: list[Array | None] = []
        try:
            if weight is not None:
                own_weight = number(f"{caller}: weight", weight, 0.0)
            number(f"{caller}: loss_scale", said["loss_scale"], 0.0, above=True)
            switch(f"{caller}: zero_grads", said["zero_grads"])
            looked = self._model.look(self._params, grads, said["zero_grads"])
            self._check_pieces([array for array, _ in looked])
            said |= {"weight": None if weight is None else "given", **self._options()}
            is_there = bytes(grad is not None for _, grad in looked)
            digest = zlib.crc32(is_there, zlib.crc32(repr(said).encode()))
            given = [grad if weight is None else None for _, grad in looked]
            flats = [exchange.flat_grads(given) for exchange in self._exchanges]
            flats += [exchange.flat_params([a for a, _ in looked]) for exchange in self._exchanges]
        except Exception as caught:
            error = caught
        record = [error is not None, digest, own_weight, *(flat is not None for flat in flats)]
        records = np.empty((comm.size, 3 + 2 * len(self._exchanges)))
        comm.Allgather(np.resize(np.array(record, np.float64), records.shape[1]), records)
        if records[:, 0].any():
            agree(comm, error)
        if (records[:, 1] != digest).any():
            for name, (_, grad) in zip(self._model.names, looked, strict=True):
                said[f"grads[{name!r}]"] = None if grad is None else "an array"
            check_same(comm, caller, said)
        total = sum(records[:, 2].tolist())  # in the order of the ranks
        if total == 0:
            raise ValueError(f"{caller}: weight is 0 on all ranks")
        arrays, own = [array for array, _ in looked], [grad for _, grad in looked]
        on_all = np.all(records[:, 3:], axis=0)
        flats = [flat if there else None for flat, there in zip(flats, on_all, strict=True)]
        return arrays, own, float(said["loss_scale"]) * total, flats

    def _check_pieces(self, arrays: Sequence[Array]) -> None:
        """A rule that hyper-parameters have made one of whole arrays, or an array, may not fit."""
        if not self._is_sharded:
            return
        options = [group._options for group in self._optimizer._groups]
        is_new = options != self._fitting
        names, owners = self._model.names, self._model.groups
        for i, array in enumerate(arrays):
            if not self._divisible[i]:
                continue
            where = f"{self._name}.step: params[{names[i]!r}]"
            if not array.flags.c_contiguous:
                raise ValueError(f"{where} is not in C order, as that was bound with")
            if is_new and array.ndim and self._is_one(options[owners[i]], array):
                raise ValueError(
                    f"{where} is cut among the ranks, and its hyper-parameters are now of a rule "
                    "for whole arrays: give them to DistributedOptimizer"
                )
        self._fitting = options

    def _sum_up(
        self,
        arrays: Sequence[Array],
        grads: Sequence[Array | None],
        weight: float,
        flats: Sequence[Array | None],
    ) -> list[Array | None]:
        """The sums of all ranks' gradients: of the pieces that are stepped here."""
        found: dict[int, Array] = {}
        for exchange, flat in zip(self._exchanges, flats, strict=True):
            found |= exchange.sum_up(grads, weight, flat)
        stepped = self._pieces_of(arrays) if self._is_sharded else arrays
        return [
            None if grad is None else found[i].reshape(array.shape)
            for i, (grad, array) in enumerate(zip(grads, stepped, strict=True))
        ]

    def _step(
        self,
        arrays: Sequence[Array],
        sums: Sequence[Array | None],
        scale: float,
        max_norm: float | None,
        skip_nonfinite: bool,
    ) -> float | None:
        optimizer, bound = self._optimizer, self._optimizer._bound
        assert bound is not None
        params: Any = self._params
        if self._is_sharded:
            params = optimizer._params = self._tree_of(self._pieces_of(arrays))
        peers = Peers(self._comm, self._blocks(sums) if self._is_sharded else None)
        error, norm = None, None
        chosen = _config.threads_are_chosen()
        threads = nullcontext() if chosen else _config.config_context(num_threads=self._threads)
        try:
            with threads:
                norm = bound.step_among(
                    peers,
                    params,
                    self._tree_of(sums),
                    optimizer._fold,
                    scale,
                    max_norm,
                    skip_nonfinite,
                )
        except Exception as caught:
            if peers.met and not peers.agreed:
                raise
            error = caught
        agree(self._comm, error)
        return norm

    def _blocks(self, sums: Sequence[Array | None]) -> tuple[int, list[slice]]:
        """How many blocks all arrays with a gradient have, and which of them are summed here."""
        count, own = 0, []
        sizes = self._optimizer._sizes
        for i, (begin, end) in enumerate(self._own):
            if sums[i] is not None:
                own.append(slice(count + begin // BLOCK, count + -(-end // BLOCK)))
                count += -(-sizes[i] // BLOCK)
        return count, own

    def _share(self, arrays: Sequence[Array], flats: Sequence[Array | None]) -> None:
        if self._is_sharded:
            for exchange, flat in zip(self._exchanges, flats, strict=True):
                exchange.share(arrays, flat)

    def _check_copies(self, arrays: Sequence[Array]) -> None:
        sums = [zlib.crc32(array.tobytes()) for array in arrays]
        all_sums = np.empty((self._comm.size, len(sums)), np.int64)
        self._comm.Allgather(np.array(sums, np.int64), all_sums)
        for name, column in zip(self._model.names, all_sums.T, strict=True):
            other = np.flatnonzero(column != column[0])
            if other.size:
                raise RuntimeError(
                    f"{self._name}.step: params[{name!r}] is not the same on rank 0 and on rank "
                    f"{other[0]} after {self.steps} steps: broadcast it before training, and "
                    "change it on all ranks"
                )

    @property
    def steps(self) -> int:
        """The number of completed steps."""
        return self._optimizer.steps

    @property
    def skipped_steps(self) -> int:
        """The number of steps that ``skip_nonfinite`` left out."""
        return self._optimizer.skipped_steps

    @property
    def defaults(self) -> Mapping[str, Any]:
        """The hyper-parameters of groups that do not have their own, as they were given."""
        return self._optimizer.defaults

    @property
    def lr(self) -> float:
        """The learning rate of the next step; setting it, on all ranks, sets all groups."""
        return self._optimizer.lr

    @lr.setter
    def lr(self, value: float | Schedule) -> None:
        self._optimizer.lr = value

    @property
    def param_groups(self) -> tuple[ParamGroup, ...]:
        """The groups: what is set on one rank is set on all. ``params`` are this rank's pieces."""
        return self._optimizer.param_groups

    @property
    def state(self) -> Mapping[str, Mapping[str, NDArray[Any]]]:
        """The live states of this rank's pieces, without axes where an array is cut."""
        return self._optimizer.state

    @property
    def d(self) -> float:
        """The distance that Prodigy has found so far."""
        distance: float = self._plain("d")
        return distance

    @property
    def training(self) -> bool:
        """Whether a schedule-free optimizer's arrays hold what gradients are taken at."""
        training: bool = self._plain("training")
        return training

    def _plain(self, name: str) -> Any:
        """What some optimizers have."""
        if not hasattr(self._optimizer, name):
            raise AttributeError(f"{self._name} has no attribute {name!r}")
        return getattr(self._optimizer, name)

    def train(self) -> None:
        """Put y into the parameters on all ranks: of schedule-free optimizers, and as theirs."""
        self._move("train")

    def eval(self) -> None:
        """Put the average into the parameters on all ranks: of schedule-free optimizers."""
        self._move("eval")

    def _move(self, mode: str) -> None:
        with together(self._comm):
            self._plain(mode)()
        self._share(self._arrays, [None] * len(self._exchanges))

    def state_dict(self) -> dict[str, NDArray[Any]]:
        """
        Return the ``state_dict`` of the plain optimizer, whole, on all ranks: all must call it.

        Returns
        -------
        dict of str to array
            As `fastopt.Optimizer.state_dict`. A run on any number of ranks, or one without, goes
            on from it.

        Examples
        --------
        >>> import numpy as np, fastopt
        >>> from fastopt.distributed import DistributedOptimizer
        >>> opt = DistributedOptimizer(fastopt.Adam, {"W": np.ones(2)})
        >>> saved = opt.state_dict()
        >>> fastopt.Adam({"W": np.ones(2)}).load_state_dict(saved)
        """
        shards = self._shards
        return {
            key: shards.whole(entry, self._bucket_bytes) for key, entry in shards.entries().items()
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """
        Write the ordinary state_dict to an ``.npz`` file, from rank 0: all must call it.

        No rank has more of it than its own part and about ``bucket_bytes``. A file that is there
        is replaced once the new one is whole, which before is at ``path`` with ``.part`` behind it.

        Parameters
        ----------
        path : str or path
            The file, which ``load_state_dict(np.load(path))`` reads: of this class with any number
            of ranks, and of the plain optimizer.

        Raises
        ------
        OSError
            On all ranks, if rank 0 cannot write it.

        Examples
        --------
        >>> import numpy as np, fastopt, os, tempfile
        >>> from fastopt.distributed import DistributedOptimizer
        >>> opt = DistributedOptimizer(fastopt.Adam, {"W": np.ones(2)})
        >>> path = os.path.join(tempfile.mkdtemp(), "state.npz")
        >>> opt.save(path)
        >>> with np.load(path) as state:
        ...     fastopt.Adam({"W": np.ones(2)}).load_state_dict(state)
        """
        entries = self._shards.entries()
        with together(self._comm):
            save(path, entries, self._comm, self._bucket_bytes)

    def load_state_dict(self, state_dict: Mapping[str, Any], *, convert: bool = False) -> None:
        """
        Take over the state of a plain optimizer, or of one on any number of ranks.

        Parameters
        ----------
        state_dict : mapping of str to array or number
            What `state_dict` returned, whole, on all ranks, or ``np.load`` of what `save` wrote:
            of that, one array at a time is in memory.
        convert : bool, default False
            As for `fastopt.Optimizer.load_state_dict`.

        Raises
        ------
        TypeError, ValueError
            On all ranks, as `fastopt.Optimizer.load_state_dict`. Nothing is changed then.

        Examples
        --------
        >>> import numpy as np, fastopt
        >>> from fastopt.distributed import DistributedOptimizer
        >>> saved = fastopt.SGD(np.ones(3), momentum=0.9).state_dict()
        >>> opt = DistributedOptimizer(fastopt.SGD, np.ones(3))
        >>> opt.load_state_dict(saved)
        >>> opt.param_groups[0]["momentum"]
        0.9
        """
        before = self._optimizer.state_dict()
        try:
            with together(self._comm):
                if self._is_sharded:
                    caller = f"{self._name}.load_state_dict"
                    given = self._shards.part(caller, state_dict, convert)
                    self._optimizer.load_state_dict(given)
                else:
                    self._optimizer.load_state_dict(state_dict, convert=convert)
        except Exception:
            self._optimizer.load_state_dict(before)
            raise

    @property
    def _shards(self) -> Shards:
        return Shards(
            self._comm,
            self._optimizer,
            self._arrays,
            self._pieces,
            self._divisible,
            self._is_sharded,
        )
