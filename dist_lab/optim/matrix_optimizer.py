"""The base class of optimizers that update whole matrices. See README.md.

    class Mine(MatrixOptimizer):
        def update_matrix(self, gradient, state, options): ...     # (rows, columns) -> update
        def state_bytes(self, rows, columns, itemsize): ...        # for the table of memory

In one process it is an ordinary optimizer of torch. `job.optimizer` calls `distribute`, and from
then on every matrix is updated on one rank only: see owners.py. What a step does is the same:

    a matrix            W -= lr (update + weight_decay W)      the update of the class
    everything else     AdamW

A parameter's group says under "matrices" how it is to be read: see matrices.py. Without that key a
2-D tensor is one matrix.
"""

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, final

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from dist_lab.comm import ops
from dist_lab.comm.agree import together
from dist_lab.errors import UserError
from dist_lab.layout.gather import local_part
from dist_lab.layout.layout import Layout
from dist_lab.mesh.mesh import Axis, Mesh
from dist_lab.optim.matrices import How, check
from dist_lab.optim.placement import Part, Placement, place

State = MutableMapping[str, Tensor]
Options = Mapping[str, Any]
Total = Callable[[Sequence[Tensor]], list[Tensor]]  # sums over the ranks that split a matrix


@dataclass(frozen=True)
class Matrix:
    """A matrix to update, whole or this rank's part of it.

    Attributes:
        gradient: (rows, columns), contiguous; of a split matrix this rank's rows or columns.
        state: what the optimizer keeps of this matrix; empty before the first step.
        options: the parameter's group.
        shape: rows and columns of the whole matrix.
        split: 0, ranks hold rows of it; 1, columns; None: this rank has all of it.
    """

    gradient: Tensor
    state: State
    options: Options
    shape: tuple[int, int]
    split: int | None = None


