"""Every operation in plain PyTorch.

One definition, three uses: the oracle the tests compare with (in float64), the path taken where no fused kernel
serves, and the baseline the benchmarks time. Each function is written as its formula reads; none is tuned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from fastperc.collective import combine_over_processes
from fastperc.types import Activation, Epilogue, FrozenConv, Geometry, InstanceNorm, Padding, Tap, Window


def widen(x: Tensor) -> Tensor:
    """Half precision as float32, anything wider as it is: sums of squares overflow in half precision."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def tv_loss(x: Tensor, norm: str = "l2", reduction: str = "sum") -> Tensor:
    """Total variation of ``x`` [N, C, H, W]: Σ(dx² + dy²) for ``"l2"``, Σ(|dx| + |dy|) for ``"l1"``.

    ``reduction="mean"`` divides by the number of elements of ``x``. Returns a scalar, float32 or wider.
    """
    x = widen(x)
    dx = x[..., :, 1:] - x[..., :, :-1]
    dy = x[..., 1:, :] - x[..., :-1, :]
    total = dx.square().sum() + dy.square().sum() if norm == "l2" else dx.abs().sum() + dy.abs().sum()
    return total / x.numel() if reduction == "mean" else total


def bicubic(x: Tensor, size: Sequence[int]) -> Tensor:
    """``x`` [N, C, H, W] resampled to ``size``, height and width, by the a = -½ cubic, antialiased.

    That is MATLAB's imresize, which the literature of super-resolution measures against. In float32 or wider.
    """
    return F.interpolate(widen(x), size=tuple(size), mode="bicubic", antialias=True)  # without it torch takes a = -¾


def gaussian_blur(x: Tensor, sigma: float) -> Tensor:
    """``x`` [N, C, H, W] blurred by a Gaussian of ``sigma`` pixels, cut at 4σ; the image goes on in its mirror."""
    radius = math.ceil(4 * sigma)
    offsets = torch.arange(-radius, radius + 1, dtype=x.dtype, device=x.device)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = kernel / kernel.sum()
    planes = reflect_pad(x, radius, radius, radius, radius).flatten(0, 1)[:, None]
    planes = F.conv2d(F.conv2d(planes, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))
    return planes.view(x.shape)


