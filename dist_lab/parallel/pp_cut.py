"""Where a pipeline cuts a model: pieces in forward order, what each costs, and the best cut.

    a model with `stages`    pieces_by_seams -> names; seam_costs of their modules; cut
    any other                trace -> a graph; node_costs; cut; split -> one GraphModule a stage

A pipeline runs at the speed of its slowest stage, so `cut` makes that one as fast as can be; then
it carries as little as it can from stage to stage, then it fills the stages evenly. Costs are
found on the meta device, where a model runs without values, in no time and in no memory.

[Note: where a graph may not be cut]
A stage is a process: what crosses a cut is a tensor that is sent, and so a copy. Whole model and
stages are equal, to the last bit and in their gradients, as long as nobody can tell a copy:
* What is not a tensor (a size, a tuple that is not unpacked yet) cannot be sent. No cut between
  where it is made and where it is last used.
* What is changed in place would be changed in one copy only. No cut between the first value in some
  memory, views included, and the last change of that memory.
* A buffer that a forward changes, such as the statistics of a BatchNorm that is called twice, would
  be another on each stage. All that touch it stay together.
Parameters are no values: each stage that uses one holds it, under its own name. A tied one that is
in two stages has a gradient in each, and the caller adds them up, the last stage's first; if one of
them uses it more than once, that is another order than the whole model's, and rounds otherwise.

[Note: what tracing would get wrong]
A trace records what is done to the input, once. A decision that depends on it cannot be traced; and
three things would be lost without a word: that gradients are off (`torch.no_grad()`), that autocast
is on, and chance: a number drawn while tracing would be drawn for good. The innermost module that
does any of these is not traced into, it is called as a whole, as torch.nn's are. If that is the
model itself it is refused. `self.training` is read while tracing: set the mode before.
"""

import copy
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from itertools import accumulate, pairwise
from math import inf, isinf, lcm
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from dist_lab.errors import UserError

# --- the cut --------------------------------------------------------------------------------------


def cut(costs: Sequence[float], stages: int, carried: Sequence[float] = ()) -> list[int]:
    """Where each stage begins, when pieces are put together in their order.

    Of all cuts into stages that are not empty: one whose slowest stage costs least; of those one
    that carries least; of those one that is filled most evenly (the least sum of squares); of those
    the one whose stages begin first. Sums are exact, in floats too.

    >>> cut([1, 1, 4, 1, 1], stages=3)
    [0, 2, 3]
    >>> cut([2, 2, 2], stages=2), cut([2, 2, 2], stages=2, carried=[0, 9, 5])
    ([0, 1], [0, 2])

    Args:
        costs: of each piece; none is negative.
        carried: what crosses a cut just before each piece; inf: never cut there. The first is of no
            account.

    Raises:
        UserError: there are more stages than pieces that may be parted.
    """
    places = [i for i in range(len(costs)) if i == 0 or not carried or not isinf(carried[i])]
    if not 1 <= stages <= len(places):
        what = f"{len(places)} pieces" if len(places) == len(costs) else (
            f"{len(costs)} pieces, which may be cut in {len(places)} parts"
        )  # fmt: skip
        raise UserError(
            f"{stages} stages of a model of {what}: none may be empty; ask for "
            f"{len(places)} stages at most (--mesh pp, --chunks), or give a deeper model"
        )
    before = [0, *accumulate(_whole(costs))]  # before[i]: the cost of all pieces before i
    edges = [before[i] for i in places] + [before[-1]]
    crossing = _whole([carried[i] if carried and i else 0 for i in places])
    slowest = _slowest(edges, stages)
    return [places[i] for i in _lightest(edges, crossing, stages, slowest)]


def _whole(numbers: Sequence[float]) -> list[int]:
    """In a unit in which they are whole, so that sums do not depend on their order.

    >>> _whole([0.5, 2, 0.25])
    [2, 8, 1]
    """
    exact = [Fraction(n) for n in numbers]
    unit = lcm(*(n.denominator for n in exact))
    return [int(n * unit) for n in exact]


def _slowest(edges: Sequence[int], stages: int) -> int:
    """The least cost of the slowest stage, by bisection.

    A bound can be kept if parts filled as far as it allows are few enough: cutting further makes no
    part slower.
    """
    parts = len(edges) - 1
    low, high = max(b - a for a, b in pairwise(edges)), edges[-1]
    while low < high:
        bound = (low + high) // 2
        at = filled = 0
        while at < parts and filled <= stages:
            at, filled = bisect_right(edges, edges[at] + bound) - 1, filled + 1
        low, high = (low, bound) if filled <= stages else (bound + 1, high)
    return low


