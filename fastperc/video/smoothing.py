"""Less flicker: still parts of a clip keep what was painted there before. And a measure of flicker."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

MOVING = 32.0  # levels: with strength 1, a place whose input changed by so much is painted anew
SIDE = 5  # pixels: the input's change is the mean over a square of this side
STILL = 2  # levels: an input that changes by no more counts as still when flicker is measured


class Smoother:
    """Blends each picture with the last one, at each pixel by how little the input changed there.

    Where the input did not change within two pixels, the picture is exactly the last one. From there the share of the
    last picture falls to nothing where the input changed by ``MOVING * strength`` levels, in the channel that changed
    most, as a mean over the ``SIDE``² pixels around. The input is compared with a reference that is blended like the
    pictures, so that slow changes add up and nothing old stays behind.

    Args:
        strength: above 0, up to 1.
        scale: how many times larger than the input the pictures are.
    """

    def __init__(self, strength: float, scale: int = 1) -> None:
        self.range, self.scale = MOVING * strength, scale
        self._input: Tensor | None = None
        self._picture: Tensor | None = None

    def __call__(self, levels: Tensor, picture: Tensor) -> Tensor:
        """The smoothed picture of the next frame.

        Args:
            levels: the input, uint8 [H, W, 3].
            picture: what was painted, uint8 [scale·H, scale·W, 3].
        """
        new_input, new_picture = levels.float(), picture.float()
        if self._input is not None and self._picture is not None and self._input.shape == new_input.shape:
            share = self._share_of_last(new_input, self._input)
            new_input = new_input.lerp(self._input, share)
            if self.scale > 1:
                share = share.repeat_interleave(self.scale, 0).repeat_interleave(self.scale, 1)
            new_picture = new_picture.lerp(self._picture, share)
        self._input, self._picture = new_input, new_picture
        return new_picture.round().to(torch.uint8)

    def _share_of_last(self, levels: Tensor, last: Tensor) -> Tensor:
        """How much of the last picture each pixel keeps, from 0 to 1: [H, W, 1]."""
        change = (levels - last).abs().amax(dim=2)[None, None]
        change = F.avg_pool2d(change, SIDE, 1, SIDE // 2, count_include_pad=False)
        return (1 - change / self.range).clamp_(0, 1)[0, 0, :, :, None]


def flicker(frames: Iterable[Tensor], pictures: Iterable[Tensor]) -> float:
    """The mean absolute change from picture to picture, in levels, where the input changes by ``STILL`` at most.

    Args:
        frames: the input, each uint8 [H, W, 3].
        pictures: what was painted of each, of the same shape or a whole number of times as large.

    Returns:
        The mean over pixels, channels and pairs of successive frames; NaN if no pixel is still.
    """
    total, count = 0.0, 0
    last: tuple[Tensor, Tensor] | None = None
    for frame, picture in zip(frames, pictures):
        frame, picture = frame.int(), picture.int()
        if last is not None:
            still = (frame - last[0]).abs().amax(dim=2) <= STILL
            scale = picture.shape[0] // frame.shape[0]
            still = still.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
            change = (picture - last[1]).abs()[still]
            total, count = total + float(change.sum()), count + change.numel()
        last = frame, picture
    return total / count if count else float("nan")
