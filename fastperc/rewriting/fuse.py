"""Groups of calls in a graph that run as one convolution with its prologue and its epilogue.

    pad?  upsample?  conv  ·number?  norm?  ·number?  + skip?  activation?  pixel shuffle?  activation?

A group's calls have no other readers than each other, but for the last one. A batch norm with running statistics and
the products with numbers are folded into the convolution.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from fastperc.rewriting.calls import (
    Add,
    Call,
    Conv,
    Norm,
    PixelShuffle,
    Same,
    Scale,
    Upsample,
    describe,
)
from fastperc.rewriting.trace import is_alias, mutates
from fastperc.types import Activation, Padding


@dataclass
class Group:
    """A convolution and the calls around it."""

    name: str  # of the convolution: in the state_dict, or of its node
    nodes: list[fx.Node]  # in order; the last one's value is the group's
    conv: Conv  # with a padding that stands before it
    x: fx.Node  # what it reads
    upsample: bool = False  # whether it reads the nearest-neighbour upsampling of ``x``
    norm: Norm | None = None
    factor: float = 1.0  # of all that is before the skip
    skip: fx.Node | None = None
    activation: Activation | None = None
    shuffle: int = 1  # the factor of a pixel shuffle, which comes last
    calls: dict[fx.Node, Call] = field(default_factory=dict, repr=False)

    @property
    def inputs(self) -> tuple[fx.Node, ...]:
        """The nodes outside of the group that it reads."""
        return (self.x,) if self.skip is None else (self.x, self.skip)


def groups_of(module: fx.GraphModule, training: bool = False) -> list[Group]:
    """The groups of a traced network, in the order of their last calls.

    A norm that takes the statistics of the batch is part of a group in ``training`` only.
    """
    return _Grouping(module, training).groups


class _Grouping:
    def __init__(self, module: fx.GraphModule, training: bool) -> None:
        self.training = training
        self.order = {node: i for i, node in enumerate(module.graph.nodes)}
        self.calls = {node: call for node in module.graph.nodes if (call := describe(node, module)) is not None}
        self.mutated = _mutated(module)
        self.taken: set[fx.Node] = set()
        self.groups = [group for node in module.graph.nodes if (group := self._group(node)) is not None]
        self.groups.sort(key=lambda group: self.order[group.nodes[-1]])

    def _group(self, node: fx.Node) -> Group | None:
        """The group of the convolution ``node``."""
        call = self.calls.get(node)
        if call is None or not isinstance(call.known, Conv):
            return None
        name = str(node.target) if node.op == "call_module" else node.name
        group = Group(name, [node], call.known, call.inputs[0])
        self._read_prologue(group)
        for following, its_call in self._following(node):
            if not self._add(group, following, its_call):
                break
            group.nodes.append(following)
        if self.mutated & {*group.nodes, *group.inputs}:
            return None
        group.nodes.sort(key=self.order.__getitem__)
        group.calls = {one: self.calls[one] for one in group.nodes}
        self.taken.update(group.nodes)
        return group

    def _read_prologue(self, group: Group) -> None:
        conv = group.conv
        call = self._alone(group.x)
        if call is not None and isinstance(call.known, Padding) and not any(conv.padding.sides) and not conv.transposed:
            group.nodes.append(group.x)
            group.conv, group.x = conv._replace(padding=call.known), call.inputs[0]
            call = self._alone(group.x)
        if call is not None and isinstance(call.known, Upsample) and _doubles(group.conv):
            group.nodes.append(group.x)
            group.upsample, group.x = True, call.inputs[0]

    def _alone(self, node: fx.Node) -> Call | None:
        """The call of ``node``, if one node alone reads it."""
        return self.calls.get(node) if len(node.users) == 1 and node not in self.taken else None

    def _following(self, node: fx.Node) -> Iterator[tuple[fx.Node, Call]]:
        """The calls after ``node`` of which each is the only reader of the one before."""
        while len(node.users) == 1:
            (following,) = node.users
            call = self.calls.get(following)
            if call is None or following in self.taken:
                return
            yield following, call
            node = following

    def _add(self, group: Group, node: fx.Node, call: Call) -> bool:
        """Takes ``call`` into ``group``, unless it must not come at this place."""
        known, last = call.known, group.nodes[-1]
        if isinstance(known, Same):
            return True
        if isinstance(known, PixelShuffle) and group.shuffle == 1:
            group.shuffle = known.factor
        elif isinstance(known, Activation) and group.activation is None:
            group.activation = _before_shuffle(known, group)
        elif group.activation is not None or group.shuffle != 1:
            return False
        elif isinstance(known, Norm) and group.norm is None and group.skip is None and group.factor == 1:
            if known.batch and not self.training:
                return False
            group.norm = known
        elif isinstance(known, Scale) and group.skip is None:
            group.factor *= known.factor
        elif isinstance(known, Add) and group.skip is None and call.inputs[0] is not call.inputs[1]:
            return self._add_skip(group, call, known.factor, last)
        else:
            return False
        return True

    def _add_skip(self, group: Group, call: Call, factor: float, last: fx.Node) -> bool:
        first, second = call.inputs
        if last is second:
            group.skip, group.factor = first, group.factor * factor
        elif factor == 1:
            group.skip = second
        else:
            return False
        return True


def _mutated(module: fx.GraphModule) -> set[fx.Node]:
    """The nodes whose values, or parts of them, change after they are computed."""
    found: set[fx.Node] = set()
    for node in module.graph.nodes:
        if mutates(node, module) and node.all_input_nodes:
            target = node.all_input_nodes[0]
            while is_alias(target) and target.all_input_nodes:
                found.add(target)
                target = target.all_input_nodes[0]
            found |= {target, node}
    for node in module.graph.nodes:
        if is_alias(node) and found & set(node.all_input_nodes):
            found.add(node)
    return found


def _doubles(conv: Conv) -> bool:
    """Whether ``conv`` after nearest-neighbour upsampling can run as a ½-stride convolution."""
    plain = conv.weight.shape[2:] == (3, 3) and conv.stride == (1, 1) and conv.dilation == (1, 1) and conv.groups == 1
    return plain and not conv.transposed and conv.padding.sides == (1,) * 4 and conv.padding.mode != "replicate"


def _before_shuffle(activation: Activation, group: Group) -> Activation:
    """``activation`` as it is before the group's pixel shuffle, where each channel is that many times as wide."""
    slopes = activation.slopes
    if group.shuffle == 1 or slopes is None or slopes.numel() == 1:
        return activation
    return activation._replace(slopes=slopes.repeat_interleave(group.shuffle**2))


