"""PyTorch's fast_neural_style example as an ONNX file, such as those of the ONNX model zoo.

The graph is followed from its input node by node, and refused where it is not the example's. So the names of its
weights do not matter, and no other network is taken for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastperc.conversion.common import MAX_BYTES, Converted, Refused, shown, transform_net
from fastperc.errors import InputError

MEASURED = ("Shape", "Size")  # operations that see the size of an image only
BLOCKS = 5


def convert(path: Path) -> Converted:
    """The network of an ``.onnx`` file.

    Raises:
        InputError: the package onnx is not installed.
        Refused: a damaged file, or another network.
    """
    try:
        import onnx
    except ImportError:
        raise InputError(f"{path}: reading an .onnx file needs onnx: pip install 'fastperc[onnx]'") from None
    if path.stat().st_size > MAX_BYTES:
        raise Refused("is larger than 1 GiB")
    try:
        graph = onnx.load(path, load_external_data=False).graph
    except Exception:  # protobuf's and onnx's own
        raise Refused("is no ONNX file, or damaged") from None
    try:
        chain = Chain(graph)
        chain.example()
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        raise Refused("is damaged") from None
    tensors = {name: tensor.float() for name, tensor in chain.tensors.items()}
    net = transform_net(path, tensors, preset="examples", width=len(tensors["stem.conv.bias"]))
    kind = "PyTorch's fast_neural_style example as ONNX"
    return Converted(kind, net, chain.tensors["stem.conv.weight"].dtype)


class Chain:
    """Follows a graph from its input and collects weights under the names of a ``TransformNet``."""

    def __init__(self, graph: Any) -> None:
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        for node in graph.node:
            if node.op_type == "Constant":
                values = [attribute.t for attribute in node.attribute if attribute.name == "value"]
                self.constants |= dict(zip(node.output, values))
        inputs = [value.name for value in graph.input if value.name not in self.constants]
        if len(inputs) != 1:
            raise Refused(f"takes {len(inputs)} inputs, not one image")
        self.place = inputs[0]
        self.outputs = [value.name for value in graph.output]
        self.consumers: dict[str, list[Any]] = {}
        for node in graph.node:
            for name in dict.fromkeys(node.input):
                self.consumers.setdefault(name, []).append(node)
        self.tensors: dict[str, Tensor] = {}

    def example(self) -> None:
        """Follows the example's network to its end."""
        for name, stride in (("stem", 1), ("down.0", 2), ("down.1", 2)):
            self._convolution(f"{name}.conv", stride)
            self._norm(f"{name}.norm")
            self._follow("Relu")
        for i in range(BLOCKS):
            start = self.place
            self._convolution(f"blocks.{i}.conv1", 1, "Add")
            self._norm(f"blocks.{i}.norm1")
            self._follow("Relu")
            self._convolution(f"blocks.{i}.conv2", 1)
            self._norm(f"blocks.{i}.norm2")
            if start not in self._follow("Add").input:
                raise Refused("adds something else than the input of a block to its output")
        for i in range(2):
            self._upsampling()
            self._convolution(f"up.{i}.conv", 1)
            self._norm(f"up.{i}.norm")
            self._follow("Relu")
        self._convolution("head", 1)
        if self.place not in self.outputs:
            raise Refused("goes on after the last convolution of PyTorch's fast_neural_style example")

    def _follow(self, *kinds: str, beside: str = "") -> Any:
        """The operation of one of ``kinds`` that takes what the last one gave, and an operation ``beside`` it alone."""
        nodes = [node for node in self.consumers.get(self.place, []) if node.op_type not in MEASURED]
        expected = [node for node in nodes if node.op_type in kinds]
        others = [node.op_type for node in nodes if node.op_type not in (*kinds, beside)]
        if others or len(expected) != 1:
            actual = others[0] if others else f"{len(expected)} of them" if expected else "none"
            there = f"it has {shown(actual)} where that has {' or '.join(kinds)}"
            raise Refused(f"is not PyTorch's fast_neural_style example: {there}")
        self.place = expected[0].output[0]
        return expected[0]

    def _convolution(self, name: str, stride: int, beside: str = "") -> None:
        """A padding by reflection and a convolution of it."""
        pad = self._follow("Pad", beside=beside)
        conv = self._follow("Conv")
        weight = self._constant(conv.input[1])
        sides = self._numbers(pad, "pads", 1)
        half = weight.shape[-1] // 2
        attributes = _attributes(conv)
        plain = (
            attributes.get("strides", [1, 1]) == [stride, stride]
            and not any(attributes.get("pads", [0]))
            and attributes.get("dilations", [1, 1]) == [1, 1]
            and attributes.get("group", 1) == 1
        )
        if _attributes(pad).get("mode") != b"reflect" or (sides and sides != [0, 0, half, half] * 2) or not plain:
            raise Refused(f"has another convolution or padding than PyTorch's fast_neural_style example as its {name}")
        self.tensors[f"{name}.weight"] = weight
        if len(conv.input) < 3:
            raise Refused(f"has a convolution without a bias as its {name}")
        self.tensors[f"{name}.bias"] = self._constant(conv.input[2])

    def _norm(self, name: str) -> None:
        node = self._follow("InstanceNormalization")
        if abs(_attributes(node).get("epsilon", 1e-5) - 1e-5) > 1e-9:
            raise Refused("has instance norms with another epsilon than 1e-5")
        self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"] = map(self._constant, node.input[1:3])

    def _upsampling(self) -> None:
        """Each pixel four times. Factors that the graph computes from sizes are not read: the picture has the photo's
        size, so they are 2."""
        node = self._follow("Upsample", "Resize")
        attributes = _attributes(node)
        factors = self._numbers(node, "scales", 2 if node.op_type == "Resize" else 1)
        smooth = attributes.get("mode", b"nearest") != b"nearest"
        corners = attributes.get("coordinate_transformation_mode") == b"align_corners"
        if smooth or corners or (factors and factors != [1, 1, 2, 2]):
            raise Refused("does not enlarge by repeating pixels twice")

    def _constant(self, name: str) -> Tensor:
        """The weight of that name."""
        import onnx

        tensor = self.constants.get(name)
        if tensor is None:
            raise Refused("computes its weights; they must be stored as they are")
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            raise Refused("keeps its weights in another file; save it with the weights inside")
        try:
            return torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy())
        except Exception:  # onnx raises many kinds for damaged tensors
            raise Refused("has a damaged weight") from None

    def _numbers(self, node: Any, attribute: str, index: int) -> list[float]:
        """The numbers in an attribute, or else in a constant that is the input at ``index``; none if it is computed."""
        values: Sequence[float] | None = _attributes(node).get(attribute)
        if values is None and len(node.input) > index and node.input[index] in self.constants:
            values = self._constant(node.input[index]).flatten().tolist()
        return [*(values or [])]


def _attributes(node: Any) -> dict[str, Any]:
    import onnx

    return {
        attribute.name: list(value) if isinstance(value, (list, tuple)) else value
        for attribute in node.attribute
        for value in [onnx.helper.get_attribute_value(attribute)]
    }
