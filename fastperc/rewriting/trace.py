"""The forward of any network as a graph of calls, by ``torch.fx`` or ``torch.export``.

Modules of ``torch.nn`` stay whole calls, and so do this library's, scripted modules and modules with hooks. After an
in-place call that is known, what read its input reads its result, so that it need not run in place.
"""

from __future__ import annotations

import inspect
import linecache
import operator
import os
import traceback
import warnings
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import fx, nn

from fastperc.ops import has_hooks
from fastperc.rewriting.calls import describe
from fastperc.rewriting.functions import function_name

FOREIGN = (os.path.dirname(torch.__file__), os.path.dirname(__file__))  # whose lines are not the network's
ASSERTIONS = ("_assert", "_assert_is_none", "_assert_tensor_metadata", "sym_constrain_range_for_size")

ALIASES = (
    *("view", "view_as", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "permute", "transpose", "t"),
    *("chunk", "split", "tensor_split", "unbind", "narrow", "select", "slice", "expand", "expand_as", "contiguous"),
    *("detach", "to", "float", "movedim", "swapaxes", "diagonal", "unfold", "alias", "getattr"),
)


class _Tracer(fx.Tracer):
    def __init__(self, leaves_modules: bool) -> None:
        super().__init__()
        self.leaves_modules = leaves_modules

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A module that cannot be traced is left as it is, if ``leaves_modules``."""
        before = len(self.graph.nodes)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            if not self.leaves_modules:
                raise
            for node in list(reversed(self.graph.nodes))[: len(self.graph.nodes) - before]:
                self.graph.erase_node(node)
            return self.create_proxy("call_module", self.path_of_module(m), args, kwargs)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Assertions are taken to hold."""
        frame = inspect.currentframe()
        while frame is not None and frame.f_code.co_filename.startswith(FOREIGN):
            frame = frame.f_back
        if frame is not None and linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip().startswith(
            "assert"
        ):
            return True
        return super().to_bool(obj)

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        whole = has_hooks(module) or isinstance(module, torch.jit.ScriptModule)
        return whole or type(module).__module__.startswith("fastperc.") or super().is_leaf_module(module, name)


def trace(
    net: nn.Module,
    fixed: Mapping[str, Any] | None = None,
    given: Collection[str] = (),
    leaves_modules: bool = False,
) -> fx.GraphModule:
    """The graph of ``net``'s forward, in the mode (training or evaluation) that its modules are in.

    Args:
        net: the graph shares its parameters and modules.
        fixed: values of arguments that are no tensors, by name; the graph holds for these alone.
        given: the names of arguments with a default that are given nevertheless; all others have their default.
        leaves_modules: whether a module inside that cannot be traced stays as it is.

    Raises:
        TypeError: ``torch.fx`` cannot trace it; the message names the line.
    """
    parameters = inspect.signature(net.forward).parameters.values()
    defaults = {one.name: one.default for one in parameters if one.default is not one.empty and one.name not in given}
    tracer = _Tracer(leaves_modules)
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
    """Drops assertions. Marks each in-place call that may as well return a new tensor as ``fresh``, and lets what reads
    its input afterwards read its result."""
    order = {node: i for i, node in enumerate(module.graph.nodes)}
    for node in reversed(list(order)):
        if function_name(node) in ASSERTIONS or node.target == "_guards_fn":
            _erase(node)
    for node in module.graph.nodes:
        if not mutates(node, module) or (call := describe(node, module)) is None:
            continue
        target = call.inputs[0]
        if is_alias(target) or any(is_alias(user) for user in target.users):
            continue  # another tensor shares the memory, and is to see the change
        node.meta["fresh"] = True
        for user in list(target.users):
            if order[user] > order[node]:
                user.replace_input_with(target, node)
    return module


def _erase(node: fx.Node) -> None:
    """Erases ``node`` and what was computed for it alone."""
    inputs = node.all_input_nodes
    node.graph.erase_node(node)
    for one in inputs:
        if not one.users and one.op in ("call_function", "call_method"):
            _erase(one)


def mutates(node: fx.Node, module: fx.GraphModule) -> bool:
    """Whether ``node`` changes its first input, and is not marked ``fresh``."""
    if "fresh" in node.meta:
        return False
    if node.op == "call_module":
        return getattr(module.get_submodule(str(node.target)), "inplace", False)
    in_place = node.op in ("call_function", "call_method") and function_name(node).endswith("_")
    return in_place or node.target is operator.setitem or node.kwargs.get("inplace") is True


def is_alias(node: fx.Node) -> bool:
    """Whether ``node`` may give a view of its first input."""
    return node.target is operator.getitem or function_name(node) in ALIASES
