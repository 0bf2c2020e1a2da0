"""lengstrom/fast-style-transfer: TensorFlow checkpoints of 48 variables without names of their own.

Each of the 16 convolutions has a filter, then a shift and a scale of its instance norm, and no bias. TensorFlow pads
with as few zeros as the output's size needs: for a stride of 2 that is one row and one column, at the bottom and the
right. The network sees RGB in 0…255 and gives 150·tanh + 127.5.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor, nn

from fastperc.conversion.common import Colors, Converted, Multiplied, PictureNet, Refused, Residual, WithoutLast, filled

VARIABLE = re.compile(r"Variable(?:_(\d+))?")
EPS = 1e-3
STRIDES = (1, 2, 2, *(1,) * 10, -2, -2, 1)  # of the convolutions in order; negative: transposed
FIRST_BLOCK, LAST_BLOCK = 3, 12  # the first and the last convolution of the residual blocks
COLORS = Colors((255.0,) * 3, (0.0,) * 3)
WHY_NOT = (
    "pads its convolutions of stride 2 on two sides only and normalises the last convolution too; "
    "fastperc's networks do neither"
)


def convert(tensors: Mapping[str, Tensor]) -> Converted:
    """The network of a checkpoint's tensors.

    Raises:
        Refused: another network's.
    """
    numbered = {int(match[1] or 0): tensor for name, tensor in tensors.items() if (match := VARIABLE.fullmatch(name))}
    count = 3 * len(STRIDES)
    if [*sorted(numbered)][:count] != [*range(count)]:
        raise Refused(
            f"holds no network of lengstrom's: that has the tensors Variable to Variable_{count - 1}, this "
            f"{len(numbered)} of such names"
        )
    dtype, rows = numbered[0].dtype, [numbered[i] for i in range(count)]
    layers: list[nn.Module] = []
    for i, stride in enumerate(STRIDES):
        layer = nn.Sequential(*_convolution(stride, *(tensor.float() for tensor in rows[3 * i : 3 * i + 3])))
        second = FIRST_BLOCK <= i <= LAST_BLOCK and (i - FIRST_BLOCK) % 2 == 1
        if second:
            layers[-1] = Residual(nn.Sequential(layers[-1], layer))
        else:
            layers.append(layer if i == len(STRIDES) - 1 else nn.Sequential(layer, nn.ReLU()))
    net = PictureNet(nn.Sequential(*layers, nn.Tanh(), Multiplied(150, 127.5)), COLORS, multiple=4)
    return Converted("lengstrom's fast-style-transfer network", net.eval(), dtype, "", WHY_NOT)


def _convolution(stride: int, weight: Tensor, shift: Tensor, scale: Tensor) -> list[nn.Module]:
    """A convolution with its padding and its instance norm; ``weight`` is [kH, kW, in, out], transposed [.., out, in].

    Raises:
        Refused: shapes that do not belong together.
    """
    if weight.dim() != 4 or weight.shape[0] != weight.shape[1] or weight.shape[0] % 2 == 0 or not weight.numel():
        raise Refused(f"has a filter of {list(weight.shape)}")
    kernel, weight = len(weight), weight.permute(3, 2, 0, 1)  # [out, in, kH, kW], transposed [in, out, kH, kW]
    outputs = weight.shape[1] if stride < 0 else weight.shape[0]
    norm = filled(nn.InstanceNorm2d(outputs, EPS, affine=True), weight=scale, bias=shift)
    if stride < 0:
        transposed = nn.ConvTranspose2d(weight.shape[0], weight.shape[1], kernel, -stride, bias=False)
        if kernel != 3:
            raise Refused(f"has a transposed filter of {kernel}×{kernel}")
        return [filled(transposed, weight=weight), WithoutLast(), norm]
    half = kernel // 2
    padding: list[nn.Module] = [nn.ZeroPad2d((0, half, 0, half))] if stride == 2 else []
    if stride == 2 and kernel != 3:
        raise Refused(f"has a filter of {kernel}×{kernel} with a stride")
    conv = nn.Conv2d(weight.shape[1], weight.shape[0], kernel, stride, 0 if stride == 2 else half, bias=False)
    return [*padding, filled(conv, weight=weight), norm]
