"""What a call in a traced network computes: a convolution, a norm, an activation, and so on, or nothing known.

A module and a function of PyTorch that compute the same are described by the same tuple.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from fastperc.ops import has_hooks
from fastperc.types import RELU, Activation, Padding, Sides


class Conv(NamedTuple):
    """A convolution, or a transposed one."""

    weight: Tensor  # [O, I / groups, k, k], transposed [I, O / groups, k, k]
    bias: Tensor | None  # [O]
    stride: tuple[int, int]  # down, across; likewise in the other pairs
    padding: Padding
    dilation: tuple[int, int]
    groups: int
    transposed: bool = False
    output_padding: tuple[int, int] = (0, 0)

    @property
    def channels(self) -> int:
        """Of the output."""
        return self.weight.shape[1] * self.groups if self.transposed else self.weight.shape[0]


class Norm(NamedTuple):
    """A batch norm by its running statistics, or an instance norm, which has none."""

    weight: Tensor | None  # [C]
    bias: Tensor | None  # [C]
    mean: Tensor | None  # [C]
    variance: Tensor | None  # [C]
    eps: float
    batch: bool = False  # whether it takes the statistics of the batch, as a batch norm in training does


class Add(NamedTuple):
    """The sum of the first input and ``factor`` · the second."""

    factor: float = 1.0


class Scale(NamedTuple):
    """The product with a number."""

    factor: float


class Upsample(NamedTuple):
    """Nearest-neighbour upsampling to twice the size."""


class PixelShuffle(NamedTuple):
    """[N, C · factor², H, W] → [N, C, factor · H, factor · W]."""

    factor: int


class Concatenation(NamedTuple):
    """The inputs, one after the other along the channels."""


class Same(NamedTuple):
    """The input itself, as a dropout in evaluation gives it."""


Known = Conv | Norm | Activation | Add | Scale | Padding | Upsample | PixelShuffle | Concatenation | Same


class Call(NamedTuple):
    """A known call, and the nodes of the tensors that it reads."""

    known: Known
    inputs: tuple[fx.Node, ...]


# Names

OPERATORS = {
    operator.add: "add",
    operator.iadd: "add_",
    operator.sub: "sub",
    operator.isub: "sub_",
    operator.mul: "mul",
    operator.imul: "mul_",
    operator.truediv: "div",
    operator.itruediv: "div_",
}


def function_name(node: fx.Node) -> str:
    """What PyTorch calls the function or the method: ``"relu_"`` of ``torch.relu_`` and ``x.relu_()``; "" of others."""
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function":
        return ""
    if node.target in OPERATORS:
        return OPERATORS[node.target]
    home = getattr(node.target, "__module__", None) or ""
    if home and not home.startswith(("torch", "_operator")):
        return ""
    return getattr(node.target, "__name__", "").split(".")[0]


PARAMETERS = {  # of functions, in order; aten's own order after a dot
    "conv2d": "input weight bias stride padding dilation groups",
    "conv_transpose2d": "input weight bias stride padding output_padding groups dilation",
    "batch_norm": "input mean variance weight bias training momentum eps",
    "batch_norm.aten": "input weight bias mean variance training momentum eps",
    "instance_norm": "input mean variance weight bias training momentum eps",
    "instance_norm.aten": "input weight bias mean variance training momentum eps",
    "leaky_relu": "input negative_slope inplace",
    "prelu": "input weight",
    "hardtanh": "input min_val max_val inplace",
    "pad": "input pad mode value",
    "reflection_pad2d": "input pad",
    "replication_pad2d": "input pad",
    "constant_pad_nd": "input pad value",
    "interpolate": "input size scale_factor mode",
    "upsample_nearest2d": "input size scale_factor",
    "pixel_shuffle": "input upscale_factor",
    "cat": "tensors dim",
    "add": "input other",
    "sub": "input other",
    "mul": "input other",
    "div": "input other",
    "dropout": "input p training inplace",
}
RENAMED = {
    "concat": "cat",
    "concatenate": "cat",
    "axis": "dim",
    "use_input_stats": "training",
    "running_mean": "mean",
    "running_var": "variance",
    "rounding_mode": "unknown",
    "true_divide": "div",
    "subtract": "sub",
    "multiply": "mul",
    "divide": "div",
    "self": "input",
    "dropout2d": "dropout",
    "feature_dropout": "dropout",
    "output_size": "size",
    "scale_factors": "scale_factor",
    "scales": "scale_factor",
}


def plain_name(node: fx.Node) -> str:
    """:func:`function_name` by one spelling, whether in place or not."""
    name = function_name(node).removesuffix("_")
    return RENAMED.get(name, name)


def arguments_of(node: fx.Node, name: str) -> dict[str, Any]:
    """The arguments of a call of the function ``name`` by one set of names."""
    is_aten = isinstance(node.target, torch._ops.OpOverload)
    order = PARAMETERS.get(f"{name}.aten" if is_aten else name) or PARAMETERS.get(name, "input inplace")
    named = {RENAMED.get(key, key): value for key, value in node.kwargs.items()}
    return dict(zip(order.split(), node.args)) | named


# Calls


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
    except (_Unknown, KeyError, TypeError, ValueError):
        return None
    return call if all(isinstance(one, fx.Node) for one in call.inputs) else None


class _Unknown(Exception):
    """The call is another kind than its name says."""


class Constants:
    """The values of nodes that depend on no input: parameters, and what is computed of them."""

    def __init__(self, graph: fx.GraphModule) -> None:
        self._graph = graph

    def __call__(self, value: Any) -> Any:
        """The value of ``value``, which may be a node or hold nodes."""
        return fx.node.map_arg(value, self._of_node)

    def _of_node(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            found: Any = self._graph
            for part in str(node.target).split("."):
                found = getattr(found, part)
            return found.detach() if isinstance(found, Tensor) else found
        if node.op not in ("call_function", "call_method") or not node.all_input_nodes:
            raise _Unknown
        args, kwargs = self(node.args), self(node.kwargs)
        with torch.no_grad():
            if callable(node.target):
                return node.target(*args, **kwargs)
            return getattr(args[0], node.target)(*args[1:], **kwargs)


def _require(condition: bool) -> None:
    if not condition:
        raise _Unknown


def _pair(value: Any) -> tuple[int, int]:
    first, second = (value, value) if isinstance(value, int) else (value * 2 if len(value) == 1 else value)
    _require(isinstance(first, int) and isinstance(second, int))
    return first, second


def _sides(pad: Any) -> Sides:
    left, right, top, bottom = (pad,) * 4 if isinstance(pad, int) else pad
    _require(all(isinstance(side, int) and side >= 0 for side in (left, right, top, bottom)))
    return left, right, top, bottom


def _zeros(padding: Any, kernel: tuple[int, int], dilation: tuple[int, int], mode: str = "zeros") -> Padding:
    """The padding of a convolution, which may be ``"same"`` or ``"valid"``."""
    if padding == "valid":
        return Padding()
    if padding == "same":
        (rows, columns) = (d * (k - 1) for d, k in zip(dilation, kernel))
        return Padding((columns // 2, columns - columns // 2, rows // 2, rows - rows // 2), mode)
    rows, columns = _pair(padding)
    return Padding((columns, columns, rows, rows), mode)


def _convolution(a: dict[str, Any], constant: Constants, transposed: bool = False) -> Call:
    weight, bias = constant(a["weight"]), constant(a.get("bias"))
    _require(isinstance(weight, Tensor) and weight.dim() == 4)
    dilation, kernel = _pair(a.get("dilation", 1)), (weight.shape[2], weight.shape[3])
    padding = _zeros(a.get("padding", 0), kernel, dilation)
    stride, groups = _pair(a.get("stride", 1)), a.get("groups", 1)
    extra = _pair(a.get("output_padding", 0))
    return Call(Conv(weight, bias, stride, padding, dilation, groups, transposed, extra), (a["input"],))


def _batch_norm(a: dict[str, Any], constant: Constants) -> Call:
    _require(not a.get("training", False))
    mean, variance = constant(a["mean"]), constant(a["variance"])
    weight, bias = constant(a.get("weight")), constant(a.get("bias"))
    return Call(Norm(weight, bias, mean, variance, a.get("eps", 1e-5)), (a["input"],))


def _instance_norm(a: dict[str, Any], constant: Constants) -> Call:
    _require(a.get("training", True) and a.get("mean") is None)
    weight, bias = constant(a.get("weight")), constant(a.get("bias"))
    return Call(Norm(weight, bias, None, None, a.get("eps", 1e-5)), (a["input"],))


def _pad(a: dict[str, Any], constant: Constants, mode: str = "constant") -> Call:
    mode = {"constant": "zeros", None: "zeros"}.get(a.get("mode", mode), a.get("mode", mode))
    _require(mode in ("zeros", "reflect", "replicate") and not a.get("value"))
    return Call(Padding(_sides(a["pad"]), mode), (a["input"],))


def _nearest(a: dict[str, Any], constant: Constants) -> Call:
    factor = a.get("scale_factor")
    factors = set(factor) if isinstance(factor, (tuple, list)) else {factor}
    _require(a.get("mode", "nearest") == "nearest" and a.get("size") is None and factors == {2})
    return Call(Upsample(), (a["input"],))


def _sum(a: dict[str, Any], constant: Constants, sign: int = 1) -> Call:
    both, factor = (a["input"], a["other"]), a.get("alpha", 1)
    _require(all(isinstance(one, fx.Node) for one in both) and isinstance(factor, (int, float)))
    return Call(Add(sign * factor), both)


def _product(a: dict[str, Any], constant: Constants, power: int = 1) -> Call:
    x, factor = a["input"], a["other"]
    if power == 1 and isinstance(factor, fx.Node):
        x, factor = factor, x
    _require(isinstance(x, fx.Node) and isinstance(factor, (int, float)) and "unknown" not in a)
    return Call(Scale(float(factor) ** power), (x,))


def _concatenation(a: dict[str, Any], constant: Constants) -> Call:
    tensors = a["tensors"]
    _require(a.get("dim", 0) == 1 and all(isinstance(one, fx.Node) for one in tensors))
    return Call(Concatenation(), tuple(tensors))


def _elementwise(activation: Activation) -> Callable[[dict[str, Any], Constants], Call]:
    return lambda a, constant: Call(activation, (a["input"],))


def _leaky_relu(a: dict[str, Any], constant: Constants) -> Call:
    return Call(Activation("leaky_relu", float(a.get("negative_slope", 0.01))), (a["input"],))


def _clamp(a: dict[str, Any], constant: Constants) -> Call:
    _require((a.get("min_val"), a.get("max_val")) == (0, 6))
    return Call(Activation("relu6"), (a["input"],))


def _same(a: dict[str, Any], constant: Constants) -> Call:
    _require(not a.get("training", False))
    return Call(Same(), (a["input"],))


Reader = Callable[[dict[str, Any], Constants], Call]
FUNCTIONS: dict[str, Reader] = {
    "conv2d": _convolution,
    "conv_transpose2d": lambda a, constant: _convolution(a, constant, transposed=True),
    "batch_norm": _batch_norm,
    "instance_norm": _instance_norm,
    "pad": _pad,
    "reflection_pad2d": lambda a, constant: _pad(a, constant, "reflect"),
    "replication_pad2d": lambda a, constant: _pad(a, constant, "replicate"),
    "constant_pad_nd": _pad,
    "interpolate": _nearest,
    "upsample_nearest2d": _nearest,
    "pixel_shuffle": lambda a, constant: Call(PixelShuffle(a["upscale_factor"]), (a["input"],)),
    "cat": _concatenation,
    "add": _sum,
    "sub": lambda a, constant: _sum(a, constant, -1),
    "mul": _product,
    "div": lambda a, constant: _product(a, constant, -1),
    "relu": _elementwise(RELU),
    "relu6": _elementwise(Activation("relu6")),
    "hardtanh": _clamp,
    "leaky_relu": _leaky_relu,
    "prelu": lambda a, constant: Call(Activation("prelu", slopes=constant(a["weight"])), (a["input"],)),
    "silu": _elementwise(Activation("silu")),
    "sigmoid": _elementwise(Activation("sigmoid")),
    "tanh": _elementwise(Activation("tanh")),
    "dropout": _same,
    "contiguous": _same,
    "detach": _same,
}


# Modules


def of_module(module: nn.Module) -> Known | None:
    """What a module of PyTorch computes, by its class's own forward; ``None`` of others."""
    for kind, reader in MODULES.items():
        if isinstance(module, kind) and type(module).forward is kind.forward:
            return reader(module)
    return None


