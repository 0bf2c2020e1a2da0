"""A frozen network that this library did not write."""

from __future__ import annotations

import copy
import inspect
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from fastperc import _native, backends
from fastperc.devices import computes_in
from fastperc.engine.cuda import Graphs
from fastperc.modules.chain import exporting
from fastperc.rewriting.places import plan_places
from fastperc.rewriting.program import Network, Program, Step, run_group
from fastperc.rewriting.trace import export, trace

SHAPES = 32  # the shapes whose programs are kept
REUSED_BYTES, KEPT_BYTES = 64 << 20, 256 << 20  # memory that passes use again: largest block, in all
CLEARLY = 0.97  # of the time of what is kept anyway; with less, another way is taken
TIMED_RUNS = 4  # at most, and not more than two that take longer than this together:
TIMED_SECONDS = 0.5


class Choice(NamedTuple):
    """How a shape is computed."""

    program: Program | None  # None: the network itself, which was measured faster
    alone: tuple[fx.Node, ...]  # the groups that were measured faster call by call
    seconds: tuple[float, float] | None  # of the fused program and of the network itself; None: not measured


class FrozenNet:
    """What ``fastperc.freeze`` makes of a network: call it as the network. Several threads may do so at once.

    Floating-point tensors are computed in ``dtype``; results are in the dtype, on the device and, if they are maps, in
    the memory format of the first of them.
    """

    def __init__(
        self,
        net: nn.Module,
        dtype: torch.dtype,
        device: torch.device,
        example: Any = None,
        tune: bool = True,
    ) -> None:
        """
        Args:
            net: it is copied.
            dtype: of the computation; float32 instead where a CPU is slow in half precision.
            device: where the weights go.
            example: an input, or a tuple of inputs: ``torch.export`` traces what ``torch.fx`` cannot.
            tune: whether the first call of a shape measures what is faster.

        Raises:
            TypeError: the network cannot be traced; the message names the line.
        """
        self.asked_for, self.device, self.example, self.tune = dtype, device, example, tune
        self.dtype = dtype if computes_in(dtype, device) else torch.float32
        self._original = copy.deepcopy(net).eval().requires_grad_(False)
        _check_weights(self._original)
        self._signature = inspect.signature(self._original.forward)
        parameters = self._signature.parameters.values()
        self._positional = [one.name for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD]
        if len(self._positional) < len(parameters):
            self._positional = []
        self._lock = threading.RLock()
        self._networks: OrderedDict[Hashable, Network] = OrderedDict()
        self._choices: OrderedDict[Hashable, Choice] = OrderedDict()
        self._plain: nn.Module | None = None
        self._graphs = Graphs()
        example = (example,) if isinstance(example, Tensor) else example
        self._last = None if example is None else self._bound(*example)  # of a call, without the values
        self._exports = False
        try:
            self._kept((repr({}),), lambda: trace(self._original))
        except TypeError:
            if example is None:
                raise
            self._exports = True
            self._exported(self._bound(*example))

    def __reduce__(self) -> tuple[Any, ...]:
        return FrozenNet, (self._original, self.asked_for, self.device, self.example, self.tune)

    @torch.compiler.disable
    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the network returns in evaluation.

        Raises:
            TypeError: arguments that the network's forward does not take.
            RuntimeError: PyTorch exports or traces the call.
        """
        if exporting():
            raise RuntimeError("a frozen network cannot be exported; export the network itself, in eval mode")
        arguments = self._bound(*args, **kwargs)
        like = next((x for x in _tensors(arguments.values()) if x.is_floating_point()), None)
        self._last = _mapped(lambda x: torch.empty_like(x, device="meta"), arguments)
        arguments = _mapped(self._moved, arguments)
        with torch.autocast(self.device.type, enabled=False):
            result = self._run(arguments)
        if like is None:
            return result
        return _as(result, like) if isinstance(result, Tensor) else tree_map(lambda y: _as(y, like), result)

    def explain(self, *args: Any, **kwargs: Any) -> str:
        """A line for each layer: what runs it, and why. Runs the network on these arguments to find out.

        Without arguments it does so for the shapes of the last call, or for the ``example``.

        Raises:
            ValueError: there are no such shapes.
        """
        given = self._bound(*args, **kwargs) if args or kwargs else self._last
        if given is None:
            raise ValueError("give explain the network's input, or call the frozen network first")
        zeros = _mapped(lambda x: torch.zeros_like(x, device=self.device) if x.is_meta else x, given)
        arguments = _mapped(self._moved, zeros)
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            choice, network = self._choice(arguments), self._network(arguments)
            program = choice.program or Program(network, network.groups)
            with backends.recorded() as choices:
                program(arguments)
        lines = [f"{'layer':<24}{'kernel':<23}{'backend':<11}reason"]
        if self.dtype != self.asked_for:
            asked_for = str(self.asked_for).removeprefix("torch.")
            lines.insert(0, f"{asked_for} stored, float32 computed: this processor is slow in {asked_for}")
        if choice.seconds is not None:
            ours, plain = (f"{1e3 * seconds:.3g} ms" for seconds in choice.seconds)
            chosen = "fused layers" if choice.program else "the network itself, channels-last"
            lines.insert(0, f"{chosen}: measured {ours} fused, {plain} by the network itself")
        lines += [f"{one.layer:<24}{one.operation:<23}{one.backend:<11}{one.reason}" for one in choices]
        lines += [
            f"{network.groups[node].name:<24}{'call by call':<23}{'reference':<11}measured faster than one layer"
            for node in choice.alone
        ]
        whole = [
            step.name for step in program.steps if step.node not in network.groups and step.node not in network.calls
        ]
        lines += [f"{name:<24}{'as it is':<23}{'reference':<11}no layer of fastperc computes this" for name in whole]
        return "\n".join(lines)

    def _bound(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The arguments by the names that the forward gives them."""
        if not kwargs and len(args) == len(self._positional):
            return dict(zip(self._positional, args))  # what `bind` does, in a tenth of the time
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return bound.arguments

    def _moved(self, x: Tensor) -> Tensor:
        """``x`` where and how it is computed with."""
        dtype = self.dtype if x.is_floating_point() else x.dtype
        layout = torch.channels_last if x.dim() == 4 else torch.preserve_format
        return x.detach().to(self.device, dtype, memory_format=layout)

    def _run(self, arguments: dict[str, Any]) -> Any:
        if self.device.type == "cpu":
            _native.reuse_freed_memory(REUSED_BYTES, KEPT_BYTES)
        choice = self._choice(arguments)
        return self._replayed(self._graphs, choice.program or self._plainly, arguments)

    def _replayed(self, graphs: Graphs, run: Callable[[Any], Any], arguments: dict[str, Any]) -> Any:
        """``run(arguments)``; on a GPU by replaying a CUDA graph."""
        if self.device.type != "cuda" or torch.cuda.is_current_stream_capturing():
            return run(arguments)
        return graphs.run(_key(arguments), arguments, run)

    def _plainly(self, arguments: dict[str, Any]) -> Any:
        """The network itself, in evaluation and channels-last memory."""
        if self._plain is None:
            plain = copy.deepcopy(self._original).to(self.device, self.dtype)
            self._plain = plain.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        bound = inspect.BoundArguments(self._signature, OrderedDict(arguments))
        return self._plain(*bound.args, **bound.kwargs)

    # What runs a shape

    def _network(self, arguments: dict[str, Any]) -> Network:
        """The traced network for the arguments that are no tensors, and, where it is exported, for their shapes."""
        if self._exports:
            return self._exported(arguments)
        parameters = self._signature.parameters
        fixed = {name: value for name, value in arguments.items() if not _holds_tensors(value)}
        fixed = {name: value for name, value in fixed.items() if value is not parameters[name].default}
        given = {
            name
            for name, value in arguments.items()
            if _holds_tensors(value) and parameters[name].default is not inspect.Parameter.empty
        }
        key = (repr(fixed), *sorted(given))
        return self._kept(key, lambda: trace(self._original, fixed, given))

    def _exported(self, arguments: dict[str, Any]) -> Network:
        def original(x: Tensor) -> Tensor:
            return x.to(first.device, first.dtype) if x.is_floating_point() else x

        first = next(self._original.parameters(), torch.empty(0))
        return self._kept(_key(arguments), lambda: export(self._original, _mapped(original, arguments)))

    def _kept(self, key: Hashable, traced: Callable[[], fx.GraphModule]) -> Network:
        with self._lock:
            if key not in self._networks:
                self._networks[key] = Network(traced(), self.device, self.dtype)
            return self._networks[key]

    def _choice(self, arguments: dict[str, Any]) -> Choice:
        key = (_key(arguments), backends.forced())
        with self._lock:
            if key not in self._choices:
                self._choices[key] = self._choose(arguments)
                if len(self._choices) > SHAPES:
                    self._choices.popitem(last=False)
            self._choices.move_to_end(key)
            return self._choices[key]

    def _choose(self, arguments: dict[str, Any]) -> Choice:
        network = self._network(arguments)
        measures = self.tune and backends.forced() is None and not network.mutates
        apart = measures and self.device.type == "cpu"  # on a GPU a layer by itself says too little about a graph
        shapes, slower = self._shapes(network, arguments, apart)
        programs = {alone: self._program(network, shapes, alone) for alone in dict.fromkeys(((), slower))}
        if not measures:
            return Choice(programs[()], (), None)
        # Layers in a row run as one call, so the whole decides whether one of them is better left out.
        runs = {alone: self._seconds_whole(program, arguments) for alone, program in programs.items()}
        alone = min(runs, key=runs.__getitem__)
        try:
            plain = self._seconds_whole(self._plainly, arguments)
        except RuntimeError:  # a view that channels-last memory does not allow
            return Choice(programs[alone], alone, None)
        if plain < CLEARLY * runs[alone]:
            return Choice(None, alone, (runs[alone], plain))
        if all(one.program is not None for one in self._choices.values()):
            self._plain = None  # nothing needs it
        return Choice(programs[alone], alone, (runs[alone], plain))

    def _shapes(
        self, network: Network, arguments: dict[str, Any], apart: bool
    ) -> tuple[dict[fx.Node, torch.Size], tuple[fx.Node, ...]]:
        """The shapes of the network's maps, and, if measured ``apart``, its groups that are slower as layers."""
        shapes = {
            node: arguments[str(node.target)].shape
            for node in network.nodes
            if node.op == "placeholder" and isinstance(arguments.get(str(node.target)), Tensor)
        }
        slower: list[fx.Node] = []

        def watch(step: Step, values: list[Any]) -> Any:
            value = step.run(values)
            if apart and step.node in network.groups:
                alone, layer = run_group(network.groups[step.node], network), program.replay(step)
                if self._seconds(lambda: alone(values)) < CLEARLY * self._seconds(lambda: layer(values)):
                    slower.append(step.node)
            if isinstance(value, Tensor):
                shapes[step.node] = value.shape
            return value

        program = Program(network, network.groups)
        program(_mapped(torch.clone, arguments), watch)
        return shapes, tuple(slower)

    def _program(self, network: Network, shapes: dict[fx.Node, torch.Size], alone: Collection[fx.Node]) -> Program:
        """The network for these shapes, its groups as layers but for those that run call by call."""
        fused = network.groups.keys() - alone
        writers = {node for node in fused if network.layers[node].writes_to_places}
        return Program(network, fused, plan_places(network.calls, shapes, writers, (self.device, self.dtype)))

    def _seconds_whole(self, run: Callable[[Any], Any], arguments: dict[str, Any]) -> float:
        graphs = Graphs()
        return self._seconds(lambda: self._replayed(graphs, run, arguments))

    def _seconds(self, run: Callable[[], Any]) -> float:
        """The shortest time of a few runs; on a GPU the last of them replay a graph."""
        times: list[float] = []
        while len(times) < TIMED_RUNS and (len(times) < 2 or sum(times) < TIMED_SECONDS):
            start = time.perf_counter()
            run()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            times.append(time.perf_counter() - start)
        return min(times)


