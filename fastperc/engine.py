"""Trained networks as fast as the device paints: ``freeze``, and the engine that it gives."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastperc import _native, backends
from fastperc.errors import InputError
from fastperc.plan import Plan, cut, forward, parts, plan_of
from fastperc.presets import MINIMUM_SIDE
from fastperc.reference import Window
from fastperc.tiling import Canvas, grid

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
WHOLE_BYTES = 2 << 30  # on a CPU, a pass that holds less is not cut in parts
PART_BYTES = 320 << 20  # what a pass over a part may hold
CARELESS_BYTES = 512 << 20  # up to so much, nobody asks what is free: that takes a while itself
GPU_SHARE = 0.7  # on a GPU, of its free memory, for either
REUSED_BYTES, KEPT_BYTES = 64 << 20, 128 << 20  # memory that a CPU's passes take again and again: a block, in all
BAND_BYTES = 48 << 20  # a map so large is not made as a whole, where that can be spared
BAND_PIXELS = 1 << 15  # of the picture, to a band of rows
GRAPHS = 8  # shapes whose CUDA graphs are kept

Watch = Callable[[Iterable[int], str, int], Iterable[int]]  # shows how work gets on: items, title, total


def unwatched(items: Iterable[int], title: str, total: int) -> Iterable[int]:
    """For work that nobody watches."""
    return items


def freeze(net: nn.Module, dtype: torch.dtype | None = None, device: str | torch.device | None = None) -> Engine:
    """An engine that paints as ``net`` does in eval mode. Its weights are its own: ``net`` may go on training.

    Args:
        net: a :class:`~fastperc.TransformNet` or a :class:`~fastperc.SuperResolutionNet`.
        dtype: what is computed in: float32, bfloat16, float16 or float64. Default: what ``net``'s weights are in.
        device: where. Default: where ``net`` is.

    On a CPU the process keeps some of the memory that a picture took, for the next one takes it again.

    Raises:
        TypeError: another kind of network.
        ValueError: another dtype; weights that are not finite.
    """
    first = next(net.parameters(), torch.empty(0))
    dtype = first.dtype if dtype is None else dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}")
    with torch.no_grad():
        return Engine(plan_of(net, dtype, torch.device(first.device if device is None else device)))


class Engine:
    """A frozen network: call it with images. Several threads may do so at once.

        RGB in 0–1, floating-point [N, 3, H, W]                 → the same in the same dtype, not clamped
        levels, uint8 [N, 3, H, W], [N, H, W, 3] or [H, W, 3]   → the same, clamped and rounded to the nearest

    H and W are 16 or more; the picture's are ``scale`` times as many. The picture comes to where the image lies, on
    whatever device it is painted.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.scale, self.dtype, self.device = plan.scale, plan.dtype, plan.steps[0].weight.device
        self._graphs = Graphs()

    def __reduce__(self) -> tuple[Any, ...]:  # copies and pickles begin without graphs
        return Engine, (self.plan,)

    @torch.no_grad()
    def __call__(self, images: Tensor, tile: int | str = "auto") -> Tensor:
        """The pictures that ``images`` become.

        Args:
            images: see :class:`Engine`.
            tile: ``"auto"`` paints part by part what would take too much memory as a whole; a number does so in parts
                of that many pixels of the image a side; ``"off"`` never. The picture is the same but for rounding.

        Raises:
            ValueError: another shape or dtype; pixels that are not finite (on a GPU these are not looked for, and stay
                what they are); no such tile.
            InputError: it takes more memory than there is.
        """
        image = as_nchw(images)
        image = image.to(self.device, non_blocking=True)
        side = self._side(image, tile)
        if side is None:
            picture = self._whole(image, image.dtype)
        else:
            picture = self._empty(image, image.dtype)
            for one, result in zip(image.split(1), picture.split(1)):
                for region, part in self._tiles(one, side, image.dtype, unwatched):
                    cut(result, Window(0, 0, *result.shape[2:]), region).copy_(part)
        return as_given(picture, images).to(images.device)

    @torch.no_grad()
    def tiles(
        self, image: Tensor, tile: int | str = "auto", dtype: torch.dtype | None = None, watch: Watch = unwatched
    ) -> Iterator[tuple[Window, Tensor]]:
        """The picture part by part, for those too large to be held as a whole: where in it each lies, and the part.

        Args:
            image: one, as for a call.
            tile: as for a call.
            dtype: of the parts, [1, 3, h, w]: uint8 levels, or RGB in 0–1. Default: as the image's.
            watch: shows how the work gets on, as ``fastperc.progress.track`` does; an item passes through it for each
                part, and for each that is measured first.

        Raises:
            ValueError, InputError: as a call does.
        """
        image = as_nchw(image)
        if len(image) != 1:
            raise ValueError(f"expected one image, got {len(image)}")
        image, dtype = image.to(self.device, non_blocking=True), dtype or image.dtype
        side = self._side(image, tile)
        if side is None:
            yield Window(0, 0, image.shape[2] * self.scale, image.shape[3] * self.scale), self._whole(image, dtype)
        else:
            yield from self._tiles(image, side, dtype, watch)

    def _tiles(self, image: Tensor, side: int, dtype: torch.dtype, watch: Watch) -> Iterator[tuple[Window, Tensor]]:
        canvas = Canvas(self.plan, image, side)
        regions = grid(image.shape[2] * self.scale, image.shape[3] * self.scale, side * self.scale)
        total = sum(map(len, canvas.to_measure.values())) + len(regions)
        ticks = iter(watch(range(total), "painting", total))
        canvas.measure(ticks)
        for region in regions:
            next(ticks)
            part = torch.empty(1, 3, region.height, region.width, dtype=dtype, device=self.device)
            canvas.paint(region, part)
            yield region, part
        next(ticks, None)  # the last is done

    def _whole(self, image: Tensor, dtype: torch.dtype) -> Tensor:
        """The pictures in one pass; on a GPU the replay of a CUDA graph."""
        if len(image) == 0:
            return self._empty(image, dtype)
        if self.device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
            return self._graphs.run(
                (image.shape, image.stride(), image.dtype, dtype), image, lambda x: self._pass(x, dtype)
            )
        if self.device.type == "cpu":  # not for parts, which are to take little memory: this may take more
            _native.reuse_freed_memory(REUSED_BYTES, KEPT_BYTES)
        return self._pass(image, dtype)

    def _pass(self, image: Tensor, dtype: torch.dtype) -> Tensor:
        picture, steps = self._empty(image, dtype), self.plan.steps
        sizes = self.plan.sizes(*image.shape[2:])
        whole = Window(0, 0, *picture.shape[2:])
        if not self._in_bands(sizes):
            return forward(self.plan, steps, parts(steps, sizes, whole), image, picture)

        # The widest map, between the last two steps, is never there as a whole.
        inside, last, source = steps[:-2], steps[-2:], Window(0, 0, *sizes[-3])
        x = forward(self.plan, inside, parts(inside, sizes, source), image, None)
        rows = max(BAND_PIXELS // whole.width // 2 * 2, MINIMUM_SIDE)
        bands = [Window(top, 0, min(rows, whole.height - top), whole.width) for top in range(0, whole.height, rows)]
        for one, result in zip(x.split(1), picture.split(1)):
            for band in bands:
                doing = parts(last, sizes[-3:], band)
                forward(self.plan, last, doing, cut(one, source, doing[0].source), cut(result, whole, band))
        return picture

    def _in_bands(self, sizes: list[tuple[int, int]]) -> bool:
        """Whether the last two steps make the picture some rows at a time: on a CPU, where the map between them is
        large and no norm wants all of it."""
        step = self.plan.steps[-2]
        taken = math.prod(sizes[-2]) * step.channels * self.dtype.itemsize
        return self.device.type == "cpu" and step.norm is None and taken >= BAND_BYTES

    def _empty(self, image: Tensor, dtype: torch.dtype) -> Tensor:
        """Memory for the picture, laid out as ``image`` is."""
        n, c, h, w = image.shape
        together = image.stride(1) == 1 and image.stride(3) == c
        layout = torch.channels_last if together else torch.contiguous_format
        shape = (n, c, h * self.scale, w * self.scale)
        return torch.empty(shape, dtype=dtype, device=self.device, memory_format=layout)

    def _side(self, image: Tensor, tile: int | str) -> int | None:
        """How many pixels of ``image`` a side the parts have, or ``None`` for the whole at once.

        Raises:
            ValueError: ``tile`` is none of what it can be.
            InputError: not enough memory.
        """
        n, _, height, width = image.shape
        frame = math.prod(self.plan.sizes(height, width)[0])
        needed = n * frame * self.plan.bytes_per_pixel
        result = n * 3 * height * width * self.scale**2 * image.element_size()
        recording = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()  # by the caller
        if tile in ("auto", "off") and (recording or needed + result <= CARELESS_BYTES):
            return None
        free = free_memory(self.device)
        if result > free:
            raise InputError(
                f"a picture of {width * self.scale}×{height * self.scale} takes {gigabytes(result)}, "
                f"{gigabytes(free)} are free; make the image smaller"
            )
        if tile == "off":
            if needed + result > free:
                raise InputError(
                    f"{width}×{height} at once takes about {gigabytes(needed)}, {gigabytes(free)} are free; "
                    f"paint it in parts (tile 'auto', or a number of pixels) or make it smaller"
                )
            return None
        if tile == "auto":
            on_gpu = self.device.type == "cuda"
            if needed <= (GPU_SHARE * free if on_gpu else min(WHOLE_BYTES, free / 2)):
                return None
            held = GPU_SHARE * free if on_gpu else min(PART_BYTES, free / 4)
            return max(int((held / self.plan.bytes_per_pixel) ** 0.5), 4 * MINIMUM_SIDE)
        if not isinstance(tile, int) or tile < MINIMUM_SIDE:
            raise ValueError(f"tile must be 'auto', 'off' or a number of pixels from {MINIMUM_SIDE} up, got {tile!r}")
        return tile if tile < max(height, width) else None

    def explain(self, height: int = 256, width: int = 256) -> str:
        """A line for each layer: what runs it, and why that. Paints an image of that size to find out."""
        with backends.recorded() as choices, torch.no_grad():
            self._pass(torch.zeros(1, 3, height, width, device=self.device), torch.float32)
        lines = [f"{'layer':<18}{'kernel':<23}{'backend':<11}reason"]
        lines += [f"{layer:<18}{kernel:<23}{backend:<11}{reason}" for layer, kernel, backend, reason in choices]
        return "\n".join(lines)

    def stream(self, frames: Iterable[Tensor]) -> Iterator[Tensor]:
        """The pictures of ``frames``, uint8 [H, W, 3] on the CPU, one by one: for video.

        On a GPU the copies there and back are done while other frames are painted; a picture comes out once the next
        two frames are on their way.

        Raises:
            ValueError: as a call does.
        """
        if self.device.type != "cuda":
            yield from map(self, frames)
            return
        pipeline = Pipeline(self)
        for frame in frames:
            yield from pipeline.put(frame)
        yield from pipeline.drain()


def as_nchw(images: Tensor) -> Tensor:
    """``images`` as [N, 3, H, W].

    Raises:
        ValueError: another shape or dtype, or on the CPU pixels that are not finite.
    """
    if not isinstance(images, Tensor):
        raise ValueError(f"expected a tensor (torch.from_numpy makes one of an array), got {type(images).__name__}")
    if images.dtype != torch.uint8 and images.dtype not in DTYPES:
        raise ValueError(f"expected RGB in 0–1 as floating-point numbers, or uint8 levels, got {images.dtype}")
    image = images
    if images.dtype == torch.uint8 and images.dim() in (3, 4) and images.shape[-1] == 3:
        image = (images[None] if images.dim() == 3 else images).permute(0, 3, 1, 2)
    if image.dim() != 4 or image.shape[1] != 3 or min(image.shape[2:]) < MINIMUM_SIDE:
        raise ValueError(
            f"expected RGB images [N, 3, H, W], or uint8 [N, H, W, 3] or [H, W, 3], with H and W of at least "
            f"{MINIMUM_SIDE}, got {images.dtype} {list(images.shape)}"
        )
    looked_at = image.is_floating_point() and image.device.type == "cpu" and image.numel() > 0
    if looked_at and not torch.stack(image.aminmax()).isfinite().all():
        raise ValueError("the image has pixels that are NaN or infinite")
    return image


def as_given(picture: Tensor, images: Tensor) -> Tensor:
    """``picture`` [N, 3, H, W] in the order of axes that ``images`` came in."""
    if images.dtype != torch.uint8 or images.shape[-1] != 3:
        return picture
    picture = picture.permute(0, 2, 3, 1)
    return picture[0] if images.dim() == 3 else picture


def free_memory(device: torch.device) -> float:
    """Bytes that can still be had, or infinitely many where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return next(1024 * float(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return math.inf


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB"


class Graph(NamedTuple):
    """A pass recorded once: it reads ``image`` and writes ``picture``."""

    graph: torch.cuda.CUDAGraph
    image: Tensor
    picture: Tensor


class Graphs:
    """The CUDA graphs of an engine's passes, one for each shape, the least recently used given up first.

    They take turns, whatever streams and threads ask for them, and so share what memory they need on the way.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[Hashable, Graph] = OrderedDict()
        self._lock = threading.Lock()
        self._done: torch.cuda.Event | None = None  # with the last turn
        self._pool: Any = None

    def run(self, key: Hashable, image: Tensor, paint: Callable[[Tensor], Tensor]) -> Tensor:
        """``paint(image)``, of which there is or will be a graph called ``key``."""
        with self._lock, torch.cuda.device(image.device):
            stream = torch.cuda.current_stream()
            if self._done is not None:
                stream.wait_event(self._done)
            kept = self._kept.pop(key, None) or self._record(image, paint)
            self._kept[key] = kept
            kept.image.copy_(image)
            kept.graph.replay()
            picture = kept.picture.clone()
            self._done = stream.record_event()
            if len(self._kept) > GRAPHS:
                self._done.synchronize()
                self._kept.popitem(last=False)
        return picture

    def _record(self, image: Tensor, paint: Callable[[Tensor], Tensor]) -> Graph:
        static = torch.empty_like(image).copy_(image)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # kernels are compiled, weights packed and libraries choose before the recording
                paint(static)
        torch.cuda.current_stream().wait_stream(stream)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            picture = paint(static)
        return Graph(graph, static, picture)


class Pipeline:
    """Frames on their way through a GPU: up, painted, down, each on a stream of its own."""

    AHEAD = 2  # frames under way when a picture is asked for

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._up, self._paint, self._down = (torch.cuda.Stream(engine.device) for _ in range(3))
        self._under_way: deque[tuple[Tensor, torch.cuda.Event, Tensor]] = deque()

    def put(self, frame: Tensor) -> Iterator[Tensor]:
        """Sends ``frame`` off; gives the picture that is due, if one is."""
        as_nchw(frame)
        pinned = frame.pin_memory()
        with torch.cuda.stream(self._up):
            image = pinned.to(self._engine.device, non_blocking=True)
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
        self._under_way.append((result, done, pinned))
        if len(self._under_way) > self.AHEAD:
            yield self._next()

    def drain(self) -> Iterator[Tensor]:
        """The pictures still under way."""
        while self._under_way:
            yield self._next()

    def _next(self) -> Tensor:
        result, done, _ = self._under_way.popleft()
        done.synchronize()
        return result
