"""CPU tensors that say they are on another device, for what depends on the device alone."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class PretendDevice(TorchFunctionMode):
    """In the block all tensors say that they are on ``device``, and what is asked for there is allocated on the CPU.

    On ``mps`` float64 is refused, as PyTorch does there.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = torch.device(device)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == torch.Tensor.device.__get__:
            return self.device
        if func is torch.device:
            return func(*args, **kwargs)
        if func is torch.Tensor.backward:
            with self:  # the mode is off inside this function, but the gradients' functions need it
                ones = (torch.ones_like(args[0]),)
                engine = torch.autograd.Variable._execution_engine
                return engine.run_backward(args[:1], ones, False, False, (), True, True)
        result = func(*map(self.on_cpu, args), **{name: self.on_cpu(value) for name, value in kwargs.items()})
        if self.device.type == "mps" and isinstance(result, torch.Tensor) and result.dtype == torch.float64:
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."
            )
        return result

    def on_cpu(self, argument: Any) -> Any:
        """``argument``, but the CPU where it is the device."""
        if isinstance(argument, (str, torch.device)) and str(argument).startswith(self.device.type):
            return torch.device("cpu")
        return argument