def _check_weights(net: nn.Module) -> None:
    """Raises a ``ValueError`` if a parameter or a buffer of ``net`` is not finite or on the meta device."""
    for name, tensor in (*net.named_parameters(), *net.named_buffers()):
        if tensor.is_meta:
            raise ValueError("the network is on the meta device, which holds no weights; load them before freezing")
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"the network's {name} has values that are not finite")


def _key(arguments: Mapping[str, Any]) -> Hashable:
    """What a program depends on."""
    return tuple(
        (name, value.shape, value.dtype)
        if isinstance(value, Tensor)
        else (name, repr(tree_map_only(Tensor, lambda x: (x.shape, x.dtype), value)))
        for name, value in arguments.items()
    )


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among ``values``, and inside them."""
    for value in values:
        yield from (x for x in ((value,) if isinstance(value, Tensor) else tree_leaves(value)) if isinstance(x, Tensor))


def _holds_tensors(value: Any) -> bool:
    return any(True for _ in _tensors([value]))


def _mapped(function: Callable[[Tensor], Tensor], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """``arguments`` with ``function`` of each tensor among and inside them."""
    return {
        name: function(value) if isinstance(value, Tensor) else tree_map_only(Tensor, function, value)
        for name, value in arguments.items()
    }


def _as(y: Any, like: Tensor) -> Any:
    """The result ``y`` in the dtype, on the device and in the memory format of ``like``."""
    if not isinstance(y, Tensor):
        return y
    dtype = like.dtype if y.is_floating_point() else y.dtype
    if y.dim() != 4:
        return y.to(like.device, dtype)
    nchw = like.dim() != 4 or like.is_contiguous()
    return y.to(like.device, dtype).contiguous(memory_format=torch.contiguous_format if nchw else torch.channels_last)
