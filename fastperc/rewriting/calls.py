"""What a call in a traced network computes: a convolution, a norm, an activation, and so on, or nothing known."""

from __future__ import annotations

from typing import Any

from torch import fx

from fastperc.ops import has_hooks
from fastperc.rewriting.functions import FUNCTIONS, Constants, arguments_of, plain_name
from fastperc.rewriting.known import Call, Unknown
from fastperc.rewriting.modules import of_module


def describe(node: fx.Node, graph: fx.GraphModule) -> Call | None:
    """What ``node`` computes, or ``None`` where it is none of the known calls."""
    if node.op == "call_module":
        module = graph.get_submodule(str(node.target))
        known = None if has_hooks(module) else of_module(module)
        inputs: tuple[Any, ...] = (*node.args, *node.kwargs.values())
        single = len(inputs) == 1 and isinstance(inputs[0], fx.Node)
        return Call(known, inputs) if known is not None and single else None
    name = plain_name(node)
    if name not in FUNCTIONS:
        return None
    try:
        call = FUNCTIONS[name](arguments_of(node, name), Constants(graph))
    except (Unknown, KeyError, TypeError, ValueError):
        return None
    return call if all(isinstance(one, fx.Node) for one in call.inputs) else None