def _conv_module(conv: Any) -> Conv | None:
    transposed = isinstance(conv, nn.ConvTranspose2d)
    if conv.padding_mode not in ("zeros", "reflect", "replicate"):
        return None
    padding = _zeros(conv.padding, conv.kernel_size, conv.dilation, conv.padding_mode)
    extra = conv.output_padding if transposed else (0, 0)
    return Conv(conv.weight, conv.bias, conv.stride, padding, conv.dilation, conv.groups, transposed, extra)


def _norm_module(norm: Any) -> Norm | None:
    instance = isinstance(norm, nn.InstanceNorm2d)
    measures = norm.running_mean is None or norm.training
    if instance and measures and norm.running_mean is not None:  # it also updates its running statistics
        return None
    mean, variance = (None, None) if measures else (norm.running_mean, norm.running_var)
    return Norm(norm.weight, norm.bias, mean, variance, norm.eps, measures and not instance)


def _upsample_module(upsample: Any) -> Upsample | None:
    factor = upsample.scale_factor
    twice = factor in (2, (2, 2)) and upsample.size is None
    return Upsample() if upsample.mode == "nearest" and twice else None


def _pad_module(mode: str) -> Callable[[Any], Padding | None]:
    return lambda pad: Padding(tuple(pad.padding), mode) if min(pad.padding) >= 0 else None


