"""CUDA graphs of an engine's passes, and the pipeline that copies frames while others are computed."""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from fastperc.engine.frames import as_nchw

T = TypeVar("T")
GRAPHS = 8  # the shapes whose CUDA graphs are kept
SHAPES = 64  # the shapes that are remembered


def record(run: Callable[[], T], stream: torch.cuda.Stream, pool: Any = None) -> tuple[torch.cuda.CUDAGraph, T]:
    """Records ``run`` as a CUDA graph on ``stream``; computes nothing.

    Args:
        run: launches what the graph computes; all of it has run before on ``stream``, so that libraries have chosen.
        stream: not the default one.
        pool: of ``torch.cuda.graph_pool_handle``, for graphs that never run at the same time. Default: a new one.

    Returns:
        The graph, and what ``run`` returned: each replay overwrites it.

    Raises:
        RuntimeError: an operation in ``run`` cannot be recorded. ``run`` can then be called without recording.
    """
    pool = pool or torch.cuda.graph_pool_handle()
    graph = torch.cuda.CUDAGraph()
    first: BaseException | None = None
    try:
        # The outer block restores the current stream: the inner one does not if the capture failed. "thread_local":
        # other threads may go on pinning memory.
        capture = torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local")
        with torch.cuda.stream(stream), capture:
            try:
                result = run()
            except BaseException as error:
                first = error
                raise
    except BaseException as error:
        _end_failed_capture(stream.device, pool)
        raise first or error from None  # ending the capture raised another error, which says less
    finally:
        del first  # its traceback holds this frame, and tensors of the failed run
    return graph, result


def _end_failed_capture(device: torch.device, pool: Any) -> None:
    """Ends what PyTorch leaves under way when a capture fails.

    Up to torch 2.11 at least, ``capture_end`` raises the capture's error before it tells the allocator and the random
    number generator that the capture is over. Then freeing memory and drawing random numbers would fail.
    """
    try:
        torch._C._cuda_endAllocateToPool(device.index, pool)
    except (AttributeError, RuntimeError):  # PyTorch has done it itself, and so releases the pool with the graph
        pass
    else:
        torch._C._cuda_releasePool(device.index, pool)
    with suppress(RuntimeError):  # the error that the caller is told is that of the capture
        generator = torch.cuda.default_generators[device.index]
        offset = generator.get_offset()
        try:
            torch.rand((), device=device)
        except RuntimeError:  # a copy of the generator's state is not in a capture
            generator.graphsafe_set_state(generator.clone_state())
        generator.set_offset(offset)


