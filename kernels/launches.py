"""Records the kernel launches of a real run on a machine without a GPU. ``fastperc.kernels.runs`` lists the runs.

The engine and the training step run on CPU tensors that say they are on a GPU of some architecture. Triton binds and
specialises the arguments of each launch as it does on a GPU. Then the launch is noted, but nothing is compiled and no
kernel runs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from fastperc.kernels.configs import SHARED_MEMORY

LIBRARY = (torch.conv2d, torch.conv_transpose2d)  # left to a library: slow here, and no launches of ours


class Launch(NamedTuple):
    """A kernel with all that its compilation depends on, as Triton's binder gives it."""

    kernel: Any  # triton.JITFunction
    signature: dict[str, Any]  # parameter → "*bf16", "i32", "constexpr", "tensordesc<bf16[1, 8, 16, 64]>", or a tuple
    constants: dict[tuple[int, ...], Any]  # path of a parameter → its value, for what is known at compile time
    attributes: dict[tuple[int, ...], Any]  # path of a parameter → [["tt.divisibility", 16]] where 16 divides it
    options: Any  # the backend's: num_warps, num_stages, arch and more

    @property
    def name(self) -> str:
        """The kernel's name."""
        return self.kernel.__name__

    @property
    def key(self) -> str:
        """The same for two launches exactly if they share a compilation."""
        return repr((self.name, *self[1:]))


class _Driver:
    """Stands in for the GPU's driver. Triton keeps a binder for each device: here the number is the architecture."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)


class _PretendGPU(TorchFunctionMode):
    """CPU tensors say that they are on ``device``; what is asked for there is allocated on the CPU."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == torch.Tensor.device.__get__:  # type: ignore[attr-defined]
            return self.device
        if func is torch.device:
            return func(*args, **kwargs)
        if func is torch.Tensor.backward:
            with self:  # the mode is off inside this function, but the gradients' functions need it
                engine = torch.autograd.Variable._execution_engine  # type: ignore[attr-defined]
                given = kwargs.get("gradient")
                gradient = torch.ones_like(args[0]) if given is None else given
                return engine.run_backward(args[:1], (gradient,), False, False, (), True, True)
        if getattr(func, "_qualified_op_name", "").startswith("fastperc::"):
            with self:  # likewise off inside PyTorch's operators
                return OPDEFS[func._qualified_op_name]._init_fn(*args, **kwargs)
        if func in LIBRARY:
            return _unwritten(func, args, kwargs)
        if func is torch.Tensor.relu_:
            return args[0]
        return func(*map(_on_cpu, args), **{name: _on_cpu(value) for name, value in kwargs.items()})


def _on_cpu(argument: Any) -> Any:
    on_gpu = isinstance(argument, (torch.device, str)) and str(argument).startswith("cuda")
    return torch.device("cpu") if on_gpu else argument


def _unwritten(convolution: Any, args: Any, kwargs: Any) -> Tensor:
    """Memory for the result, never written: untouched pages take neither time nor memory. It is in NHWC where the input
    is, as cuDNN's result is."""

    def without_memory(x: Tensor) -> Tensor:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")

    result = convolution(*tree_map_only(Tensor, without_memory, args), **tree_map_only(Tensor, without_memory, kwargs))
    nhwc = args[0].is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if nhwc else torch.contiguous_format
    return torch.empty(result.shape, dtype=result.dtype, memory_format=layout)


def _pretend(arch: int, stack: ExitStack) -> None:
    """Makes PyTorch and fastperc see a GPU of architecture ``arch`` until ``stack`` closes."""
    from fastperc import _native

    properties = SimpleNamespace(shared_memory_per_block_optin=SHARED_MEMORY[arch], multi_processor_count=132)
    cuda: dict[str, Any] = dict(
        is_available=lambda: True,
        is_bf16_supported=lambda *_: True,
        is_current_stream_capturing=lambda: True,  # so that the engine runs op by op, as a CUDA graph records it
        get_device_capability=lambda device=None: divmod(arch, 10),
        get_device_properties=lambda device=None: properties,
        get_device_name=lambda device=None: "recorder",
        mem_get_info=lambda device=None: (1 << 50, 1 << 50),
        device=lambda device: nullcontext(),
    )
    stack.enter_context(mock.patch.multiple(torch.cuda, **cuda))
    # A build for CUDA has cuDNN's operators, which take no CPU tensors: the loss network then uses conv2d.
    stack.enter_context(mock.patch.object(torch.backends.cudnn, "is_available", lambda: False))
    stack.enter_context(mock.patch.object(_native, "why_not", lambda x: "only launches of Triton are recorded"))
    stack.enter_context(_PretendGPU(torch.device("cuda", arch)))  # no machine has a GPU of that number


