"""Where layers write what is concatenated afterwards: to its place in the concatenated tensor.

Each ``torch.cat`` along the channels of an image becomes a view of a buffer. The buffer is that of the largest
concatenation with the same parts in a row: all of a dense block have one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from fastperc.rewriting.calls import Call, Concatenation


class Place(NamedTuple):
    """Some channels of a buffer."""

    buffer: int
    first: int
    channels: int


@dataclass
class Places:
    """The buffers, and what lies in them."""

    buffers: list[torch.Size] = field(default_factory=list)
    like: tuple[torch.device, torch.dtype] = (torch.device("cpu"), torch.float32)
    of: dict[fx.Node, Place] = field(default_factory=dict)  # of layers that write there themselves
    views: dict[fx.Node, Place] = field(default_factory=dict)  # of concatenations
    copies: dict[fx.Node, list[tuple[fx.Node, Place]]] = field(default_factory=dict)  # made by a concatenation

    def buffers_of(self, node: fx.Node, base: int) -> list[int]:
        """The numbers of the values that hold the buffers of ``node``, the first buffer's being ``base``."""
        place = self.of.get(node) or self.views.get(node)
        return [] if place is None else [base + place.buffer]

    def part(self, values: list[Any], base: int, place: Place) -> Tensor:
        """The tensor at ``place``; its buffer is made when it is first asked for."""
        number, (device, dtype) = base + place.buffer, self.like
        if values[number] is None:
            shape = self.buffers[place.buffer]
            values[number] = torch.empty(shape, device=device, dtype=dtype, memory_format=torch.channels_last)
        return values[number].narrow(1, place.first, place.channels)


NOWHERE = Places()


def plan_places(
    calls: Mapping[fx.Node, Call],
    shapes: Mapping[fx.Node, torch.Size],
    writers: Collection[fx.Node],
    like: tuple[torch.device, torch.dtype],
) -> Places:
    """The places of all that is concatenated.

    Args:
        calls: the known calls of the network, in order.
        shapes: of all values, by node.
        writers: the nodes of layers that can write to a place.
        like: device and dtype of the values.
    """
    concatenations = {
        node: parts
        for node, call in calls.items()
        if isinstance(call.known, Concatenation) and _are_maps(parts := _parts(node, calls), shapes)
    }
    places = Places(like=like)
    copied: set[tuple[int, fx.Node]] = set()  # by concatenations
    for node in sorted(concatenations, key=lambda node: -len(concatenations[node])):
        parts = concatenations[node]
        if node in places.views or not any(part in writers and part not in places.of for part in parts):
            continue
        buffer, first, here = len(places.buffers), 0, {}
        for part in parts:
            here[part] = Place(buffer, first, shapes[part][1])
            first += shapes[part][1]
        n, _, height, width = shapes[parts[0]]
        places.buffers.append(torch.Size((n, first, height, width)))
        unwritten = {part for part in parts if part not in writers or part in places.of}
        places.of |= {part: place for part, place in here.items() if part not in unwritten}
        for other in calls:  # in order, so that the first to need a part copies it
            run = concatenations.get(other)
            if run is None or other in places.views or (start := _position(run, parts)) is None:
                continue
            channels = sum(shapes[part][1] for part in run)
            places.views[other] = Place(buffer, here[parts[start]].first, channels)
            missing = [part for part in run if part in unwritten and (buffer, part) not in copied]
            copied.update((buffer, part) for part in missing)
            places.copies[other] = [(part, here[part]) for part in missing]
    return places


def _parts(node: fx.Node, calls: Mapping[fx.Node, Call]) -> tuple[fx.Node, ...]:
    """What ``node`` concatenates, concatenations among it taken apart."""
    parts: list[fx.Node] = []
    for one in calls[node].inputs:
        nested = one in calls and isinstance(calls[one].known, Concatenation)
        parts += _parts(one, calls) if nested else [one]
    return tuple(parts)


def _are_maps(parts: tuple[fx.Node, ...], shapes: Mapping[fx.Node, torch.Size]) -> bool:
    """Whether ``parts`` are maps of one size, each of them once."""
    sizes = {(len(shape), shape[0], *shape[2:]) for part in parts if (shape := shapes.get(part)) is not None}
    complete = all(part in shapes for part in parts) and len(set(parts)) == len(parts)
    return complete and len(sizes) == 1 and sizes.pop()[0] == 4


def _position(run: tuple[fx.Node, ...], parts: tuple[fx.Node, ...]) -> int | None:
    """Where ``run`` begins among ``parts``, if it is a part of them in a row."""
    return next((i for i in range(len(parts) - len(run) + 1) if parts[i : i + len(run)] == run), None)
