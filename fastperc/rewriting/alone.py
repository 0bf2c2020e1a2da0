"""What computes a single call of a traced network, as PyTorch does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from fastperc import reference
from fastperc.rewriting.known import Add, Call, Known, Same, Scale
from fastperc.types import Activation

Run = Callable[[list[Any]], Any]  # from the values of the nodes by number, the value of a node


def run_alone(
    node: fx.Node,
    call: Call | None,
    number: Mapping[fx.Node, int],
    submodule: Callable[[str], nn.Module],
    keeps_views: bool,
) -> Run:
    """What computes ``node``. It changes none of its inputs if it is a known ``call``.

    Args:
        node: a call of a function, a method or a module.
        call: what it computes, if that is known.
        number: of each node's value.
        submodule: the module of a name.
        keeps_views: whether a later call may change a view, so that no copy may take its place.
    """
    if call is not None and (function := _in_new_memory(call.known, "fresh" in node.meta)) is not None:
        inputs = [number[one] for one in call.inputs]
        return lambda values: function(*(values[one] for one in inputs))
    if node.op == "call_module":
        target: Any = submodule(str(node.target))
    elif node.op == "call_method":
        name = _method(node, keeps_views)
        target = lambda x, *args, **kwargs: getattr(x, name)(*args, **kwargs)  # noqa: E731
    else:
        target = node.target
    if len(node.args) == 1 and isinstance(node.args[0], fx.Node) and not node.kwargs:
        only = number[node.args[0]]
        return lambda values: target(values[only])

    def run(values: list[Any]) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda one: values[number[one]])
        return target(*args, **kwargs)

    return run


def _method(node: fx.Node, keeps_views: bool) -> str:
    """The method that ``node`` calls: for ``view``, which channels-last memory may not allow, ``reshape``."""
    is_shape = all(isinstance(size, (int, fx.Node, tuple, list)) for size in node.args[1:]) and not node.kwargs
    return "reshape" if node.target == "view" and is_shape and not keeps_views else str(node.target)


def _in_new_memory(known: Known, in_place: bool) -> Callable[..., Tensor] | None:
    """What a call that is ``in_place`` computes, in new memory; ``None`` where its own module or function serves."""
    if isinstance(known, Same):
        return lambda x: x
    if not in_place:
        return None
    if isinstance(known, Activation):
        return lambda x: reference.activate(x, known)
    if isinstance(known, Add):
        return lambda x, y: torch.add(x, y, alpha=known.factor)
    return (lambda x: x * known.factor) if isinstance(known, Scale) else None
