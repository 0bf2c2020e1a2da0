"""``freeze``, and the engine that it returns: a trained network as fast as the device runs it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastperc import _native, backends
from fastperc.devices import find_device, free_memory, gigabytes, widest_dtype
from fastperc.engine import stroke as strokes
from fastperc.engine.cuda import Graphs, Pipeline
from fastperc.engine.frames import DTYPES, as_given, as_nchw, given
from fastperc.engine.frozen_net import FrozenNet
from fastperc.engine.plan import OWN, Plan, cut, forward, parts, plan_of
from fastperc.engine.tiling import Canvas, grid
from fastperc.errors import InputError
from fastperc.models.common import unwrapped
from fastperc.modules.chain import exporting
from fastperc.presets import MINIMUM_SIDE
from fastperc.progress import Watch, unwatched
from fastperc.types import Window

WHOLE_BYTES = 2 << 30  # on a CPU, a pass that holds less is not tiled
TILE_BYTES = 320 << 20  # the most that a pass over a tile holds
UNCHECKED_BYTES = 512 << 20  # a pass that holds less does not ask for the free memory first, which takes time
GPU_SHARE = 0.7  # on a GPU, the share of its free memory for a pass
REUSED_BYTES, KEPT_BYTES = 64 << 20, 128 << 20  # memory that a CPU's passes use again: largest block, in all
BAND_BYTES = 48 << 20  # a map of this size is computed in bands of rows, where that is possible
BAND_PIXELS = 1 << 15  # of the picture, in a band
GRAPH_PIXELS = 1 << 25  # on a GPU, larger pictures with another stroke than 1 are brought to their size in bands


def freeze(
    net: nn.Module,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    example: Any = None,
    tune: bool = True,
) -> Any:
    """What computes ``net`` in eval mode as fast as the device can. It copies the weights: ``net`` may go on training.

    Args:
        net: any network, also in torch.compile, DataParallel and the like.
        dtype: of the computation: float32, bfloat16, float16 or float64. Default: that of ``net``'s weights. A CPU
            where half precision is slow computes in float32 instead; ``explain()`` says so.
        device: default: that of ``net``.
        example: an input, or a tuple of inputs, of a network that ``torch.fx`` cannot trace: ``torch.export`` traces
            it then, for each shape anew.
        tune: whether the first call of a shape measures, on a CPU, what is faster: fused layers, or ``net`` itself in
            channels-last memory.

    Returns:
        An :class:`Engine` of a :class:`~fastperc.TransformNet` or a :class:`~fastperc.SuperResolutionNet`, which takes
        pictures; of any other network a :class:`~fastperc.engine.frozen_net.FrozenNet`, which takes what the network
        takes. ``example`` and ``tune`` are for the latter.

    On a CPU the process keeps some of the memory of a picture for the next one.

    Raises:
        TypeError: a network that cannot be traced; the message names the line. One of this library with layers that
            are not.
        ValueError: another dtype; weights that are not finite, or on the meta device.
        InputError: no such device.
    """
    if not isinstance(net, nn.Module):
        raise TypeError(f"freeze takes a torch.nn.Module, got {type(net).__name__}")
    first = next(net.parameters(), torch.empty(0))
    dtype = first.dtype if dtype is None else dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype!r}")
    target = first.device if device is None else find_device(str(device))
    if torch.promote_types(dtype, widest_dtype(target)) != widest_dtype(target):
        raise ValueError(f"{target.type} has no {str(dtype).removeprefix('torch.')}; choose another dtype or the CPU")
    if not isinstance(unwrapped(net), OWN):
        return FrozenNet(unwrapped(net), dtype, target, example, tune)
    with torch.no_grad():
        return Engine(plan_of(net, dtype, target))


class Engine:
    """A frozen network: call it with images. Several threads may do so at once.

        RGB in 0–1, floating-point [N, 3, H, W]                 → the same in the same dtype, not clamped
        levels, uint8 [N, 3, H, W], [N, H, W, 3] or [H, W, 3]   → the same, clamped and rounded to the nearest
        a NumPy array of such a shape and dtype                 → a NumPy array
        a PIL image, or the path of an image file               → a PIL image, upright, transparent where it was

    H and W are 16 or more; the picture's are ``scale`` times as large. The picture is returned on the image's device,
    whichever device computes it.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.scale, self.dtype, self.device = plan.scale, plan.dtype, plan.steps[0].weight.device
        self._graphs = Graphs()

    def __reduce__(self) -> tuple[Any, ...]:  # copies and pickles begin without graphs
        return Engine, (self.plan,)

    @torch.no_grad()
    def __call__(self, images: Any, tile: int | str = "auto", stroke: float | str = 1) -> Any:
        """The pictures of ``images``.

        Args:
            images: see :class:`Engine`.
            tile: ``"auto"`` uses tiles where the whole picture would take too much memory; a number uses tiles of that
                many pixels of the image a side; ``"off"`` uses none. The picture is the same but for rounding.
            stroke: strokes this many times as large, from 0.1 to 100: the image is painted at so small a size, and
                the painting brought back, with detail of the image. ``"auto"``: the longer side / 1000, at least 1.

        Raises:
            ValueError: another shape or dtype; pixels that are not finite or far from 0–1 (not checked on a GPU, where
                those that are not finite stay so); no such tile or stroke; a stroke for a network that enlarges.
            InputError: there is not enough memory, a file cannot be read, or less than 16 pixels a side would be
                painted.
            RuntimeError: PyTorch exports or traces the call.
        """
        if exporting():
            raise RuntimeError("an engine cannot be exported; export the network that was frozen, in eval mode")
        images, like = given(images)
        image = as_nchw(images)
        image = image.to(self.device, non_blocking=True)
        size = self._painted_size(image, stroke)
        side = self._side(image, tile, size)
        if side is None and self._in_one_piece(image, size):
            picture = self._whole(image, image.dtype, size)
        else:
            picture = self._empty(image, image.dtype)
            for one, result in zip(image.split(1), picture.split(1)):
                for region, part in self._regions(one, side, image.dtype, unwatched, size):
                    cut(result, Window(0, 0, *result.shape[2:]), region).copy_(part)
        return like(as_given(picture, images).to(images.device))

    @torch.no_grad()
    def tiles(
        self,
        image: Any,
        tile: int | str = "auto",
        dtype: torch.dtype | None = None,
        watch: Watch = unwatched,
        stroke: float | str = 1,
    ) -> Iterator[tuple[Window, Tensor]]:
        """The picture tile by tile, for pictures too large to hold as a whole: the place of each tile, and the tile.

        Args:
            image: one, as for a call.
            tile: as for a call.
            dtype: of the tiles, [1, 3, h, w]: uint8 levels, or RGB in 0–1. Default: the image's.
            watch: shows progress, as ``fastperc.progress.track`` does; an item passes through it for each tile, and
                for each tile that is measured first.

        Raises:
            ValueError, InputError: as a call does.
        """
        image = as_nchw(given(image).tensor)
        if len(image) != 1:
            raise ValueError(f"expected one image, got {len(image)}")
        image, dtype = image.to(self.device, non_blocking=True), dtype or image.dtype
        size = self._painted_size(image, stroke)
        yield from self._regions(image, self._side(image, tile, size), dtype, watch, size)

    def _regions(
        self, image: Tensor, side: int | None, dtype: torch.dtype, watch: Watch, size: strokes.Size | None
    ) -> Iterator[tuple[Window, Tensor]]:
        """The picture of one image, painted in tiles if there is a ``side``, at ``size`` if that is another one."""
        if size is not None:
            wide = torch.promote_types(self.dtype, torch.float32)
            yield from strokes.tiles(image, size, dtype, lambda x: self._regions(x, side, wide, watch, None))
        elif side is None:
            yield Window(0, 0, image.shape[2] * self.scale, image.shape[3] * self.scale), self._whole(image, dtype)
        else:
            yield from self._tiles(image, side, dtype, watch)

    def _painted_size(self, image: Tensor, stroke: float | str) -> strokes.Size | None:
        """The size at which ``image`` is painted, or ``None`` for its own."""
        if self.scale != 1 and stroke != 1:
            raise ValueError(f"a network that enlarges takes no stroke but 1, got {stroke!r}")
        height, width = image.shape[2:]
        size = strokes.painted_size(height, width, stroke)
        return None if size == (height, width) else size

    def _in_one_piece(self, image: Tensor, size: strokes.Size | None) -> bool:
        """Whether the whole picture is computed at once: on a GPU, unless bringing it to its size takes much memory."""
        pixels = len(image) * math.prod(image.shape[2:])
        return size is None or len(image) == 0 or (self.device.type == "cuda" and pixels <= GRAPH_PIXELS)

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
        next(ticks, None)  # the last tile is done

    def _whole(self, image: Tensor, dtype: torch.dtype, size: strokes.Size | None = None) -> Tensor:
        """The pictures in one pass, painted at ``size``; on a GPU by replaying a CUDA graph."""
        if len(image) == 0:
            return self._empty(image, dtype)
        if self.device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
            key = image.shape, image.stride(), image.dtype, dtype, size
            return self._graphs.run(key, image, lambda x: self._painted(x, dtype, size))
        if self.device.type == "cpu":  # not for tiles, which must take little memory: this may take more
            _native.reuse_freed_memory(REUSED_BYTES, KEPT_BYTES)
        return self._painted(image, dtype, size)

    def _painted(self, image: Tensor, dtype: torch.dtype, size: strokes.Size | None) -> Tensor:
        if size is None:
            return self._pass(image, dtype)
        wide = torch.promote_types(self.dtype, torch.float32)
        return strokes.painted_whole(image, size, dtype, lambda x: self._pass(x, wide))

    def _pass(self, image: Tensor, dtype: torch.dtype) -> Tensor:
        picture, steps = self._empty(image, dtype), self.plan.steps
        sizes = self.plan.sizes(*image.shape[2:])
        whole = Window(0, 0, *picture.shape[2:])
        if not self._in_bands(sizes):
            return forward(self.plan, steps, parts(steps, sizes, whole), image, picture)

        # The largest map, between the last two steps, is never in memory as a whole.
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
        """Whether the last two steps compute the picture in bands of rows: on a CPU, if the map between them is large
        and no norm needs all of it."""
        step = self.plan.steps[-2]
        taken = math.prod(sizes[-2]) * step.channels * self.dtype.itemsize
        return self.device.type == "cpu" and step.norm is None and taken >= BAND_BYTES

    def _empty(self, image: Tensor, dtype: torch.dtype) -> Tensor:
        """Memory for the picture, in the memory format of ``image``."""
        n, c, h, w = image.shape
        channels_last = image.stride(1) == 1 and image.stride(3) == c
        layout = torch.channels_last if channels_last else torch.contiguous_format
        shape = (n, c, h * self.scale, w * self.scale)
        return torch.empty(shape, dtype=dtype, device=self.device, memory_format=layout)

    def _side(self, image: Tensor, tile: int | str, size: strokes.Size | None) -> int | None:
        """The side of the tiles in pixels of ``image`` at ``size``, or ``None`` for one pass over the whole.

        Raises:
            ValueError: ``tile`` is no valid value.
            InputError: not enough memory.
        """
        n, (height, width) = len(image), size or image.shape[2:]
        frame = math.prod(self.plan.sizes(height, width)[0])
        needed = n * frame * self.plan.bytes_per_pixel
        result = n * 3 * height * width * self.scale**2 * image.element_size()
        recording = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()  # by the caller
        if tile in ("auto", "off") and (recording or needed + result <= UNCHECKED_BYTES):
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
                    f"paint it in tiles (tile 'auto', or a number of pixels) or make it smaller"
                )
            return None
        if tile == "auto":
            on_gpu = self.device.type == "cuda"
            if needed <= (GPU_SHARE * free if on_gpu else min(WHOLE_BYTES, free / 2)):
                return None
            allowed = GPU_SHARE * free if on_gpu else min(TILE_BYTES, free / 4)
            return max(int((allowed / self.plan.bytes_per_pixel) ** 0.5), 4 * MINIMUM_SIDE)
        if not isinstance(tile, int) or tile < MINIMUM_SIDE:
            raise ValueError(f"tile must be 'auto', 'off' or a number of pixels from {MINIMUM_SIDE} up, got {tile!r}")
        return tile if tile < max(height, width) else None

    def explain(self, height: int = 256, width: int = 256) -> str:
        """A line for each layer: what runs it, and why. Runs an image of that size to find out."""
        with backends.recorded() as choices, torch.no_grad():
            self._pass(torch.zeros(1, 3, height, width, device=self.device), torch.float32)
        lines = [f"{'layer':<18}{'kernel':<23}{'backend':<11}reason"]
        if self.plan.asked_for is not None:
            asked_for = str(self.plan.asked_for).removeprefix("torch.")
            lines.insert(0, f"{asked_for} stored, float32 computed: this processor is slow in {asked_for}")
        lines += [f"{one.layer:<18}{one.operation:<23}{one.backend:<11}{one.reason}" for one in choices]
        return "\n".join(lines)

    def stream(self, frames: Iterable[Any], stroke: float | str = 1) -> Iterator[Any]:
        """The pictures of ``frames``, uint8 [H, W, 3] on the CPU or the like, one by one, for video.

        On a GPU, frames are copied to it and back while others are computed; a picture is returned once the next two
        frames are on their way. ``stroke`` is that of a call.

        Raises:
            ValueError, InputError: as a call does.
        """
        if self.device.type != "cuda":
            yield from (self(frame, stroke=stroke) for frame in frames)
            return
        pipeline, likes = Pipeline(partial(self, stroke=stroke), self.device), deque[Any]()
        for frame in frames:
            tensor, like = given(frame)
            likes.append(like)
            for picture in pipeline.put(tensor):
                yield likes.popleft()(picture)
        for picture in pipeline.drain():
            yield likes.popleft()(picture)
