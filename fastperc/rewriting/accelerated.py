"""Any network in training, with this library's operations."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.utils._pytree import tree_map

from fastperc import _native
from fastperc.ops import has_hooks
from fastperc.ops.common import why_not_here
from fastperc.rewriting.trace import trace
from fastperc.rewriting.training import Plan, in_nhwc

PLANS = 8  # kept: for train and eval mode, and for arguments that are no tensors
REUSED_BYTES, KEPT_BYTES = 64 << 20, 256 << 20  # memory that steps use again: largest block, in all
SHARED = ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set")


def accelerate(net: nn.Module) -> Accelerated:
    """``net`` with faster training: a module that shares its parameters, buffers and modules, under the same names.

    Convolutions run with the norms, skips and activations after them, in channels-last memory. Layers with hooks,
    parametrisations or a class of their own, and modules that cannot be traced, run as they are. On a GPU, PyTorch
    runs all layers.

    Weights stay as they are in memory; ``net.to(memory_format=torch.channels_last)`` before saves a copy of each large
    one in every step.

    The forward is traced: what depends on Python's own state, such as ``random.random()`` or a flag that is not an
    argument, is fixed when it is traced. A change of modules, hooks, or train and eval mode traces it again.

    Args:
        net: any network whose forward ``torch.fx`` can trace. It stays usable, and is ``.original`` of the result.

    Raises:
        TypeError: the forward cannot be traced; the message names the line.
    """
    return net if isinstance(net, Accelerated) else Accelerated(net)


class Accelerated(nn.Module):
    """What :func:`accelerate` makes of a network."""

    original: nn.Module

    def __init__(self, net: nn.Module) -> None:
        training = net.training
        self.__dict__["original"] = net  # not a module of this one: names in the state_dict stay as they are
        super().__init__()
        net.training = training
        self.__dict__.update({name: net.__dict__[name] for name in SHARED})
        self.__dict__["_plans"] = {}
        self._plan({}, ())
        _native.reuse_freed_memory(REUSED_BYTES, KEPT_BYTES)

    # One network

    @property
    def training(self) -> bool:  # type: ignore[override]
        """Whether the network is in train mode."""
        return self.original.training

    @training.setter
    def training(self, mode: bool) -> None:
        self.original.training = mode

    def __getattr__(self, name: str) -> Any:
        if name == "original" or "original" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.original, name)

    def train(self, mode: bool = True) -> Accelerated:
        self.original.train(mode)
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.original.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.original.load_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.original._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_plans": {}}

    # Running it

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if why_not_here() or _runs_as_it_is(self.original):
            return self.original(*args, **kwargs)
        arguments = inspect.signature(self.original.forward).bind(*args, **kwargs).arguments
        fixed = {name: value for name, value in arguments.items() if not isinstance(value, Tensor)}
        tensors = [value for value in arguments.values() if isinstance(value, Tensor)]
        if any(x.device.type != "cpu" for x in tensors):
            return self.original(*args, **kwargs)
        plan = self._plan(fixed, tuple(name for name in arguments if name not in fixed))
        maps = [x for x in tensors if x.dim() == 4]
        result = plan({name: in_nhwc(value) for name, value in arguments.items()})
        if maps and not maps[0].is_contiguous(memory_format=torch.channels_last):
            return tree_map(_in_nchw, result)
        return result

    def _plan(self, fixed: dict[str, Any], given: tuple[str, ...]) -> Plan:
        """The steps for the network as it is now and for these arguments that are no tensors."""
        key = (*_state(self.original), repr(fixed), given)
        plans: dict[Any, Plan] = self.__dict__["_plans"]
        if key not in plans:
            if len(plans) >= PLANS:
                plans.clear()
            plans[key] = Plan(self.original, _traced(self.original, fixed, given))
        return plans[key]


def _traced(net: nn.Module, fixed: dict[str, Any], given: tuple[str, ...]) -> Any:
    try:
        return trace(net, fixed, given, leaves_modules=True)
    except TypeError as error:
        place, _, _ = str(error).partition(" Rewrite that line")
        raise TypeError(f"{place} Rewrite that line, or use torch.compile") from error


def _runs_as_it_is(net: nn.Module) -> bool:
    """Whether hooks of the whole network, or of all modules, are to be called."""
    of_all = (
        module_hooks._global_forward_hooks,
        module_hooks._global_forward_pre_hooks,
        module_hooks._global_backward_hooks,
        module_hooks._global_backward_pre_hooks,
    )
    return has_hooks(net) or any(of_all)


def _state(net: nn.Module) -> Iterator[Any]:
    """What the graph of ``net`` depends on, module by module."""
    for child in net._modules.values():
        if child is not None:
            yield id(child), type(child), child.training, has_hooks(child)
            yield from _state(child)
    yield net.training


def _in_nchw(x: Any) -> Any:
    return x.contiguous() if isinstance(x, Tensor) and x.dim() == 4 else x