MODULES: dict[type[nn.Module], Callable[[Any], Known | None]] = {
    nn.Conv2d: _conv_module,
    nn.ConvTranspose2d: _conv_module,
    nn.BatchNorm2d: _norm_module,
    nn.SyncBatchNorm: _norm_module,
    nn.InstanceNorm2d: _norm_module,
    nn.ReLU: lambda m: RELU,
    nn.LeakyReLU: lambda m: Activation("leaky_relu", m.negative_slope),
    nn.PReLU: lambda m: Activation("prelu", slopes=m.weight),
    nn.ReLU6: lambda m: Activation("relu6"),
    nn.SiLU: lambda m: Activation("silu"),
    nn.Sigmoid: lambda m: Activation("sigmoid"),
    nn.Tanh: lambda m: Activation("tanh"),
    nn.ReflectionPad2d: _pad_module("reflect"),
    nn.ReplicationPad2d: _pad_module("replicate"),
    nn.ZeroPad2d: _pad_module("zeros"),
    nn.UpsamplingNearest2d: _upsample_module,
    nn.Upsample: _upsample_module,
    nn.PixelShuffle: lambda m: PixelShuffle(m.upscale_factor),
    nn.Identity: lambda m: Same(),
    nn.Dropout: lambda m: None if m.training else Same(),
    nn.Dropout2d: lambda m: None if m.training else Same(),
}
