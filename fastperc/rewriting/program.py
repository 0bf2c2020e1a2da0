"""A traced network as steps over numbered values: fused layers, and single calls as PyTorch computes them.

Where outputs of layers are concatenated, the layers write them to their places in the concatenated tensor, so that
nothing is copied; that is planned for one set of shapes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import _PyTreeCodeGen
from torch.utils._pytree import tree_leaves

from fastperc import backends
from fastperc.rewriting.alone import Run, run_alone
from fastperc.rewriting.calls import describe
from fastperc.rewriting.functions import Constants
from fastperc.rewriting.fuse import Group, groups_of
from fastperc.rewriting.layers import FrozenLayer
from fastperc.rewriting.places import NOWHERE, Places
from fastperc.rewriting.replay import Replay
from fastperc.rewriting.series import Layer, Series, in_series
from fastperc.rewriting.trace import mutates


class Network:
    """A traced network: its nodes, and the layers that it can run them by."""

    def __init__(self, module: fx.GraphModule, device: torch.device, dtype: torch.dtype) -> None:
        """
        Args:
            module: in evaluation, with the network's own weights, which are copied.
            device, dtype: of the computation.
        """
        self.module, self.like = module, (device, dtype)
        self.nodes = list(module.graph.nodes)
        self.number = {node: i for i, node in enumerate(self.nodes)}
        self.calls = {node: call for node in self.nodes if (call := describe(node, module)) is not None}
        self.groups = {group.nodes[-1]: group for group in groups_of(module)}
        wide = torch.promote_types(dtype, torch.float32)
        self.layers = {node: FrozenLayer(group, device, wide) for node, group in self.groups.items()}
        self.exported = isinstance(module.graph._codegen, _PyTreeCodeGen)
        self.mutates = any(mutates(node, module) for node in self.nodes)
        self._modules: dict[str, nn.Module] = {}

    def submodule(self, name: str) -> nn.Module:
        """A copy of a module that is called as it is, on the device and in the dtype of the computation."""
        if name not in self._modules:
            device, dtype = self.like
            module = copy.deepcopy(self.module.get_submodule(name)).to(device, dtype)
            self._modules[name] = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return self._modules[name]

    def alone(self, node: fx.Node) -> Run:
        """What computes a call by itself."""
        return run_alone(node, self.calls.get(node), self.number, self.submodule, self.mutates)

    def constant(self, node: fx.Node) -> Any:
        """The value of a node that depends on no input."""
        value = Constants(self.module)(node)
        if not isinstance(value, Tensor):
            return value
        device, dtype = self.like
        return value.to(device, dtype if value.is_floating_point() else value.dtype)


@dataclass(frozen=True)
class Step:
    """What computes one value."""

    name: str
    node: fx.Node
    value: int
    run: Run
    last_reads: tuple[int, ...]  # values that no later step reads


class Program:
    """The steps of a network, with some of its groups fused."""

    def __init__(self, network: Network, fused: Collection[fx.Node], places: Places = NOWHERE) -> None:
        """
        Args:
            network: the network.
            fused: the last nodes of the groups that run as layers.
            places: of layers' outputs in concatenated tensors.
        """
        self.network, self._fused, self._places = network, fused, places
        self._values: list[Any] = [None] * (len(network.nodes) + len(places.buffers))
        self._inputs: list[tuple[int, str]] = []
        self._result: Any = None
        inside = {node for last in fused for node in network.groups[last].nodes[:-1]}
        read: list[tuple[str, fx.Node, Run, list[int]]] = []
        for node in network.nodes:
            number = network.number[node]
            if node.op == "placeholder":
                self._inputs.append((number, str(node.target).lstrip("*")))
            elif node.op == "get_attr":
                self._values[number] = network.constant(node)
            elif node.op == "output":
                self._result = node.args[0]
            elif node not in inside:
                name = network.groups[node].name if node in fused else node.name
                read.append((name, node, self._run_of(node, node in fused), self._read_by(node, node in fused)))
        self.steps = self._with_last_reads(read)
        self._replays = [self.replay(step) for step in self.steps]
        self._finished = 0  # runs of the replays
        self._series: list[Callable[[list[Any]], None]] | None = None

    def __call__(self, arguments: Mapping[str, Any], watch: Callable[[Step, list[Any]], Any] | None = None) -> Any:
        """The network's output for ``arguments`` by name; ``watch`` computes a step's value instead of the step."""
        if watch is not None or not backends.chooses_freely():
            runs = [step.run if watch is None else partial(watch, step) for step in self.steps]
            return self._run(arguments, self._single(runs))
        if self._series is None and self._finished > 1:  # all that can be prepared is
            self._series = self._in_series()
        result = self._run(arguments, self._series or self._single(self._replays))
        self._finished += 1
        return result

    def _run(self, arguments: Mapping[str, Any], runs: Iterable[Callable[[list[Any]], None]]) -> Any:
        values = self._values.copy()
        if self.network.exported:  # which flattens arguments and results
            arguments = dict(zip((name for _, name in self._inputs), tree_leaves(arguments)))
        for number, name in self._inputs:
            values[number] = arguments.get(name)
        for run in runs:
            run(values)
        result = fx.node.map_arg(self._result, lambda node: values[self.network.number[node]])
        return self.network.module.graph.process_outputs(result)

    def _single(self, runs: Sequence[Run]) -> list[Callable[[list[Any]], None]]:
        """The steps one by one."""
        return [partial(_step, step, run) for step, run in zip(self.steps, runs)]

    def _in_series(self) -> list[Callable[[list[Any]], None]]:
        """The steps, prepared layers in a row as one."""
        singles = self._single(self._replays)
        layers = [Layer(run, step.value, step.last_reads) for step, run in zip(self.steps, self._replays)]
        runs: list[Callable[[list[Any]], None]] = []
        for group in in_series(layers):
            if len(group) == 1:
                runs.append(singles[group[0]])
            else:
                last_reads = tuple(number for i in group for number in layers[i].last_reads)
                runs.append(partial(_steps, Series([layers[i] for i in group]), last_reads))
        return runs

    def _with_last_reads(self, read: list[tuple[str, fx.Node, Run, list[int]]]) -> list[Step]:
        network = self.network
        kept = {number for number, value in enumerate(self._values) if value is not None}
        fx.node.map_arg(self._result, lambda node: kept.add(self.network.number[node]))
        steps = []
        for name, node, run, inputs in reversed(read):
            number = network.number[node]
            if number not in kept and not mutates(node, network.module):
                continue  # nothing reads it: it is folded into layers
            last = {*inputs, number} - kept
            kept |= last
            steps.append(Step(name, node, number, run, tuple(last)))
        return steps[::-1]

    def _read_by(self, node: fx.Node, fused: bool) -> list[int]:
        inputs = self.network.groups[node].inputs if fused else node.all_input_nodes
        return [self.network.number[one] for one in inputs] + self._places.buffers_of(node, len(self.network.nodes))

    def replay(self, step: Step) -> Run:
        """What runs a step again and again."""
        if step.node not in self._fused:
            return step.run
        group, number = self.network.groups[step.node], self.network.number
        return Replay(step.run, number[group.x], None if group.skip is None else number[group.skip])

    def _run_of(self, node: fx.Node, fused: bool) -> Run:
        number, places, base = self.network.number, self._places, len(self.network.nodes)
        if fused:
            group, layer = self.network.groups[node], self.network.layers[node]
            x, skip = number[group.x], None if group.skip is None else number[group.skip]
            if (place := places.of.get(node)) is not None:
                return lambda values: layer(
                    values[x], None if skip is None else values[skip], places.part(values, base, place)
                )
            if skip is not None:
                return lambda values: layer(values[x], values[skip])
            return lambda values: layer(values[x])
        if (view := places.views.get(node)) is not None:
            copies = [(number[one], place) for one, place in places.copies.get(node, ())]

            def concatenate(values: list[Any]) -> Tensor:
                for one, place in copies:
                    places.part(values, base, place).copy_(values[one])
                return places.part(values, base, view)

            return concatenate
        return self.network.alone(node)


def _step(step: Step, run: Run, values: list[Any]) -> None:
    backends.at_layer(step.name)
    values[step.value] = run(values)
    for number in step.last_reads:
        values[number] = None


def _steps(series: Series, last_reads: tuple[int, ...], values: list[Any]) -> None:
    series(values)
    for number in last_reads:
        values[number] = None


def run_group(group: Group, network: Network) -> Run:
    """What computes a group call by call."""
    steps = [(network.number[node], network.alone(node)) for node in group.nodes]
    read = {one for node in group.nodes for one in node.all_input_nodes} - {*group.nodes, *group.inputs}
    constants = [(network.number[node], network.constant(node)) for node in read]

    def run(values: list[Any]) -> Any:
        values = values.copy()
        for number, constant in constants:
            values[number] = constant
        for number, compute in steps:
            values[number] = compute(values)
        return values[steps[-1][0]]

    return run