def _lightest(edges: Sequence[int], crossing: Sequence[int], stages: int, bound: int) -> list[int]:
    """Among the cuts that keep the bound. best[i]: (carried, squares, next start) of parts i ..."""
    parts = len(edges) - 1
    squares = [(edges[-1] - edges[i]) ** 2 for i in range(parts)]
    best = {i: (0, squares[i], parts) for i in range(parts) if edges[-1] - edges[i] <= bound}
    tables = [best]
    for left in range(2, stages + 1):
        fewer, best = best, {}
        for i in range(stages - left, parts - left + 1):
            options = []
            for j in range(i + 1, parts):
                cost = edges[j] - edges[i]
                if cost > bound:
                    break
                if j in fewer:
                    sent, even, _ = fewer[j]
                    options.append((crossing[j] + sent, cost**2 + even, j))
            if options:
                best[i] = min(options)
        tables.append(best)
    starts = [0]
    for best in tables[:0:-1]:
        starts.append(best[starts[-1]][2])
    return starts


# --- a model that names its stages ----------------------------------------------------------------


def seams(model: nn.Module) -> tuple[str, ...] | None:
    """Its `stages`, globs on module names in forward order; of a plain nn.Sequential, its modules.
    None if it has none, or modules there that happen to be called so.
    """
    globs = ("*",) if type(model) is nn.Sequential else getattr(model, "stages", None)
    if not globs or not isinstance(globs, list | tuple):
        return None
    return tuple(globs) if all(isinstance(glob, str) for glob in globs) else None


def pieces_by_seams(model: nn.Module) -> list[list[str]]:
    """The names of modules that stay together, in forward order.

    A block, which is what a glob with a `*` matches, is one piece. What comes before the first
    block joins it, and what comes after a block joins that one: a head or a norm alone is no stage.
    Without any `*` each module is a piece.

    Raises:
        UserError: no `stages`, a glob that matches nothing, a module named with one around it, or a
            parameter that is in none of them: then they would not be the whole forward.
    """
    globs = seams(model)
    if globs is None:
        raise UserError(f"{type(model).__name__} has no `stages`: {_BRING_STAGES}")
    modules = {name: module for name, module in model.named_modules() if name}
    is_block: dict[str, bool] = {}
    for glob in globs:
        pattern = re.compile(re.escape(glob).replace(r"\*", r"[^.]+"))
        matched = [name for name in modules if pattern.fullmatch(name)]
        if not matched:
            few = ", ".join(list(modules)[:12]) + (", ..." if len(modules) > 12 else "")
            raise UserError(f"{glob} in `stages` matches no module; there are {few}")
        for name in matched:
            is_block.setdefault(name, "*" in glob)
    for name in is_block:
        around = next((other for other in is_block if name.startswith(f"{other}.")), None)
        if around:
            raise UserError(f"`stages` names {name}, and {around} around it; name one of them")
    held = {p for name in is_block for p in modules[name].parameters()}
    for name, parameter in model.named_parameters():
        if parameter not in held:
            raise UserError(
                f"{name} is in no module that `stages` names, which run in turn must be the whole "
                "forward; add the module that holds it"
            )
    blocks = sum(is_block.values())
    pieces: list[list[str]] = [[]]
    seen = 0
    for name, block in is_block.items():
        seen += block
        if pieces[0] and ((block and seen > 1) or not blocks):
            pieces.append([])
        pieces[-1].append(name)
    return pieces


def seam_costs(modules: Sequence[Sequence[nn.Module]], example: Tensor | None) -> list[float]:
    """Of each piece: floating-point operations and elements of what its modules put out.

    Args:
        modules: of each piece, on the meta device; run in turn they are the forward.
        example: what the first reads, on the meta device; None: it is not known, and a piece costs
            as many as it has parameters, and 1.

    Raises:
        UserError: they cannot be run in turn on it.
    """
    if example is None:
        return [1.0 + sum(p.numel() for m in piece for p in m.parameters()) for piece in modules]
    costs, x = [], example
    with _on_meta() as operations, _refused("the modules in `stages`, run in turn, fail"):
        for piece in modules:
            began, put_out = operations(), 0
            for module in piece:
                x = module(x)
                put_out += _elements(x)
            costs.append(float(operations() - began + put_out))
    return costs


# --- the meta device ------------------------------------------------------------------------------


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy of it without values. None are copied on the way; what was tied is tied."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers, vars(module)):
            for tensor in held.values():
                if isinstance(tensor, Tensor) and id(tensor) not in memo:
                    empty = torch.empty_like(tensor, device="meta", requires_grad=False)
                    if isinstance(tensor, nn.Parameter):
                        empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
                    memo[id(tensor)] = empty
    return copy.deepcopy(model, memo)


@contextmanager
def _on_meta() -> Iterator[Callable[[], int]]:
    """Gives what tells how many operations there were so far."""
    with torch.no_grad(), torch.device("meta"), FlopCounterMode(display=False) as counter:
        yield counter.get_total_flops


