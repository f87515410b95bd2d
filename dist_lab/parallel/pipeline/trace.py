"""Traces a model without `stages`: a graph, the cost of each node, and a module for each stage.

[Note: where a graph may not be split]
Each stage is a process, so a tensor that crosses a split point is sent, and becomes a copy. The
stages equal the whole model to the last bit, gradients included, if a copy makes no difference:
* A value that is not a tensor (a size, a tuple before it is unpacked) cannot be sent. There is no
  split between the node that produces it and the last node that uses it.
* An in-place change would reach one copy only. There is no split between the node that produces a
  tensor and the last node that changes its memory, directly or through a view.
* A buffer that a forward changes, such as the statistics of a BatchNorm that is called twice, would
  differ between stages. All nodes that use it stay in one stage.
Parameters are not sent: each stage that uses one holds it under its own name. A tied parameter in
two stages has a gradient in each, and the caller adds them, the last stage's first. If a stage uses
the parameter more than once, one process adds in a different order, and rounding differs.

[Note: what tracing would get wrong]
A trace records one pass of the input. A decision that depends on the input's values cannot be
traced. Three things would be lost silently: that gradients are off (`torch.no_grad()`), that
autocast is on, and randomness: a number drawn during tracing would become a constant. The innermost
module that does any of these is a leaf of the trace, as the modules of torch.nn are. So is a module
that reads `self.training`. A model that does so itself, outside its submodules, is refused.
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
    """The model's forward as a graph with one input. Modules and parameters are the model's own.

    Other arguments of the forward keep their defaults. See [Note: what tracing would get wrong].

    Args:
        example: an input; only its shape and dtype matter. On the meta device model and graph must
            return the same shapes for it.

    Raises:
        UserError: the model cannot be traced, or cannot be run on the meta device.
    """
    name = type(model).__name__
    if "training" in type(model).forward.__code__.co_names:
        raise UserError(
            f"{name} cannot be traced to split it (its forward reads self.training); "
            + BRING_STAGES
        )
    attributes, tracer = set(vars(model)), _Tracer()
    with as_user_error(f"{name} cannot be traced to split it"), torch.random.fork_rng(devices=[]):
        rng_state = torch.get_rng_state()
        try:
            graph = tracer.trace(model)
            for node in list(graph.nodes):
                if node.op == "get_attr" and not node.users:
                    graph.erase_node(node)
            traced = _module(model, graph, name)
        finally:
            for new in set(vars(model)) - attributes:  # constants of the trace
                delattr(model, new)
        if not torch.equal(rng_state, torch.get_rng_state()):
            raise ValueError("it draws random numbers that do not depend on its input")
    with as_user_error(f"{name} cannot be run on the meta device, to see what it costs"), on_meta():
        x = to_meta(example)
        of_model, of_trace = (_shapes(meta_copy(m)(x)) for m in (model, traced))
    with as_user_error(f"{name} cannot be traced to split it"):
        if of_model != of_trace:
            raise ValueError("its trace returns something else than the model")
    return traced


def _shapes(value: Any) -> Any:
    return tree_map(lambda v: (v.shape, v.dtype) if isinstance(v, Tensor) else v, value)


class _Tracer(fx.Tracer):
    """Traces a forward of one input; see [Note: what tracing would get wrong]."""

    def __init__(self) -> None:
        super().__init__()
        self.proxy_buffer_attributes = True  # else values computed from a buffer become constants
        self.modes = _modes()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        replaced = "forward" in vars(m)  # such as by activation checkpointing
        code = getattr(m.forward, "__code__", type(m).forward.__code__)
        return (
            replaced
            or "training" in code.co_names
            or super().is_leaf_module(m, module_qualified_name)
        )

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        return root_fn, [self.root, self.create_proxy("placeholder", "input", (), {})]

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, dict) and type(a) is not dict and all(isinstance(key, str) for key in a):
            # A library's own class, such as a ModelOutput, would become a plain dict.
            return self.create_node("call_function", type(a), (), self.create_arg({**a}))
        return super().create_arg(a)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _modes() != self.modes:
            raise ValueError("it turns gradients or autocast on or off")
        return super().create_node(*args, **kwargs)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        module_stack, rng_state = self.module_stack.copy(), torch.get_rng_state()
        before = set(self.graph.nodes)
        if self.is_leaf_module(m, self.path_of_module(m)):
            return super().call_module(m, forward, args, kwargs)
        try:
            result = super().call_module(m, forward, args, kwargs)
            if torch.equal(rng_state, torch.get_rng_state()):
                return result
        except Exception:
            self.module_stack = module_stack
        torch.set_rng_state(rng_state)
        for node in reversed(list(self.graph.nodes)):
            if node not in before and node.op != "get_attr":  # the tracer may reuse these
                self.graph.erase_node(node)
        return self.create_proxy("call_module", self.path_of_module(m), args, kwargs)


def _modes() -> tuple[bool, bool]:
    return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")


def _module(root: nn.Module, graph: fx.Graph, name: str) -> fx.GraphModule:
    """A GraphModule with the root's names, whose state_dict has only the root's tensors."""
    module, saved = fx.GraphModule(root, graph, name), root.state_dict().keys()
    for node in graph.find_nodes(op="get_attr"):
        owner, _, attribute = str(node.target).rpartition(".")
        if node.target not in saved:  # GraphModule makes every tensor a buffer that is saved
            module.get_submodule(owner)._non_persistent_buffers_set.add(attribute)
    return module


def node_costs(
    traced: fx.GraphModule, example: Any
) -> tuple[list[fx.Node], list[float], list[float]]:
    """The nodes that compute, in order, with their costs.

    Returns:
        the nodes; the cost of each, in operations plus output elements; and the elements to send
        if a stage begins at that node, each value once; inf: not allowed, see [Note: where a
        graph may not be split].
    """
    nodes, spans = _spans(traced)
    meta_traced = meta_copy(traced)
    assert isinstance(meta_traced, fx.GraphModule)
    name = type(traced).__name__
    with on_meta() as operations, as_user_error(f"{name} cannot be run on the meta device"):
        run = _CostRun(meta_traced, operations)
        run.run(to_meta(example))
    pairs = zip(_without_output(traced), _without_output(meta_traced), strict=True)
    results = {node: run.env[meta_node] for node, meta_node in pairs}
    carried = [0.0] * len(nodes)
    for value, (producer, last_use) in spans.items():
        sent = results[value].numel() if isinstance(results[value], Tensor) else inf
        for i in range(producer + 1, last_use + 1):
            carried[i] += sent
    for first, last in run.inseparable():
        for i in range(first + 1, last + 1):
            carried[i] = inf
    return nodes, run.costs, carried


def _without_output(traced: fx.GraphModule) -> Iterator[fx.Node]:
    return (node for node in traced.graph.nodes if node.op != "output")


def _spans(traced: fx.GraphModule) -> tuple[list[fx.Node], dict[fx.Node, tuple[int, int]]]:
    """The computing nodes; and value -> the index of its producer (-1: the input) and last user."""
    nodes = [n for n in _without_output(traced) if n.op not in ("placeholder", "get_attr")]
    index = {node: i for i, node in enumerate(nodes)}
    values = [node for node in _without_output(traced) if node.op != "get_attr"]
    end = len(nodes) - 1  # the model's outputs are carried to the last stage
    spans = {}
    for value in values:
        producer = index.get(value, -1)
        last_use = max((index.get(user, end) for user in value.users), default=producer)
        spans[value] = producer, last_use
    return nodes, spans


class _CostRun(fx.Interpreter):
    """Records the costs of the computing nodes, and which memory each of them uses and changes."""

    def __init__(self, module: fx.GraphModule, operations: Callable[[], int]):
        super().__init__(module, garbage_collect_values=False)  # so that storage keys stay unique
        self.operations = operations
        self.costs: list[float] = []
        self.users: dict[int, list[int]] = {}  # storage -> the nodes that use it
        self.changed: dict[int, int] = {}  # storage -> the last node that changes it
        self.state = {storage_key(t) for t in (*module.parameters(), *module.buffers())}

    def run_node(self, n: fx.Node) -> Any:
        if n.op in ("placeholder", "get_attr", "output"):
            result = super().run_node(n)
            if n.op == "placeholder":
                self.users |= {storage_key(x): [-1] for x in _tensors(result)}
            return result
        reads = _tensors(self.fetch_args_kwargs_from_env(n))
        buffers: list[Tensor] = []
        if n.op == "call_module":
            module = self.submodules[str(n.target)]
            buffers = list(module.buffers())
            reads += [*module.parameters(), *buffers]
        versions, operations_before = [t._version for t in reads], self.operations()
        result = super().run_node(n)
        index = len(self.costs)
        self.costs.append(float(self.operations() - operations_before + elements(result)))
        changed = [t for t, v in zip(reads, versions, strict=True) if t._version != v]
        if any(t is buffer for t in changed for buffer in buffers):
            changed += buffers  # on the meta device BatchNorm changes its counter only
        self.changed |= {storage_key(t): index for t in changed}
        for tensor in (*reads, *_tensors(result)):
            self.users.setdefault(storage_key(tensor), []).append(index)
        return result

    def inseparable(self) -> Iterator[tuple[int, int]]:
        """First and last of the nodes that must be in one stage."""
        for storage, last_change in self.changed.items():
            users = self.users[storage]
            yield users[0], users[-1] if storage in self.state else last_change


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def split(traced: fx.GraphModule, starts: Sequence[int]) -> list[fx.GraphModule]:
    """One module per stage. Modules and parameters are those of `traced`, under their names.

    The arguments of a stage are the values that are produced before it and used in it or later; it
    returns a tuple of those for the next stage, in the order in which the model produces them. A
    value that it does not use passes through. The first stage takes the model's input, the last
    returns the model's output.

    Args:
        starts: the first node of each stage, as `cut` chooses them by `node_costs`. Stages
            that begin elsewhere may differ from the whole model.
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
            env[node] = _copy_node(node, graph, env)
        if end == len(nodes):
            _copy_node(output, graph, env)
        else:
            graph.output(tuple(env[value] for value in _crossing(spans, end)))
        stages.append(_module(traced, graph, f"{type(traced).__name__}Stage{number}"))
    return stages


def _copy_node(node: fx.Node, graph: fx.Graph, env: dict[fx.Node, fx.Node]) -> fx.Node:
    for source in node.all_input_nodes:
        if source not in env:  # only a parameter or a buffer: each stage that uses it holds it
            env[source] = graph.node_copy(source)
    return graph.node_copy(node, env.__getitem__)


def _crossing(spans: dict[fx.Node, tuple[int, int]], start: int) -> list[fx.Node]:
    """The inputs of a stage that begins at node `start`, in the order in which they are made."""
    if start == 0:
        return [value for value, (producer, _) in spans.items() if producer < 0]
    return [v for v, (producer, last_use) in spans.items() if producer < start <= last_use]
