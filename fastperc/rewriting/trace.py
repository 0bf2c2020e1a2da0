"""The forward of any network as a graph of calls, by ``torch.fx`` or ``torch.export``.

Modules of ``torch.nn`` stay whole calls, and so do this library's, scripted modules and modules with hooks. After an
in-place call that is known, what read its input reads its result, so that it need not run in place.
"""

from __future__ import annotations

import inspect
import operator
import os
import traceback
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from fastperc.ops import has_hooks
from fastperc.rewriting.calls import describe, function_name

FOREIGN = (os.path.dirname(torch.__file__), os.path.dirname(__file__))  # whose lines are not the network's
ASSERTIONS = ("_assert", "_assert_is_none", "_assert_tensor_metadata", "sym_constrain_range_for_size")


class _Tracer(fx.Tracer):
    trace_asserts = True

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        whole = has_hooks(module) or isinstance(module, torch.jit.ScriptModule)
        return whole or type(module).__module__.startswith("fastperc.") or super().is_leaf_module(module, name)


def trace(net: nn.Module, fixed: Mapping[str, Any] | None = None) -> fx.GraphModule:
    """The graph of ``net``'s forward, in the mode (training or evaluation) that its modules are in.

    Args:
        net: the graph shares its parameters and modules.
        fixed: values of arguments that are no tensors, by name; the graph holds for these alone. Arguments with a
            default have that value otherwise.

    Raises:
        TypeError: ``torch.fx`` cannot trace it; the message names the line.
    """
    parameters = inspect.signature(net.forward).parameters.values()
    defaults = {one.name: one.default for one in parameters if one.default is not one.empty}
    tracer = _Tracer()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Was not able to add assertion")
            graph = tracer.trace(net, {**defaults, **(fixed or {})})
    except Exception as error:
        raise TypeError(_message(net, error, "traced", "give freeze an example of the input, ")) from error
    return _without_side_effects(fx.GraphModule(tracer.root, graph))


def export(net: nn.Module, arguments: Mapping[str, Any]) -> fx.GraphModule:
    """The graph of ``net``'s forward for ``arguments`` and others of their shapes, by ``torch.export``.

    Raises:
        TypeError: the forward depends on the values of tensors, or does what cannot be exported.
    """
    try:
        with torch.no_grad():
            module = torch.export.export(net, (), dict(arguments), strict=False).module(check_guards=False)
    except Exception as error:
        raise TypeError(_message(net, error, "exported", "")) from error
    return _without_side_effects(module)


def _message(net: nn.Module, error: Exception, done: str, advice: str) -> str:
    """What is wrong with which line, and what to do."""
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(FOREIGN)]
    place = f"{frames[-1].filename}, line {frames[-1].lineno}: `{frames[-1].line}`" if frames else "its forward"
    return (
        f"{type(net).__name__} cannot be {done} at {place}: {reason}. Rewrite that line, {advice}"
        f"or use fastperc.accelerate, which leaves such a module as it is, or torch.compile"
    )


def _without_side_effects(module: fx.GraphModule) -> fx.GraphModule:
    graph = module.graph
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in reversed(list(graph.nodes)):
        if function_name(node) in ASSERTIONS or node.target == "_guards_fn":
            _erase(node)
    for node in graph.nodes:
        if mutates(node, module) and (call := describe(node, module)) is not None:
            for user in list(call.inputs[0].users):
                if order[user] > order[node]:
                    user.replace_input_with(call.inputs[0], node)
    return module


def _erase(node: fx.Node) -> None:
    """Erases ``node`` and what was computed for it alone."""
    inputs = node.all_input_nodes
    node.graph.erase_node(node)
    for one in inputs:
        if not one.users and one.op in ("call_function", "call_method"):
            _erase(one)


def mutates(node: fx.Node, module: fx.GraphModule) -> bool:
    """Whether ``node`` changes its first input."""
    if node.op == "call_module":
        return getattr(module.get_submodule(str(node.target)), "inplace", False)
    in_place = node.op in ("call_function", "call_method") and function_name(node).endswith("_")
    return in_place or node.target is operator.setitem or node.kwargs.get("inplace") is True