class MatrixOptimizer(torch.optim.Optimizer):
    """Steps matrices by `update_matrix`, and everything else by AdamW.

    Args:
        params: parameters or groups of them. A group's "matrices" says how to read them.
        lr, weight_decay: of matrices and of AdamW; each group may have its own.
        betas, eps: of AdamW.
        options: the defaults of options that only your class has; each group may have its own.
    """

    # Whether `update_batch` can work on parts of a matrix, as it needs only sums of products.
    # If not, the ranks of tp send the parts to an owner as well.
    sums_products = False
    _placement: Placement | None = None

    def __init__(
        self, params: Any, lr: float = 1e-3, *, weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        options: Options = MappingProxyType({}),
    ) -> None:  # fmt: skip
        defaults = {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps}
        super().__init__(params, defaults | {"matrices": None} | dict(options))

    # --- what a class of your own has -------------------------------------------------------------

    def update_matrix(self, gradient: Tensor, state: State, options: Options) -> Tensor:
        """Return the update of a whole matrix, of the gradient's shape; must not change it."""
        raise TypeError(f"{type(self).__name__} has no update_matrix(gradient, state, options)")

    def state_bytes(self, rows: int, columns: int, itemsize: int) -> int:
        """Return the bytes of state that `update_matrix` keeps of a matrix."""
        raise TypeError(f"{type(self).__name__} has no state_bytes(rows, columns, itemsize)")

    def update_batch(self, batch: Sequence[Matrix], total: Total) -> list[Tensor]:
        """Return the updates of several matrices. Override it if you set `sums_products`."""
        return [self.update_matrix(m.gradient, m.state, m.options) for m in batch]

    # --- a step -----------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step. Collective, if `job.optimizer` has built this optimizer."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        placement = self._placement = self._placement or self._place_alone()
        matrices = {parameter: name for name, parameter in placement.parameters.items()}
        for group in self.param_groups:
            self._step_adamw(group, [p for p in group["params"] if p not in matrices])
        groups = {
            matrices[p]: group
            for group in self.param_groups
            for p in group["params"]
            if p in matrices
        }
        errors: list[Exception] = []
        with placement.mesh.comm.label("optimizer") if placement.mesh else nullcontext():
            for name, update in self._updates(placement, groups, errors):
                lr, decay = groups[name]["lr"], groups[name]["weight_decay"]
                values = local_part(placement.parameters[name])
                values.mul_(1 - lr * decay).add_(update.view_as(values), alpha=-lr)
        self._raise_everywhere(errors, placement.mesh)
        return loss

    def _updates(
        self, placement: Placement, groups: Mapping[str, Options], errors: list[Exception]
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, this rank's elements of the update) for each parameter of matrices.

        An error of this rank's updates is appended to `errors`: other ranks wait for updates, so
        they get NaN. The weights are lost then.
        """
        gradients = {
            name: None if p.grad is None else local_part(p.grad)
            for name, p in placement.parameters.items()
        }
        for exchange, products in placement.exchanges:

            def update(
                whole: Mapping[str, Tensor], products: Axis | None = products
            ) -> dict[str, Tensor]:
                updates = {name: torch.empty_like(gradient) for name, gradient in whole.items()}
                batch: list[Matrix] = []
                targets: list[Tensor] = []
                for name, gradient in whole.items():
                    parts, state = placement.parts[name], self.state[placement.parameters[name]]
                    for i, part in enumerate(parts):
                        own_state = state if len(parts) == 1 else StateOfOne(state, f"{i}.")
                        matrix = gradient[part.box].reshape(part.own_shape).contiguous()
                        batch.append(
                            Matrix(matrix, own_state, groups[name], part.shape, part.split)
                        )
                        targets.append(updates[name][part.box])
                try:
                    results = self.update_batch(batch, _Total(products))
                    for target, result in zip(targets, results, strict=True):
                        target.copy_(result.view(target.shape))
                except Exception as error:
                    errors.append(error)
                    for target in targets:
                        target.fill_(torch.nan)
                return updates

            yield from exchange.updates(gradients, update)

    def _raise_everywhere(self, errors: Sequence[Exception], mesh: Mesh | None) -> None:
        """If updates failed on a rank, raise on every rank. Collective: one number per step."""
        if mesh is None or mesh.size == 1:
            for error in errors:
                raise error
            return
        with mesh.comm.label("check"):
            failed = torch.tensor([float(bool(errors))], device=mesh.device)
            if not ops.all_reduce(failed, mesh.world, "max"):
                return
            with together(mesh.world):
                for error in errors:
                    line = (str(error).splitlines() or [""])[0]
                    raise UserError(
                        f"the update of a matrix failed on rank {mesh.rank}, which owns it: "
                        f"{type(error).__name__}: {line}; weights are NaN now, so mend "
                        f"{type(self).__name__} and start from a checkpoint"
                    ) from error

    def _step_adamw(self, group: Options, parameters: Sequence[Tensor]) -> None:
        """AdamW, as torch's own. Unfused: its bits do not depend on how a tensor is split."""
        trained = [(p, local_part(p), local_part(p.grad)) for p in parameters if p.grad is not None]
        for p, values, _ in trained:
            if not self.state[p]:
                moments = {key: torch.zeros_like(values) for key in ("exp_avg", "exp_avg_sq")}
                self.state[p] |= {"step": torch.tensor(0.0), **moments}
        states = [self.state[p] for p, _, _ in trained]
        beta1, beta2 = group["betas"]
        adamw(
            [values for _, values, _ in trained], [gradient for _, _, gradient in trained],
            [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states], [],
            [state["step"] for state in states], foreach=False, amsgrad=False, beta1=beta1,
            beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
            maximize=False,
        )  # fmt: skip

    # --- where the matrices are -------------------------------------------------------------------

    def distribute(
        self, parameters: Mapping[str, Tensor], layouts: Mapping[str, Layout],
        kinds: Mapping[str, How], mesh: Mesh,
    ) -> None:  # fmt: skip
        """Share the work among the ranks of a mesh: see `place`. Collective."""
        self._placement = place(parameters, layouts, kinds, mesh, sums_products=self.sums_products)

    def _place_alone(self) -> Placement:
        """In one process parameters have no names, and this rank owns every matrix."""
        parameters: dict[str, Tensor] = {}
        kinds: dict[str, How] = {}
        for group in self.param_groups:
            for p in group["params"]:
                name = f"parameter {len(parameters)}"
                parameters[name], kinds[name] = p, check(name, p.shape, group["matrices"])
        layouts = {name: Layout(p.shape, p.dtype) for name, p in parameters.items()}
        return place(parameters, layouts, kinds, None, sums_products=self.sums_products)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if self._placement is not None and self._placement.mesh is not None:
            raise UserError(
                "this optimizer has shared out its matrices; build a new one: job.optimizer(...)"
            )
        super().add_param_group(param_group)
        self._placement = None

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the matrices that this rank owns, and of its other parameters."""
        return super().state_dict() | {"saved_on": self._position()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what this rank has saved, on the same mesh. Collective, as a step is.

        Raises:
            UserError: one rank has the state of another or of another mesh; raised on every rank.
        """
        mesh = self._placement.mesh if self._placement else None
        own, saved_on = self._position(), state_dict.get("saved_on", "in another optimizer")
        with together(mesh.world) if mesh else nullcontext():
            if saved_on != own:
                raise UserError(
                    f"the optimizer's state was saved {saved_on} and is loaded {own}, which owns "
                    "other matrices; save and load one state_dict per rank, on the same mesh"
                )
        super().load_state_dict(state_dict)
        # torch casts all but "step" to the parameter's dtype. Packed matrices have a step each, and
        # bfloat16 cannot count beyond 256.
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for key, parameter in zip(keys, parameters, strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                if name.endswith(".step"):
                    self.state[parameter][name] = value.clone()

    def matrix_of(self, parameter: Tensor, key: str) -> Part | None:
        """The matrix that a key of a parameter's state is of; None if it is AdamW's."""
        placement = self._placement or self._place_alone()
        for name, own in placement.parameters.items():
            if own is parameter:
                parts = placement.parts[name]
                return parts[int(key.partition(".")[0]) if len(parts) > 1 else 0]
        return None

    def keeps_state_of(self, parameter: Tensor) -> bool:
        """Whether this rank keeps the state of a parameter: not if another owns its matrices."""
        placement = self._placement or self._place_alone()
        names = [name for name, own in placement.parameters.items() if own is parameter]
        return all(placement.is_owned(name) for name in names)

    def apart(self, parameter: Tensor) -> tuple[Layout, tuple[str, ...]]:
        """How a parameter of matrices lies over the axes without owners, and these axes."""
        placement = self._placement or self._place_alone()
        names = [name for name, own in placement.parameters.items() if own is parameter]
        return placement.apart[names[0]]

    def _position(self) -> str:
        mesh = self._placement.mesh if self._placement else None
        if mesh is None or mesh.size == 1:
            return "in one process"
        return f"on rank {mesh.rank} of {dict(mesh.axes)}"

    def bytes_by_formula(self) -> int:
        """The bytes of state on this rank, as computed from the layouts."""
        placement = self._placement or self._place_alone()
        matrices = set(placement.parameters.values())
        total = 0
        for group in self.param_groups:
            for p in group["params"]:
                if p.requires_grad and p not in matrices:
                    total += 2 * local_part(p).nbytes + 4  # two moments, and a step count
        for exchange, _ in placement.exchanges:
            for name in exchange.owned:
                itemsize = placement.parameters[name].dtype.itemsize
                shapes = [part.own_shape for part in placement.parts[name]]
                total += sum(self.state_bytes(*shape, itemsize) for shape in shapes)
        return total


@final
class StateOfOne(MutableMapping[str, Tensor]):
    """The state of one of a parameter's matrices, in the state of the parameter."""

    def __init__(self, state: MutableMapping[str, Tensor], prefix: str) -> None:
        self.state, self.prefix = state, prefix

    def __getitem__(self, key: str) -> Tensor:
        return self.state[self.prefix + key]

    def __setitem__(self, key: str, value: Tensor) -> None:
        self.state[self.prefix + key] = value

    def __delitem__(self, key: str) -> None:
        del self.state[self.prefix + key]

    def __iter__(self) -> Iterator[str]:
        n = len(self.prefix)
        return (key[n:] for key in self.state if key.startswith(self.prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)


@final
class _Total:
    """Sums tensors over the ranks that hold parts of the same matrices, in one all-reduce."""

    def __init__(self, axis: Axis | None) -> None:
        self.axis = axis

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        if self.axis is None or not tensors:
            return list(tensors)
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        sums = ops.all_reduce(flat, self.axis).split([tensor.numel() for tensor in tensors])
        return [part.view(t.shape) for part, t in zip(sums, tensors, strict=True)]
