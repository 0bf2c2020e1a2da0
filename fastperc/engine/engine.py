"""Trained networks as fast as the device paints: ``freeze``, and the engine that it gives."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastperc import _native, backends
from fastperc.devices import free_memory, gigabytes
from fastperc.engine.cuda import Graphs, Pipeline
from fastperc.engine.frames import DTYPES, as_given, as_nchw
from fastperc.engine.plan import Plan, cut, forward, parts, plan_of
from fastperc.engine.tiling import Canvas, grid
from fastperc.errors import InputError
from fastperc.presets import MINIMUM_SIDE
from fastperc.progress import Watch, unwatched
from fastperc.types import Window

WHOLE_BYTES = 2 << 30  # on a CPU, a pass that holds less is not cut in parts
PART_BYTES = 320 << 20  # what a pass over a part may hold
CARELESS_BYTES = 512 << 20  # up to so much, nobody asks what is free: that takes a while itself
GPU_SHARE = 0.7  # on a GPU, of its free memory, for either
REUSED_BYTES, KEPT_BYTES = 64 << 20, 128 << 20  # memory that a CPU's passes take again and again: a block, in all
BAND_BYTES = 48 << 20  # a map so large is not made as a whole, where that can be spared
BAND_PIXELS = 1 << 15  # of the picture, to a band of rows


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
        pipeline = Pipeline(self, self.device)
        for frame in frames:
            yield from pipeline.put(frame)
        yield from pipeline.drain()
