"""A traced network in training: the calls of its graph one after the other, some of them fused.

    convolution  ·number?  norm?  + skip?  activation?        by ops.conv3x3, ops.rgb_conv and ops.norm_relu

Modules are called as they are at each call: parameters, statistics and train or eval mode are the network's own.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fastperc import ops, reference
from fastperc.ops.common import channels_last
from fastperc.rewriting.alone import Run, run_alone
from fastperc.rewriting.calls import describe
from fastperc.rewriting.fuse import groups_of
from fastperc.rewriting.known import Add, Call, Norm, Same, Scale
from fastperc.rewriting.trace import mutates
from fastperc.types import Activation

CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)
NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, nn.InstanceNorm2d)
# ReLU6 in place keeps a copy of its input.
IN_PLACE: dict[str, Callable[[Tensor, Activation], Tensor]] = {
    "relu": lambda x, _: x.relu_(),
    "leaky_relu": lambda x, activation: F.leaky_relu_(x, 0.01 if activation.slope is None else activation.slope),
}


@dataclass
class Unit:
    """A convolution, or a norm, and the calls after it."""

    nodes: list[fx.Node]  # the last one's value is the unit's
    x: fx.Node  # what it reads
    conv: Any = None  # nn.Conv2d or nn.ConvTranspose2d
    norm: Any = None  # nn.Module
    factor: float = 1.0  # of all that is before the skip
    skip: fx.Node | None = None
    activation: Activation | None = None
    prelu: Any = None  # the module whose slopes the activation has
    inputs: list[fx.Node] = field(default_factory=list)

    def add(self, node: fx.Node, call: Call | None, module: Any) -> bool:
        """Takes ``node`` into the unit, unless it must not come at this place."""
        known = None if call is None else call.known
        if known is None or self.activation is not None:
            return False
        if isinstance(known, Norm):
            if self.norm is not None or self.skip is not None or self.factor != 1 or type(module) not in NORMS:
                return False
            self.norm = module
        elif isinstance(known, Activation):
            if known.slopes is not None and type(module) is not nn.PReLU:
                return False
            self.activation, self.prelu = known, None if known.slopes is None else module
        elif isinstance(known, Scale):
            if self.skip is not None:
                return False
            self.factor *= known.factor
        elif isinstance(known, Add):
            return self._add_skip(node, call, known.factor)
        elif not isinstance(known, Same) or module is None:
            return False
        self.nodes.append(node)
        return True

    def _add_skip(self, node: fx.Node, call: Any, factor: float) -> bool:
        first, second = call.inputs
        if self.skip is not None or first is second:
            return False
        if second is self.nodes[-1]:
            self.skip, self.factor = first, self.factor * factor
        elif factor == 1:
            self.skip = second
        else:
            return False
        self.nodes.append(node)
        return True

    def __call__(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """activation(factor · norm(conv(``x``)) + ``skip``)."""
        activation = self.activation if self.prelu is None else Activation("prelu", slopes=self.prelu.weight)
        y = x if self.conv is None else ops.convolved(self.conv, x)
        if self.norm is not None:
            if self.factor == 1:
                return ops.norm_relu(y, self.norm, activation, skip)
            y = ops.norm_relu(y, self.norm, None) * self.factor
        elif skip is None and self.factor != 1:
            y = y * self.factor
        if skip is not None:
            y = torch.add(skip, y, alpha=self.factor if self.norm is None else 1)
        # No other call reads y, and neither a convolution nor a sum needs its result for a gradient.
        may_change = activation is not None and self.norm is None and not y._is_view()
        in_place = IN_PLACE.get(activation.name) if activation is not None and may_change else None
        return reference.activate(y, activation) if in_place is None or activation is None else in_place(y, activation)


class Plan:
    """The steps of a network's forward."""

    def __init__(self, net: nn.Module, module: fx.GraphModule) -> None:
        """
        Args:
            net: the network itself.
            module: its graph.
        """
        self.net, self.module = net, module
        self.nodes = list(module.graph.nodes)
        self.number = {node: i for i, node in enumerate(self.nodes)}
        self.mutates = any(mutates(node, module) for node in self.nodes)
        self.units = {unit.nodes[-1]: unit for unit in self._units()}
        inside = {node for unit in self.units.values() for node in unit.nodes[:-1]}
        self._inputs = [(self.number[node], str(node.target).lstrip("*")) for node in self.nodes if _is_input(node)]
        (self._output,) = (node for node in self.nodes if node.op == "output")
        outside = [node for node in self.nodes if node not in inside and not _is_input(node) and node.op != "output"]
        self._steps = self._with_last_reads(outside)

    def __call__(self, arguments: Mapping[str, Any]) -> Any:
        """The network's result for ``arguments`` by name."""
        values: list[Any] = [None] * len(self.nodes)
        for number, name in self._inputs:
            values[number] = arguments.get(name)
        for number, run, last_reads in self._steps:
            values[number] = run(values)
            for one in last_reads:
                values[one] = None
        return fx.node.map_arg(self._output.args[0], lambda node: values[self.number[node]])

    def _module_of(self, node: fx.Node) -> Any:
        return self.net.get_submodule(str(node.target)) if node.op == "call_module" else None

    def _units(self) -> list[Unit]:
        """What is fused, in the order of the convolutions."""
        units: list[Unit] = []
        for group in groups_of(self.module, training=True):
            nodes = iter(group.nodes)
            first = next(node for node in nodes if isinstance(group.calls[node].known, type(group.conv)))
            conv = self._module_of(first)
            if type(conv) not in CONVOLUTIONS:
                continue
            unit = Unit([first], group.calls[first].inputs[0], conv)
            for node in nodes:
                if not unit.add(node, group.calls[node], self._module_of(node)):
                    break
            unit.inputs = [unit.x] if unit.skip is None else [unit.x, unit.skip]
            units.append(unit)
        return units

    def _with_last_reads(self, nodes: list[fx.Node]) -> list[tuple[int, Run, tuple[int, ...]]]:
        """Number and function of each node, and the values that nothing reads afterwards."""
        kept = {self.number[node] for node in self._output.all_input_nodes}
        steps = []
        for node in reversed(nodes):
            number = self.number[node]
            reads = {self.number[one] for one in self._read_by(node)} | {number}
            steps.append((number, self._run_of(node), tuple(reads - kept)))
            kept |= reads
        return steps[::-1]

    def _read_by(self, node: fx.Node) -> list[fx.Node]:
        return self.units[node].inputs if node in self.units else node.all_input_nodes

    def _run_of(self, node: fx.Node) -> Run:
        number = self.number
        if (unit := self.units.get(node)) is not None:
            x, *skips = (number[one] for one in unit.inputs)
            if skips:
                return lambda values: unit(values[x], values[skips[0]])
            return lambda values: unit(values[x])
        if node.op == "get_attr":
            read = operator.attrgetter(str(node.target))  # from the network: its parameters may be replaced
            home = self.net if _has(self.net, str(node.target)) else self.module
            return lambda values: read(home)
        call = describe(node, self.module) if "fresh" in node.meta else None
        return run_alone(node, call, number, self.net.get_submodule, self.mutates)


def _is_input(node: fx.Node) -> bool:
    return node.op == "placeholder"


def _has(net: nn.Module, name: str) -> bool:
    try:
        operator.attrgetter(name)(net)
    except AttributeError:
        return False
    return True


def in_nhwc(x: Any) -> Any:
    """A map in channels-last memory; anything else as it is."""
    return channels_last(x) if isinstance(x, Tensor) and x.dim() == 4 else x
