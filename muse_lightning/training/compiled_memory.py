"""What a compiled function keeps for its backward pass, found without compiling any of its kernels."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from torch.fx import GraphModule, Node
from torch.utils._python_dispatch import _disable_current_modes

_RMS_NORM = F.rms_norm
"""As the compiler sees it, whatever takes its place while memory is predicted."""
_PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.addmm.default}


@dataclass
class _Plan:
    """Of one function at one size.

    Attributes:
        kept: Bytes of tensors that the forward pass makes for the backward pass.
        inputs: Sizes and dtypes of inputs that it keeps.
        forward, backward: Bytes that are alive at most within a pass, besides its results.
        parameters: Names of those that the function uses of its module.
        outputs: Sizes and dtypes of results.
    """

    kept: list[int]
    inputs: set[tuple[torch.Size, torch.dtype]]
    forward: int
    backward: int
    parameters: list[str]
    outputs: list[tuple[torch.Size, torch.dtype]]


class AsCompiled:
    """Takes the memory that a function takes when torch.compile has compiled it: for tensors without content.

    torch.compile traces it, forward and backward, and its partitioner decides what is kept and what is computed again;
    then there is one kernel for what lies between products. Here that is done for its decisions alone.

    Args:
        function: a method of a module, of tensors, returning one or several; its module has the parameters.
        plans: shared by functions that are the same method of like modules.
    """

    def __init__(self, function: Callable[..., Any], plans: dict[Any, "_Plan"]) -> None:
        self._function, self._plans = function, plans

    def __call__(self, *args: Tensor) -> Any:
        """Results without content; what is kept lives until the backward pass."""
        module = self._function.__self__  # type: ignore[attr-defined]
        key = self._function.__name__, *((arg.shape, arg.dtype) for arg in args)
        if key not in self._plans:
            self._plans[key] = _plan(self._function, module, args)
        plan = self._plans[key]
        results = _Emulated.apply(plan, *args, *map(module.get_parameter, plan.parameters))
        return results[0] if len(results) == 1 else results


class _Emulated(torch.autograd.Function):
    """Makes what a plan says."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, *inputs: Tensor) -> tuple[Tensor, ...]:
        results = tuple(torch.empty(shape, dtype=dtype) for shape, dtype in plan.outputs)
        _bytes(plan.forward)
        kept = [tensor for tensor in inputs if (tensor.shape, tensor.dtype) in plan.inputs]
        ctx.save_for_backward(*kept, *map(_bytes, plan.kept))
        ctx.plan, ctx.inputs = plan, [(each.shape, each.dtype, each.requires_grad) for each in inputs]
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.saved_tensors  # noqa: B018 — a checkpoint computes again what it has dropped
        made = [torch.empty(shape, dtype=dtype) if wanted else None for shape, dtype, wanted in ctx.inputs]
        _bytes(ctx.plan.backward)
        return (None, *made)


def _bytes(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8)


def _plan(function: Callable[..., Any], module: nn.Module, args: Sequence[Tensor]) -> _Plan:
    """Trace a function and its backward pass, and look at what crosses from one to the other."""
    graphs: list[GraphModule] = []

    def record(graph: GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(
        fw_compiler=record,
        bw_compiler=record,
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
    parameters = dict(module.named_parameters())
    mode = next(arg.fake_mode for arg in args if isinstance(arg, FakeTensor))
    # torch.compile refuses to work inside of other modes, such as what counts memory; a checkpoint around it would
    # count what is kept here.
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
    with _disable_current_modes(), mode, torch.enable_grad(), _true_norms(), hooks:
        own = [arg.detach().requires_grad_(arg.requires_grad) for arg in args]
        results = torch.compile(_copy(function), backend=backend, fullgraph=True, dynamic=False)(*own)
        results = list(results) if isinstance(results, tuple) else [results]
        sums = sum(result.sum() for result in results)
        found = torch.autograd.grad(sums, list(parameters.values()), allow_unused=True)
    forward, backward = graphs
    crossing = _results(forward)[len(results) :]
    return _Plan(
        kept=list({_storage(node): _size(node) for node in crossing if node.op != "placeholder"}.values()),
        inputs={(node.meta["val"].shape, node.meta["val"].dtype) for node in crossing if node.op == "placeholder"},
        forward=_largest_at_once(forward),
        backward=_largest_at_once(backward),
        parameters=[name for name, grad in zip(parameters, found, strict=True) if grad is not None],
        outputs=[(result.shape, result.dtype) for result in results],
    )


def _copy(method: Callable[..., Any]) -> Callable[..., Any]:
    """The same with a code of its own, by which the compiler counts what it has compiled: of one method it would soon
    refuse another size, from the training too."""
    function: Any = method.__func__  # type: ignore[attr-defined]
    code = function.__code__.replace(co_name=f"{function.__name__}_predicted")
    copy = FunctionType(code, function.__globals__, closure=function.__closure__)
    copy.__kwdefaults__, copy.__defaults__ = function.__kwdefaults__, function.__defaults__
    return MethodType(copy, method.__self__)  # type: ignore[attr-defined]


@contextmanager
def _true_norms() -> Iterator[None]:
    before, F.rms_norm = F.rms_norm, _RMS_NORM
    try:
        yield
    finally:
        F.rms_norm = before


def _storage(node: Node) -> int:
    return node.meta["val"].untyped_storage()._cdata


def _size(node: Node) -> int:
    value = node.meta["val"]
    return value.numel() * value.element_size()


def _tensors(nodes: Iterable[Any]) -> list[Node]:
    return [node for node in nodes if isinstance(node, Node) and isinstance(node.meta.get("val"), Tensor)]


def _results(graph: GraphModule) -> list[Any]:
    (results,) = graph.graph.output_node().args
    assert isinstance(results, list | tuple)
    return list(results)


def _largest_at_once(graph: GraphModule) -> int:
    """Bytes between first and last use, at their most, of what products read and write: only that has a place in memory
    once the rest is fused. Inputs and results of the graph do not count."""
    nodes = list(graph.graph.nodes)
    outside = {_storage(node) for node in _tensors([*graph.graph.find_nodes(op="placeholder"), *_results(graph)])}
    products = [node for node in nodes if node.target in _PRODUCTS]
    placed = {_storage(node): _size(node) for each in products for node in _tensors([each, *each.args])}
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    reads: dict[Node, set[int]] = {}
    for index, node in enumerate(nodes):
        inputs = {storage for each in _tensors(node.all_input_nodes) for storage in reads[each]}
        last.update(dict.fromkeys(inputs, index))
        if not _tensors([node]):
            continue
        storage = _storage(node)
        reads[node] = {storage} if storage in placed else inputs
        first.setdefault(storage, index)
    inside = [storage for storage in placed if storage not in outside]
    alive = [
        sum(placed[storage] for storage in inside if first[storage] <= index <= last.get(storage, index))
        for index in range(len(nodes))
    ]
    return max(alive, default=0)
