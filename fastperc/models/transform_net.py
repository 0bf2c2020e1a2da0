"""The image transformation network of style transfer (paper, Table 1) and its published relatives."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from fastperc.models.common import (
    Network,
    check_image,
    cropped,
    initialise_as_authors,
    pictures_in_a_row,
    reflect_pad_to_multiple,
)
from fastperc.modules import ConvBNReLU, ResidualBlock, RGBConv, SubpixelConvBNReLU
from fastperc.presets import PRESETS

OUTPUTS = ("tanh", "linear", "caffe")
BORDER = 40  # pixels that "reflect40" adds to a side: 10 at a quarter of the size, and five blocks trim 2 each


class TransformNet(Network):
    """Johnson et al.'s style network: RGB in 0–1 [N, 3, H, W] → RGB [N, 3, H, W], any H and W from 16 up.

    9×9 conv, two stride-2 convs, five residual blocks, two ½-stride convs, 9×9 conv. The networks work on multiples
    of 4: other sizes are extended by reflection at the right and bottom, and the result is cropped. The output is not
    clamped: values may leave 0–1 (by 0.09 at most under ``tanh``).

    Args:
        preset: ``"paper"`` (Table 1: zero padding, batch norm), ``"eccv16"`` (reflection padding of 40, then blocks
            without padding), ``"instance"`` (the same with instance norm and half the width: the authors' released
            models), ``"examples"`` (PyTorch's fast_neural_style example).
        residual: ``True``, ``False`` or ``"he"``; see :class:`~fastperc.ResidualBlock` (Figure 1).
        width: channels of the first convolution; the next have 2× and 4×. Default: the preset's.
        norm: ``"batch"`` or ``"instance"``. Default: the preset's.
        padding: ``"zero"``, ``"reflect"`` (before every conv) or ``"reflect40"``. Default: the preset's.
        upsample: ``"transposed"`` or ``"nearest"``. Default: the preset's.
        output: ``"tanh"`` (sees RGB in −1…1, gives 150·tanh about mid-grey), ``"linear"`` (0…255 both) or ``"caffe"``,
            as the authors' own files have it: sees 0…255 less the mean colour of Caffe's images, gives 150·tanh about
            that. Default: the preset's.

    Raises:
        ValueError: unknown preset or argument value; on forward, a shape that is not [N, 3, H ≥ 16, W ≥ 16].
    """

    def __init__(
        self,
        preset: str = "paper",
        residual: bool | Literal["he"] = True,
        width: int | None = None,
        *,
        norm: str | None = None,
        padding: str | None = None,
        upsample: str | None = None,
        output: str | None = None,
    ) -> None:
        super().__init__()
        if preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
        given = dict(width=width, norm=norm, padding=padding, upsample=upsample, output=output)
        chosen = PRESETS[preset] | {key: value for key, value in given.items() if value is not None}
        if chosen["padding"] not in ("zero", "reflect", "reflect40"):
            raise ValueError(f"padding must be 'zero', 'reflect' or 'reflect40', got {chosen['padding']!r}")
        if chosen["output"] not in OUTPUTS:
            raise ValueError(f"output must be one of {', '.join(OUTPUTS)}, got {chosen['output']!r}")
        if chosen["width"] < 1:
            raise ValueError(f"width must be at least 1, got {chosen['width']}")

        # What rebuilds this network: TransformNet(**net.config).
        self.config: dict[str, Any] = dict(preset=preset, residual=residual, **chosen)
        if chosen["output"] == PRESETS[preset]["output"]:  # as in files that name none
            self.config.pop("output")
        self.output = chosen["output"]
        self.border = BORDER if chosen["padding"] == "reflect40" else 0

        c = chosen["width"]
        block_padding = 0 if self.border else 1
        common: dict[str, Any] = dict(
            norm=chosen["norm"], padding_mode="reflect" if chosen["padding"] == "reflect" else "zeros"
        )
        self.stem = ConvBNReLU(3, c, 9, padding=4, **common)
        self.down = nn.Sequential(
            ConvBNReLU(c, 2 * c, 3, stride=2, padding=1, **common),
            ConvBNReLU(2 * c, 4 * c, 3, stride=2, padding=1, **common),
        )
        self.blocks = nn.Sequential(
            *(ResidualBlock(4 * c, block_padding, residual=residual, **common) for _ in range(5))
        )
        self.up = nn.Sequential(
            SubpixelConvBNReLU(4 * c, 2 * c, upsample=chosen["upsample"], **common),
            SubpixelConvBNReLU(2 * c, c, upsample=chosen["upsample"], **common),
        )
        self.head = RGBConv(c, 9, padding=4, padding_mode=common["padding_mode"])
        if preset != "examples":
            initialise_as_authors(self)

    def forward(self, x: Tensor) -> Tensor:
        check_image(x)
        height, width = x.shape[-2:]
        x = reflect_pad_to_multiple(x, 4, self.border)
        x = pictures_in_a_row(x, (self.stem, *self.down, *self.blocks, *self.up, self.head), self.output)
        return cropped(x, height, width)