def folded(group: Group) -> tuple[Tensor, Tensor]:
    """Weight and bias of the group's convolution in float64, with its factor and a norm by running statistics."""
    conv, norm = group.conv, group.norm
    weight = conv.weight.detach().double()
    bias = weight.new_zeros(conv.channels) if conv.bias is None else conv.bias.detach().double()
    scale = torch.full_like(bias, group.factor)
    if norm is not None and norm.mean is not None and norm.variance is not None:
        deviation = (norm.variance.detach().double() + norm.eps).sqrt()
        norm_scale = (1.0 if norm.weight is None else norm.weight.detach().double()) / deviation
        bias = (bias - norm.mean.detach().double()) * norm_scale
        bias = bias if norm.bias is None else bias + norm.bias.detach().double()
        return _scaled(conv, weight, norm_scale * scale), bias * scale
    return (weight, bias) if norm is not None else (_scaled(conv, weight, scale), bias * scale)


def _scaled(conv: Conv, weight: Tensor, scale: Tensor) -> Tensor:
    """Each filter of ``weight`` multiplied by its ``scale`` [O]."""
    if not conv.transposed:
        return weight * scale.view(-1, 1, 1, 1)
    return (weight.unflatten(0, (conv.groups, -1)) * scale.view(conv.groups, 1, -1, 1, 1)).flatten(0, 1)