def degrade(x: Tensor, scale: int, blur: float = 0.0) -> Tensor:
    """What a super-resolution network is to undo: ``x`` [N, 3, H, W] made small, RGB in 0–1.

    Blurred by a Gaussian of ``blur`` pixels (the paper trains with 1), bicubic to 1/``scale``, then rounded to 8 bits
    as a file of it would be. H and W are multiples of ``scale``.
    """
    x = gaussian_blur(x, blur) if blur else x
    return to_levels(bicubic(x, (x.shape[2] // scale, x.shape[3] // scale))).to(x.dtype) / 255


def check_features(x: Tensor) -> None:
    """Raises a ``ValueError`` unless ``x`` has Gram matrices."""
    if x.dim() != 4 or 0 in x.shape[1:]:
        raise ValueError(f"gram_matrix needs features of shape [N, C, H, W] with C, H, W ≥ 1, got {list(x.shape)}")


def gram_matrix(x: Tensor) -> Tensor:
    """ψψᵀ / (C·H·W), ψ being ``x`` [N, C, H, W] as a C × H·W matrix (paper, equation 3).

    Returns [N, C, C] in float32 or wider, under autocast too: Σψ² over one 256 × 256 map passes float16's 65,504 as
    soon as the mean square reaches 1, and dividing afterwards is too late.

    Raises:
        ValueError: ``x`` is not [N, C, H, W], or has no elements to a map.
    """
    check_features(x)
    with torch.autocast(x.device.type, enabled=False):
        psi = widen(x).flatten(2)
        return psi @ psi.mT / (x.shape[1] * x.shape[2] * x.shape[3])


def gram_loss(x: Tensor, target: Tensor, criterion: str = "l2") -> Tensor:
    """Σ d(G(x), target) averaged over the batch, d as in :func:`distances`: for ``"l2"`` that is ‖G(x) − target‖²_F
    (paper, equation 4). ``target`` [N or 1, C, C] is a Gram matrix."""
    return distances(gram_matrix(x) - target, criterion).sum(dim=(1, 2)).mean()


def feature_loss(x: Tensor, target: Tensor, criterion: str = "l2") -> Tensor:
    """The mean of d(x, target), d as in :func:`distances`: for ``"l2"`` that is ‖x − target‖² / (C·H·W) averaged over
    the batch (paper, equation 2). Both are [N, C, H, W]; returns a scalar, float32 or wider."""
    losses = {"l2": F.mse_loss, "l1": F.l1_loss, "smooth_l1": F.smooth_l1_loss}
    with torch.autocast(x.device.type, enabled=False):
        return losses[criterion](widen(x), widen(target))


def distances(difference: Tensor, criterion: str) -> Tensor:
    """What each element of ``difference``, δ, counts: δ² (``"l2"``), |δ| (``"l1"``), or (``"smooth_l1"``) ½·δ² up to 1
    and |δ| − ½ beyond."""
    if criterion == "l2":
        return difference.square()
    if criterion == "l1":
        return difference.abs()
    return F.smooth_l1_loss(difference, torch.zeros_like(difference), reduction="none")


def vgg_features(x: Tensor, convs: Sequence[FrozenConv], taps: Collection[Tap]) -> dict[Tap, Tensor]:
    """The maps of a VGG network at ``taps``, [N, C, H, W] each, in their order, computed as deep as asked."""
    features = {}
    deepest = max([tap.place for tap in taps])  # of a list, which torch.compile can trace
    for i, conv in enumerate(convs[: 1 + max([tap.conv for tap in taps])]):
        if conv.pooled:
            x = pool(x, conv.averages)
        x = F.conv2d(x, conv.weight, conv.bias, padding=1)
        if Tap(i, "conv") in taps:
            features[Tap(i, "conv")] = x
        if Tap(i, "conv").place == deepest:
            break
        x = x.relu()
        if Tap(i, "relu") in taps:
            features[Tap(i, "relu")] = x
        if Tap(i, "pool") in taps:
            features[Tap(i, "pool")] = pool(x, conv.averages)
    return features


def pool(x: Tensor, averages: bool) -> Tensor:
    """The greatest, or the average, of each 2×2 pixels of ``x``; an odd last row or column is left out."""
    return F.avg_pool2d(x, 2) if averages else F.max_pool2d(x, 2)


def pad(x: Tensor, padding: Padding) -> Tensor:
    """``x`` [N, C, H, W] with a border of zeros, of reflected pixels or of the nearest ones, as ``padding`` says."""
    mode = "constant" if padding.mode == "zeros" else padding.mode
    return F.pad(x, padding.sides, mode=mode) if any(padding.sides) else x


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: Padding, dilation: int = 1, groups: int = 1
) -> Tensor:
    """The convolution of ``x``, padded."""
    left, right, top, bottom = padding.sides
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if padding.mode == "zeros" and left == right and top == bottom:  # which needs no copy
        return F.conv2d(x, weight, bias, stride, (top, left), dilation, groups)
    return F.conv2d(pad(x, padding), weight, bias, stride, 0, dilation, groups)


def activate(x: Tensor, activation: Activation | None) -> Tensor:
    """``activation`` of each element of ``x``.

    Raises:
        ValueError: no activation of that name.
    """
    if activation is None:
        return x
    if activation.name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation.name!r}")
    return ACTIVATIONS[activation.name](x, activation)


ACTIVATIONS: dict[str, Callable[[Tensor, Activation], Tensor]] = {
    "relu": lambda x, _: x.relu(),
    "leaky_relu": lambda x, activation: F.leaky_relu(x, 0.01 if activation.slope is None else activation.slope),
    "prelu": lambda x, activation: F.prelu(x, cast(Tensor, activation.slopes).to(x.dtype)),
    "relu6": lambda x, _: F.relu6(x),
    "silu": lambda x, _: F.silu(x),
    "sigmoid": lambda x, _: x.sigmoid(),
    "tanh": lambda x, _: x.tanh(),
}


def instance_norm(x: Tensor, norm: InstanceNorm) -> Tensor:
    """``x`` [N, C, H, W] normalised."""
    return F.instance_norm(x, weight=norm.weight.to(x.dtype), bias=norm.bias.to(x.dtype), eps=norm.eps)


def norm_relu(x: Tensor, weight: Tensor, bias: Tensor, eps: float, relu: bool, batch: bool) -> Tensor:
    """The batch norm of ``x`` [N, C, H, W] by its own statistics, or its instance norm; then a ReLU if ``relu``."""
    # Of one image both are the same, and the gradient of PyTorch's own instance norm may be wrong.
    normalise = F.batch_norm if batch or len(x) == 1 else F.instance_norm
    y = normalise(x, None, None, weight.to(x.dtype), bias.to(x.dtype), True, 0.0, eps)
    return y.relu() if relu else y


def batch_statistics(x: Tensor) -> Tensor:
    """Count, mean and Σ (x - mean)² of each channel of ``x`` [N, C, H, W]: [3, C], zeros for an empty ``x``."""
    x = widen(x)
    count = x.numel() // x.shape[1]
    if count == 0:
        return x.new_zeros(3, x.shape[1])
    variance, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
    return torch.stack([torch.full_like(mean, count), mean, variance * count])


def sync_norm_relu(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, relu: bool, group: ProcessGroup
) -> tuple[Tensor, Tensor]:
    """The batch norm of ``x`` [N, C, H, W] by the statistics of all processes of ``group``, then a ReLU if ``relu``;
    and those statistics: count, mean and Σ (x - mean)² of each channel, float64 [3, C], without a gradient."""
    statistics = combine_over_processes(batch_statistics(x).double(), group)
    wide = widen(x)
    _, mean, inverse = count_mean_inverse(statistics, eps, wide.dtype)
    y = (wide - mean) * inverse
    if weight is not None:
        y = y * weight[:, None, None]
    if bias is not None:
        y = y + bias[:, None, None]
    y = y.to(x.dtype)
    return y.relu() if relu else y, statistics.detach()


def count_mean_inverse(statistics: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Of count, mean and Σ (x - mean)² of each channel, [3, C]: the count, or 1 if it is 0, the mean, and one over the
    standard deviation; [C, 1, 1] each."""
    count, mean, m2 = statistics[:, :, None, None].unbind()
    count = count.clamp(min=1)
    return count.to(dtype), mean.to(dtype), (m2 / count + eps).rsqrt().to(dtype)


def finish(y: Tensor, epilogue: Epilogue) -> Tensor:
    """What follows a convolution: activation(norm(y) + skip)."""
    if epilogue.norm is not None:
        y = instance_norm(y, epilogue.norm)
    if epilogue.skip is not None:
        y = y + epilogue.skip
    return activate(y, epilogue.activation)


def conv_bn_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    geometry: Geometry = Geometry(),
    epilogue: Epilogue = Epilogue(),
) -> Tensor:
    """The convolution of ``x`` by ``weight`` [O, I / groups, k, k] and ``bias`` [O], a batch norm folded into them, and
    its epilogue."""
    return finish(convolve(x, weight, bias, *geometry), epilogue)


def subpixel_conv_bn_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    upsample: str = "transposed",
    padding: Padding = Padding((1, 1, 1, 1)),
    epilogue: Epilogue = Epilogue(),
) -> Tensor:
    """[N, I, H, W] → [N, O, 2H, 2W]: ``nn.ConvTranspose2d(I, O, 3, 2, 1, 1)`` with ``weight`` [I, O, 3, 3], or
    (``"nearest"``) nearest-neighbour upsampling and a 3×3 convolution with ``weight`` [O, I, 3, 3].

    Each pixel with its eight neighbours becomes four. A side of ``padding`` of 1 supplies the neighbours beyond that
    side of ``x``; with 0 the outermost pixels of ``x`` serve as neighbours only. Its mode is that of the upsampled map.
    """
    nearest = upsample == "nearest"
    # Reflecting the upsampled map about its border pixel repeats the pixel of the small map.
    x = pad(x, Padding(padding.sides, "replicate" if nearest and padding.mode == "reflect" else "zeros"))
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if nearest:
        upsampled = F.interpolate(x, scale_factor=2, mode="nearest")[:, :, 1:-1, 1:-1]
        return finish(F.conv2d(upsampled, weight, bias), epilogue)
    y = F.conv_transpose2d(x, weight, bias, 2, 1)
    return finish(y[:, :, 2:-1, 2:-1], epilogue)


def reflected(start: int, count: int, size: int, device: torch.device) -> Tensor:
    """The indices, among ``size`` pixels in a row, of ``count`` positions from ``start`` on, reflected at both ends."""
    period = max(2 * (size - 1), 1)
    positions = torch.arange(start, start + count, device=device) % period
    return torch.minimum(positions, (period - positions) % period) if size > 1 else torch.zeros_like(positions)


def image_io(image: Tensor, window: Window, input_range: tuple[float, float], dtype: torch.dtype) -> Tensor:
    """The ``window`` of ``image`` [N, 3, H, W] as a network sees it: RGB in 0–1 (uint8 levels over 255) times the first
    number of ``input_range``, plus the second."""
    top, left, height, width = window
    scale, shift = input_range
    rows = reflected(top, height, image.shape[2], image.device)
    columns = reflected(left, width, image.shape[3], image.device)
    x = image[:, :, rows[:, None], columns]
    x = x.float() / 255 if x.dtype == torch.uint8 else widen(x)
    return (x * scale + shift).to(dtype).contiguous(memory_format=torch.channels_last)


def rgb_conv_head(x: Tensor, weight: Tensor, bias: Tensor, padding: Padding, output: str, out: Tensor) -> None:
    """The last convolution: [N, C, H, W] → ``out`` [N, 3, H', W'], RGB in 0–1, or levels if that is uint8.

    ``output`` is ``"tanh"``, the authors' 150·tanh about mid-grey, ``"linear"``, 0…255, or ``"plain"``: ``out`` is the
    convolution itself.
    """
    y = to_image_range(widen(convolve(x, weight, bias, 1, padding)), output)
    out.copy_(to_levels(y) if out.dtype == torch.uint8 else y)


CAFFE_MEAN = (123.68, 116.779, 103.939)  # of RGB in 0…255, over the images that Caffe's VGG was trained on


def caffe_mean(x: Tensor) -> Tensor:
    """``CAFFE_MEAN`` for pictures like ``x``, [3, 1, 1], made without a copy from the CPU."""
    return torch.cat([x.new_full((1, 1, 1), level) for level in CAFFE_MEAN])


def to_network_range(x: Tensor, output: str) -> Tensor:
    """0–1 to what the first convolution sees: -1…1 (``"tanh"``), 0…255 (``"linear"``) or that less ``CAFFE_MEAN``."""
    if output == "caffe":
        return 255 * x - caffe_mean(x)
    return 2 * x - 1 if output == "tanh" else 255 * x


def to_image_range(x: Tensor, output: str) -> Tensor:
    """The last convolution's output to 0–1: the authors' 150·tanh about mid-grey or, for ``"caffe"``, about the mean
    colour of Caffe's images; or 0…255; ``"plain"`` stays."""
    if output == "plain":
        return x
    if output == "caffe":
        return (150 * x.tanh() + caffe_mean(x)) / 255
    return 0.5 + 150 / 255 * x.tanh() if output == "tanh" else x / 255


def to_levels(x: Tensor) -> Tensor:
    """RGB in 0–1 → uint8: clamped, then rounded to the nearest of 256 levels."""
    return x.clamp(0, 1).mul(255).round().to(torch.uint8)


def reflect_pad(x: Tensor, left: int, right: int, top: int, bottom: int) -> Tensor:
    """``x`` [N, C, H, W] reflected about its border pixels, as often as the border's width takes.

    ``F.pad`` reflects once and so refuses a border as wide as the image; a 16-pixel image under a border of 40 needs
    several reflections, which successive calls give exactly.
    """
    while left or right or top or bottom:
        height, width = x.shape[-2:]
        step = (min(left, width - 1), min(right, width - 1), min(top, height - 1), min(bottom, height - 1))
        x = F.pad(x, step, mode="reflect")
        left, right, top, bottom = left - step[0], right - step[1], top - step[2], bottom - step[3]
    return x


LUMA = 0.299, 0.587, 0.114  # the shares of red, green and blue, by BT.601


def luma(x: Tensor) -> Tensor:
    """BT.601 luma of RGB ``x`` [N, 3, H, W], in ``x``'s own range: [N, 1, H, W]."""
    weights = x.new_tensor(LUMA).view(1, 3, 1, 1)
    return (x * weights).sum(dim=1, keepdim=True)


LPIPS_EPS = 1e-10  # added to the norm of a pixel's features, as lpips has it; torchmetrics adds 1e-8 to its square


def unit_vectors(x: Tensor) -> Tensor:
    """Each pixel's features of ``x`` [N, C, H, W] divided by their norm + 1e-10, in float32 or wider.

    A pixel whose features are all 0 stays so and gets a gradient of 0.
    """
    x = widen(x)
    squares = x.square().sum(dim=1, keepdim=True)
    has_direction = squares != 0  # NaN too
    norms = squares.where(has_direction, 1).sqrt()  # the root has no derivative at 0
    return x * (1 / (norms + LPIPS_EPS)).where(has_direction, 0)


def lpips_maps(
    features_a: Sequence[Tensor], features_b: Sequence[Tensor], channel_weights: Sequence[Tensor]
) -> list[Tensor]:
    """Of each layer the distance of each pixel's unit vectors: Σ w (â − b̂)² over channels, [N, 1, H, W].

    Features are [N, C, H, W] or, where one image serves all others, [1, C, H, W]; weights are [C].
    """
    maps = []
    for a, b, weight in zip(features_a, features_b, channel_weights):
        with torch.autocast(a.device.type, enabled=False):
            squares = (unit_vectors(a) - unit_vectors(b)).square()
            maps.append((squares * weight.to(squares.dtype)[:, None, None]).sum(dim=1, keepdim=True))
    return maps


def lpips_terms(maps: Sequence[Tensor], size: Sequence[int] | None = None) -> list[Tensor]:
    """The ``maps`` [N, 1, H, W] of :func:`lpips_maps`, averaged over their pixels, [N, 1, 1, 1], or upsampled to
    ``size``, height and width."""
    if size is None:
        return [x.mean(dim=(2, 3), keepdim=True) for x in maps]
    return [F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False) for x in maps]


def lpips_distance(
    features_a: Sequence[Tensor],
    features_b: Sequence[Tensor],
    channel_weights: Sequence[Tensor],
    size: Sequence[int] | None = None,
) -> Tensor:
    """LPIPS of two images from their features: the sum of :func:`lpips_terms` over the layers."""
    return torch.stack(lpips_terms(lpips_maps(features_a, features_b, channel_weights), size)).sum(dim=0)
