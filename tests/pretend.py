"""CPU tensors that say they are on another device, for what depends on the device alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map_only

CPU = torch.device("cpu")
TO_CPU = (Tensor.cpu, Tensor.numpy)


class PretendDevice(TorchFunctionMode):
    """In the block tensors say that they are on ``device``, unless they were made on the CPU there or moved to it.

    All computing is the CPU's. On ``mps`` float64 is refused, as PyTorch does there.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = torch.device(device)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == Tensor.device.__get__:
            return CPU if is_on_cpu(args[0]) else self.device
        if func in (torch.device, torch._C._nn._parse_to):
            return func(*args, **kwargs)
        if func == Tensor.data.__set__:
            args[0].is_on_cpu = is_on_cpu(args[1])
        if func is Tensor.backward:
            with self:  # the mode is off inside this function, but the gradients' functions need it
                ones = (torch.ones_like(args[0]),)
                engine = torch.autograd.Variable._execution_engine
                return engine.run_backward(args[:1], ones, False, False, (), True, True)
        values = tree_flatten((args, kwargs))[0]
        tensors = [value for value in values if isinstance(value, Tensor)]
        devices = [torch.device(value) for value in values if is_device(value)]
        on_cpu = all(map(is_on_cpu, tensors)) if tensors else True
        if devices or func in TO_CPU:
            on_cpu = func in TO_CPU or devices[0].type == "cpu"
        result = func(*map(without_device, args), **{name: without_device(value) for name, value in kwargs.items()})
        return tree_map_only(Tensor, lambda y: self.placed(y, on_cpu, tensors), result)

    def placed(self, result: Tensor, on_cpu: bool, tensors: list[Tensor]) -> Tensor:
        """``result`` on its device; a copy of a moved tensor, which PyTorch did not need to copy."""
        if self.device.type == "mps" and result.dtype == torch.float64 and not on_cpu:
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."
            )
        if any(result is x for x in tensors):
            if is_on_cpu(result) == on_cpu:
                return result
            result = result.clone()
        result.is_on_cpu = on_cpu
        return result


def is_on_cpu(x: Tensor) -> bool:
    """Whether ``x`` says that it is on the CPU."""
    return getattr(x, "is_on_cpu", False)


def is_device(value: Any) -> bool:
    """Whether ``value`` names a device."""
    return isinstance(value, torch.device) or (
        isinstance(value, str) and value.partition(":")[0] in ("cpu", "cuda", "mps")
    )


def without_device(value: Any) -> Any:
    """``value``, but the CPU where it is a device."""
    return CPU if is_device(value) else value
