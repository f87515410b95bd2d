"""A model without seams, as a graph: what each operation costs, and a module for each stage.

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
does any of these is not traced into, it is called as a whole, as torch.nn's are; and so is one that
asks whether it is in training. If that is the model itself it is refused.
"""

from collections.abc import Callable, Iterator, Sequence
from math import inf
from typing import Any

import torch
from torch import Tensor, fx, nn

from dist_lab.errors import UserError
from dist_lab.parallel.pipeline.partition import (
    BRING_STAGES,
    as_user_error,
    elements,
    meta_copy,
    on_meta,
    to_meta,
)
from dist_lab.torch_private import storage_key, tree_leaves, tree_map


def trace(model: nn.Module, example: Any) -> fx.GraphModule:
    """Its forward as a graph of one input. Modules and parameters are the model's own.

    Further arguments of the forward keep their defaults. See [Note: what tracing would get wrong].

    Args:
        example: an input, of which only shape and dtype are of interest: model and graph, run on
            the meta device, must agree in what they put out.

    Raises:
        UserError: it cannot be traced, or not run on the meta device.
    """
    name = type(model).__name__
    if "training" in type(model).forward.__code__.co_names:
        raise UserError(
            f"{name} cannot be traced for a cut (its forward asks whether it is in training); "
            + BRING_STAGES
        )
    held, tracer = set(vars(model)), _Tracer()
    with as_user_error(f"{name} cannot be traced for a cut"), torch.random.fork_rng(devices=[]):
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
    with as_user_error(f"{name} cannot be run without values, to see what it costs"), on_meta():
        x = to_meta(example)
        whole, its = (_about(meta_copy(m)(x)) for m in (model, traced))
    with as_user_error(f"{name} cannot be traced for a cut"):
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

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        replaced = "forward" in vars(m)  # by what runs it in another way: recomputation
        asks = "training" in getattr(m.forward, "__code__", type(m).forward.__code__).co_names
        return replaced or asks or super().is_leaf_module(m, module_qualified_name)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        return root_fn, [self.root, self.create_proxy("placeholder", "input", (), {})]

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, dict) and type(a) is not dict and all(isinstance(key, str) for key in a):
            # Or it would become a plain dict: of a library's own make, such as a ModelOutput.
            return self.create_node("call_function", type(a), (), self.create_arg({**a}))
        return super().create_arg(a)

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
    traced: fx.GraphModule, example: Any
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
    with on_meta() as operations, as_user_error(f"{name} cannot be run without values"):
        run = _Run(twin, operations)
        run.run(to_meta(example))
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
        self.state = {storage_key(t) for t in (*module.parameters(), *module.buffers())}

    def run_node(self, n: fx.Node) -> Any:
        if n.op in ("placeholder", "get_attr", "output"):
            result = super().run_node(n)
            if n.op == "placeholder":
                self.touched |= {storage_key(x): [-1] for x in _tensors(result)}
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
        self.costs.append(float(self.operations() - began + elements(result)))
        changed = [t for t, v in zip(reads, versions, strict=True) if t._version != v]
        if any(t is buffer for t in changed for buffer in buffers):
            changed += buffers  # of a BatchNorm only the count tells, on the meta device
        self.changed |= {storage_key(t): at for t in changed}
        for tensor in (*reads, *_tensors(result)):
            self.touched.setdefault(storage_key(tensor), []).append(at)
        return result

    def together(self) -> Iterator[tuple[int, int]]:
        """(first, last) of nodes that must be in one stage."""
        for memory, change in self.changed.items():
            touched = self.touched[memory]
            yield touched[0], touched[-1] if memory in self.state else change


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


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