@contextmanager
def _refused(what: str) -> Iterator[None]:
    """Whatever goes wrong inside is a refusal in one line."""
    try:
        yield
    except Exception as error:
        why = next((line for line in str(error).splitlines() if line), type(error).__name__)
        raise UserError(f"{what} ({why.rstrip('.')}); {_BRING_STAGES}") from None


_BRING_STAGES = (
    "give the model `stages`, globs on names of modules that run in turn are its forward: "
    'stages = ("embed", "layers.*", "head")'
)


def _elements(value: Any) -> int:
    return sum(leaf.numel() for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


# --- any other model: its graph -------------------------------------------------------------------


def trace(model: nn.Module, example: Tensor) -> fx.GraphModule:
    """Its forward as a graph of one input. Modules and parameters are the model's own.

    Further arguments of the forward keep their defaults. See [Note: what tracing would get wrong].

    Args:
        example: an input, of which only shape and dtype are of interest: model and graph, run on
            the meta device, must agree in what they put out.

    Raises:
        UserError: it cannot be traced, or not run on the meta device.
    """
    name = type(model).__name__
    held, tracer = set(vars(model)), _Tracer()
    with _refused(f"{name} cannot be traced for a cut"), torch.random.fork_rng(devices=[]):
        chance = torch.get_rng_state()
        try:
            graph = tracer.trace(model)
            for node in list(graph.nodes):
                if node.op == "get_attr" and not node.users:
                    graph.erase_node(node)
            traced = _module(model, graph, name)
        finally:
            for new in set(vars(model)) - held:  # constants of the trace
                delattr(model, new)
        if not torch.equal(chance, torch.get_rng_state()):
            raise ValueError("it draws random numbers that do not depend on its input")
    with _refused(f"{name} cannot be run without values, to see what it costs"), _on_meta():
        x = example.to("meta")
        whole, its = (_about(meta_copy(m)(x)) for m in (model, traced))
    with _refused(f"{name} cannot be traced for a cut"):
        if whole != its:
            raise ValueError("its trace puts out something else than it does")
    return traced


def _about(value: Any) -> Any:
    return tree_map(lambda v: (v.shape, v.dtype) if isinstance(v, Tensor) else v, value)


class _Tracer(fx.Tracer):
    """Of a model that reads one tensor; see [Note: what tracing would get wrong]."""

    def __init__(self) -> None:
        super().__init__()
        self.proxy_buffer_attributes = True  # or what is computed from a buffer is computed once
        self.modes = _modes()

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        return root_fn, [self.root, self.create_proxy("placeholder", "input", (), {})]

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _modes() != self.modes:
            raise ValueError("it turns gradients or autocast on or off")
        return super().create_node(*args, **kwargs)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        within, chance = self.module_stack.copy(), torch.get_rng_state()
        before = set(self.graph.nodes)
        if self.is_leaf_module(m, self.path_of_module(m)):
            return super().call_module(m, forward, args, kwargs)
        try:
            result = super().call_module(m, forward, args, kwargs)
            if torch.equal(chance, torch.get_rng_state()):
                return result
        except Exception:
            self.module_stack = within
        torch.set_rng_state(chance)
        for node in reversed(list(self.graph.nodes)):
            if node not in before and node.op != "get_attr":  # which the tracer may give out again
                self.graph.erase_node(node)
        return self.create_proxy("call_module", self.path_of_module(m), args, kwargs)


def _modes() -> tuple[bool, bool]:
    return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")


def _module(root: nn.Module, graph: fx.Graph, name: str) -> fx.GraphModule:
    """What of the root the graph uses, under its names, and saved only if the root saves it."""
    made, saved = fx.GraphModule(root, graph, name), root.state_dict().keys()
    for node in graph.find_nodes(op="get_attr"):
        owner, _, attribute = str(node.target).rpartition(".")
        if node.target not in saved:  # GraphModule makes every tensor a buffer that is saved
            made.get_submodule(owner)._non_persistent_buffers_set.add(attribute)
    return made


def node_costs(
    traced: fx.GraphModule, example: Tensor
) -> tuple[list[fx.Node], list[float], list[float]]:
    """What there is to cut: the nodes that compute, in order.

    Returns:
        the nodes; what each costs, in operations and elements put out; and how many elements would
        cross a cut before it, each value once: inf where it may not be cut, see [Note: where a
        graph may not be cut].
    """
    nodes, spans = _spans(traced)
    twin = meta_copy(traced)
    assert isinstance(twin, fx.GraphModule)
    name = type(traced).__name__
    with _on_meta() as operations, _refused(f"{name} cannot be run without values"):
        run = _Run(twin, operations)
        run.run(example.to("meta"))
    results = {mine: run.env[its] for mine, its in zip(_all(traced), _all(twin), strict=True)}
    carried = [0.0] * len(nodes)
    for value, (made, used) in spans.items():
        sent = results[value].numel() if isinstance(results[value], Tensor) else inf
        for i in range(made + 1, used + 1):
            carried[i] += sent
    for first, last in run.together():
        for i in range(first + 1, last + 1):
            carried[i] = inf
    return nodes, run.costs, carried


def _all(traced: fx.GraphModule) -> Iterator[fx.Node]:
    return (node for node in traced.graph.nodes if node.op != "output")


def _spans(traced: fx.GraphModule) -> tuple[list[fx.Node], dict[fx.Node, tuple[int, int]]]:
    """The computing nodes, and of each value where it is made (the input at -1) and where the last
    cut is that it crosses, if any.
    """
    nodes = [node for node in _all(traced) if node.op not in ("placeholder", "get_attr")]
    index = {node: i for i, node in enumerate(nodes)}
    values = [node for node in _all(traced) if node.op != "get_attr"]
    end = len(nodes) - 1  # what is put out crosses every cut behind it
    spans = {}
    for value in values:
        made = index.get(value, -1)
        spans[value] = made, max((index.get(user, end) for user in value.users), default=made)
    return nodes, spans


class _Run(fx.Interpreter):
    """Costs of the computing nodes, and what memory each of them touches and changes."""

    def __init__(self, module: fx.GraphModule, operations: Callable[[], int]):
        super().__init__(module, garbage_collect_values=False)  # so memory keeps its identity
        self.operations = operations
        self.costs: list[float] = []
        self.touched: dict[int, list[int]] = {}  # memory -> nodes
        self.changed: dict[int, int] = {}  # memory -> the last node that does
        self.state = {_memory(t) for t in (*module.parameters(), *module.buffers())}

    def run_node(self, n: fx.Node) -> Any:
        if n.op in ("placeholder", "get_attr", "output"):
            result = super().run_node(n)
            if n.op == "placeholder":
                self.touched[_memory(result)] = [-1]
            return result
        reads = _tensors(self.fetch_args_kwargs_from_env(n))
        buffers: list[Tensor] = []
        if n.op == "call_module":
            own = self.submodules[str(n.target)]
            buffers = list(own.buffers())
            reads += [*own.parameters(), *buffers]
        versions, began = [t._version for t in reads], self.operations()
        result = super().run_node(n)
        at = len(self.costs)
        self.costs.append(float(self.operations() - began + _elements(result)))
        changed = [t for t, v in zip(reads, versions, strict=True) if t._version != v]
        if any(t is buffer for t in changed for buffer in buffers):
            changed += buffers  # of a BatchNorm only the count tells, on the meta device
        self.changed |= {_memory(t): at for t in changed}
        for tensor in (*reads, *_tensors(result)):
            self.touched.setdefault(_memory(tensor), []).append(at)
        return result

    def together(self) -> Iterator[tuple[int, int]]:
        """(first, last) of nodes that must be in one stage."""
        for memory, change in self.changed.items():
            touched = self.touched[memory]
            yield touched[0], touched[-1] if memory in self.state else change


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def split(traced: fx.GraphModule, starts: Sequence[int]) -> list[fx.GraphModule]:
    """One module a stage. Modules and parameters are those of `traced`, under their names.

    A stage takes what crosses the cut before it, each value an argument, and returns a tuple of
    what crosses the next, in the order in which the model makes them; a value that a stage has no
    use for passes through. The first takes the model's input, the last returns the model's output.

    Args:
        starts: among the computing nodes, as `cut` chooses them by `node_costs`; anywhere else the
            stages may not be equal to the whole.
    """
    nodes, spans = _spans(traced)
    ends = [*starts[1:], len(nodes)]
    output = next(iter(reversed(traced.graph.nodes)))
    stages = []
    for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
        graph = fx.Graph()
        env: dict[fx.Node, fx.Node] = {}
        for value in _crossing(spans, start):
            env[value] = graph.placeholder(value.name)
        for node in nodes[start:end]:
            env[node] = _put(node, graph, env)
        if end == len(nodes):
            _put(output, graph, env)
        else:
            graph.output(tuple(env[value] for value in _crossing(spans, end)))
        stages.append(_module(traced, graph, f"{type(traced).__name__}Stage{number}"))
    return stages


def _put(node: fx.Node, graph: fx.Graph, env: dict[fx.Node, fx.Node]) -> fx.Node:
    for read in node.all_input_nodes:
        if read not in env:  # only a parameter or a buffer: each stage that uses it holds it
            env[read] = graph.node_copy(read)
    return graph.node_copy(node, env.__getitem__)


def _crossing(spans: dict[fx.Node, tuple[int, int]], start: int) -> list[fx.Node]:
    """In the order in which they are made."""
    if start == 0:
        return [value for value, (made, _) in spans.items() if made < 0]
    return [value for value, (made, used) in spans.items() if made < start <= used]