@contextmanager
def recording(arch: int) -> Iterator[dict[str, Launch]]:
    """A dict that fills with the launches of the block by their keys, as on a GPU of architecture ``arch``.

    Raises:
        RuntimeError: Triton runs interpreted (``TRITON_INTERPRET=1``), so that there are no launches.
    """
    from triton import knobs
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    if knobs.runtime.interpret:
        raise RuntimeError("Triton's interpreter launches nothing: unset TRITON_INTERPRET before kernels are imported")
    launches: dict[str, Launch] = {}
    run = JITFunction.run

    def bind(self: Any, *args: Any, **kwargs: Any) -> Any:
        return run(self, *args, **{**kwargs, "warmup": True})  # binds and compiles, without a launch

    def note(
        kernel: Any, key: Any, signature: Any, device: Any, constants: Any, options: Any, attributes: Any, warmup: bool
    ) -> None:
        launch = Launch(kernel, signature, constants, attributes, options)
        launches.setdefault(launch.key, launch)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(driver, "_active", _Driver(arch)))
        stack.enter_context(mock.patch.multiple(JITFunction, run=bind, _do_compile=note))
        _pretend(arch, stack)
        yield launches


# Names of compilations

ALWAYS_NAMED = 3  # of a launch's facts: dtype, channels, tile


def names(launches: Iterable[Launch]) -> dict[str, str]:
    """For each launch, by its key, a short text that tells it from all others of its kernel: ``bf16 64-128 8x16 skip``.

    It has the dtype, the channels and the tile, and of all else only what is needed to tell the launches apart.
    """
    by_kernel: dict[str, list[Launch]] = {}
    for launch in launches:
        by_kernel.setdefault(launch.name, []).append(launch)
    found: dict[str, str] = {}
    for group in by_kernel.values():
        texts: list[tuple[str, ...]] = [()] * len(group)
        for column, facts in enumerate(zip(*map(_facts, group))):
            longer = [(*text, fact) for text, fact in zip(texts, facts)]
            if column < ALWAYS_NAMED or len(set(longer)) > len(set(texts)):
                texts = longer
        found |= {launch.key: " ".join(filter(None, text)) for launch, text in zip(group, texts)}
    return found


def _facts(launch: Launch) -> list[str]:
    """What can be said of ``launch``, the most telling first; in the same order for all launches of a kernel."""
    values = {
        name: launch.constants.get((i,), _elements(launch.constants, i))
        for i, name in enumerate(launch.kernel.arg_names)
    }
    constexprs = [parameter.name for parameter in launch.kernel.params if parameter.is_constexpr]
    channels, tile, block = ([name for name in constexprs if part in name] for part in ("CHANNELS", "TILE", "BLOCK"))
    channels = [name for name in channels if not name.endswith("LAST")]
    flags = [name for name in constexprs if name not in (*channels, *tile, *block)]
    kinds = {name: kind for name, kind in launch.signature.items() if name not in constexprs}
    dtypes = {name: _dtype(kind) for name, kind in kinds.items() if name.endswith(("_ptr", "_ptrs", "_desc"))}

    facts = [next(filter(None, dtypes.values()), "")]
    facts += ["-".join(_text(values[name]) for name in channels), "x".join(_text(values[name]) for name in tile)]
    facts += [_word(name, values[name]) for name in flags]
    facts += [name.removesuffix("_ptr") if dtype else "" for name, dtype in dtypes.items()]
    facts += [f"{name.removesuffix('_ptr')}:{dtype}" for name, dtype in dtypes.items()]
    facts.append("block " + "x".join(_text(values[name]) for name in block))
    facts += [f"{launch.options.num_warps} warps", f"{launch.options.num_stages} stages"]
    for i, name in enumerate(launch.kernel.arg_names):
        if name in kinds:
            facts.append(_specialisation(launch, i, name, values[name]))
    return facts


def _elements(constants: Mapping[tuple[int, ...], Any], i: int) -> tuple[Any, ...] | None:
    """The constants inside a tuple parameter, if there are any."""
    return tuple(value for path, value in sorted(constants.items()) if path[0] == i) or None


def _dtype(kind: Any) -> str:
    """``"bf16"`` of ``"*bf16"``, of a descriptor, or of a tuple of pointers; ``""`` of what is absent."""
    kind = kind[0] if isinstance(kind, tuple) else kind
    return "" if kind == "constexpr" else re.sub(r"[*]|tensordesc<|\[.*", "", kind)


def _text(value: Any) -> str:
    return ",".join(map(_text, value)) if isinstance(value, tuple) else str(value)


def _word(parameter: str, value: Any) -> str:
    """A constant in a name: ``reflect`` for a flag that is set, ``tanh``, ``s2`` for a stride."""
    if isinstance(value, tuple) and len(set(value)) == 1:
        value = value[0]  # the same for all layers
    if value is None or value is False:
        return ""
    if value is True:
        return parameter.lower()
    short = {"KERNEL": "k", "STRIDE": "s"}.get(parameter, f"{parameter.lower()}=")
    return value if isinstance(value, str) else short + _text(value)


def _specialisation(launch: Launch, i: int, name: str, value: Any) -> str:
    """What Triton found out about a run-time parameter: that it is 1, or that 16 divides it."""
    kind = launch.signature[name]
    if isinstance(kind, tuple):  # by the places of the elements
        aligned = [str(path[1]) for path, known in launch.attributes.items() if path[0] == i and known]
        ones = [str(place) for place, element in enumerate(kind) if element == "constexpr"]
        return " ".join(
            f"{name}[{','.join(places)}]{what}" for places, what in ((aligned, "%16"), (ones, "=1")) if places
        )
    if kind == "constexpr":
        return f"{name}={value}"
    return f"{name}%16" if launch.attributes.get((i,)) else ""