def reason_of(error: RuntimeError) -> str:
    """``error`` in a line, for a message."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


class Graph(NamedTuple):
    """A recorded pass: it reads the tensors in ``inputs`` and writes those in ``result``."""

    graph: torch.cuda.CUDAGraph
    inputs: Any
    result: Any


class Graphs:
    """The CUDA graphs of an engine's passes, one for each shape; the least recently used is dropped first.

    A shape's second call records its graph: for a single picture that would take longer than it saves. Only one runs
    at a time, also with several streams and threads, so all share one pool of memory. If a pass cannot be recorded,
    every pass runs operation by operation from then on, after a warning that says why.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[Hashable, Graph] = OrderedDict()
        self._seen: OrderedDict[Hashable, None] = OrderedDict()
        self._lock = threading.Lock()
        self._done: torch.cuda.Event | None = None  # recorded after the last replay
        self._pool: Any = None
        self._may_record = True

    def run(self, key: Hashable, inputs: Any, paint: Callable[[Any], Any]) -> Any:
        """``paint(inputs)``, tensors or containers of them; from the second call with a ``key`` on by its graph."""
        if self._is_new(key):
            return paint(inputs)
        with self._lock, torch.cuda.device(_device_of(inputs)):
            stream = torch.cuda.current_stream()
            if self._done is not None:
                stream.wait_event(self._done)
            kept = self._kept.pop(key, None) or self._try_to_record(inputs, paint)
            if kept is None:
                return paint(inputs)
            self._kept[key] = kept
            for static, tensor in zip(_tensors(kept.inputs), _tensors(inputs)):
                static.copy_(tensor)
            kept.graph.replay()
            result = tree_map_only(Tensor, torch.clone, kept.result)
            self._done = stream.record_event()
            if len(self._kept) > GRAPHS:
                self._done.synchronize()
                self._kept.popitem(last=False)
        return result

    def _is_new(self, key: Hashable) -> bool:
        """Whether ``key`` is seen for the first time."""
        with self._lock:
            new = key not in self._seen
            self._seen[key] = None
            self._seen.move_to_end(key)
            if len(self._seen) > SHAPES:
                self._seen.popitem(last=False)
        return new

    def _try_to_record(self, inputs: Any, paint: Callable[[Any], Any]) -> Graph | None:
        """The graph, or ``None`` if it cannot be recorded."""
        try:
            return self._record(inputs, paint) if self._may_record else None
        except torch.OutOfMemoryError:  # for this picture: a graph keeps memory of its own
            return None
        except RuntimeError as error:
            self._may_record = False
            warnings.warn(f"painting goes on without CUDA graphs: {reason_of(error)}", stacklevel=2)
            return None

    @torch.inference_mode(False)  # tensors made in that mode could not be written outside of it
    @torch.no_grad()
    def _record(self, inputs: Any, paint: Callable[[Any], Any]) -> Graph:
        static = tree_map_only(Tensor, lambda x: torch.empty_like(x).copy_(x), inputs)
        # Of the image's GPU: the stream that torch.cuda.graph takes by default belongs to the first one.
        stream = torch.cuda.Stream(_device_of(inputs))
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles kernels, packs weights and lets libraries choose, before the recording
                paint(static)
        torch.cuda.current_stream().wait_stream(stream)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph, result = record(lambda: paint(static), stream, self._pool)
        return Graph(graph, static, result)


def _tensors(inputs: Any) -> list[Tensor]:
    return [x for x in tree_leaves(inputs) if isinstance(x, Tensor)]


def _device_of(inputs: Any) -> torch.device:
    return _tensors(inputs)[0].device


class Pipeline:
    """Frames on their way through a GPU: uploaded, computed, downloaded, each on a stream of its own."""

    AHEAD = 2  # frames under way before a picture is waited for

    def __init__(self, engine: Callable[..., Tensor], device: torch.device) -> None:
        self._engine, self._device = engine, device
        self._up, self._paint, self._down = (torch.cuda.Stream(device) for _ in range(3))
        self._in_flight: deque[tuple[Tensor, torch.cuda.Event, Tensor]] = deque()

    def put(self, frame: Tensor) -> Iterator[Tensor]:
        """Starts ``frame``; yields the picture that is due, if one is."""
        as_nchw(frame)
        pinned = frame.pin_memory()
        with torch.cuda.stream(self._up):
            image = pinned.to(self._device, non_blocking=True)
        self._paint.wait_stream(self._up)
        with torch.cuda.stream(self._paint):
            image.record_stream(self._paint)
            picture = self._engine(image, tile="off")
        self._down.wait_stream(self._paint)
        with torch.cuda.stream(self._down):
            picture.record_stream(self._down)
            result = torch.empty(picture.shape, dtype=picture.dtype, pin_memory=True)
            result.copy_(picture, non_blocking=True)
            done = torch.cuda.Event()
            done.record()
        self._in_flight.append((result, done, pinned))
        if len(self._in_flight) > self.AHEAD:
            yield self._next()

    def drain(self) -> Iterator[Tensor]:
        """The pictures still in flight."""
        while self._in_flight:
            yield self._next()

    def _next(self) -> Tensor:
        result, done, _ = self._in_flight.popleft()
        done.synchronize()
        return result
