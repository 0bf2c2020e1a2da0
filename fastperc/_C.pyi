# The compiled module. Tensors are passed as the addresses of their data; 0 means none. See csrc/kernels.h.
from typing import TypedDict

class BuildInfo(TypedDict):
    compiler: str
    cuda: str | None
    architectures: str

_NormShape = tuple[int, int, int, int, int, int]  # images, channels, rows, columns, channels-last or not, batch or not

def build_info() -> BuildInfo: ...
def tv_loss_fwd_cpu(
    x: int,
    grad: int,
    loss: int,
    dtype: str,
    norm: str,
    shape: tuple[int, int, int, int, int],
    x_strides: tuple[int, int, int],
    grad_strides: tuple[int, int, int],
    threads: int,
) -> None: ...
def relu_mask_fwd_cpu(x: int, bits: int, dtype: str, count: int, threads: int) -> None: ...
def relu_mask_bwd_cpu(grad: int, bits: int, dtype: str, count: int, threads: int) -> None: ...
def relu_pool_fwd_cpu(
    x: int,
    pooled: int,
    winners: int,
    dtype: str,
    shape: tuple[int, int, int, int],
    images_with_winners: int,
    threads: int,
) -> None: ...
def relu_pool_bwd_cpu(
    grad_pooled: int, winners: int, grad: int, dtype: str, shape: tuple[int, int, int, int], threads: int
) -> None: ...
def lpips_distance_cpu(
    pointers: tuple[int, int, int, int, int, int, int, int, int],
    strides: tuple[tuple[int, int, int], tuple[int, int, int], tuple[int, int, int], tuple[int, int, int]],
    after_relu: bool,
    dtype: str,
    shape: tuple[int, int, int],
    threads: int,
) -> None: ...
def reuse_freed_memory(block: int, kept: int) -> None: ...
def image_io_cpu(
    image: int,
    out: int,
    image_dtype: str,
    dtype: str,
    images: int,
    window: tuple[int, int, int, int, int, int],
    strides: tuple[int, int, int, int],
    scale: float,
    shift: float,
    threads: int,
) -> None: ...
def rgb_conv_head_cpu(
    products: int,
    bias: int,
    out: int,
    dtype: str,
    out_dtype: str,
    output: str,
    shape: tuple[int, int, int, int, int],
    reflect: bool,
    out_strides: tuple[int, int, int, int],
    threads: int,
) -> None: ...
def rgb_conv_stem_winograd_cpu(
    x: int,
    weights: int,
    bias: int,
    out: int,
    shape: tuple[int, int, int, int, int, int, int, int, int],
    reflect: bool,
    relu: bool,
    threads: int,
) -> None: ...
def rgb_conv_head_winograd_cpu(
    x: int,
    weights: int,
    bias: int,
    out: int,
    out_dtype: str,
    output: str,
    shape: tuple[int, int, int, int, int, int, int, int, int],
    reflect: bool,
    out_strides: tuple[int, int, int, int],
    threads: int,
) -> None: ...
def channel_statistics_cpu(
    x: int, statistics: int, dtype: str, shape: tuple[int, int, int, int], threads: int
) -> None: ...
def scale_shift_cpu(
    x: int,
    scale: int,
    shift: int,
    skip: int,
    out: int,
    dtype: str,
    shape: tuple[int, int, int, int],
    skip_strides: tuple[int, int, int, int],
    activation: str,
    slopes: int,
    threads: int,
) -> None: ...
def norm_from_statistics_cpu(
    statistics: tuple[int, int],
    count_step: int,
    parameters: tuple[int, int],
    eps: float,
    norm: int,
    images: int,
    channels: int,
) -> None: ...
def update_running_statistics_cpu(
    statistics: tuple[int, int], count_step: int, share: float, mean: int, variance: int, channels: int
) -> None: ...
def norm_parameter_gradients_cpu(
    statistics: tuple[int, int],
    count_step: int,
    eps: float,
    sums: int,
    rows: int,
    gradients: int,
    images: int,
    channels: int,
) -> None: ...
def norm_gradient_factors_cpu(
    statistics: tuple[int, int],
    count_step: int,
    parameters: tuple[int, int],
    eps: float,
    sums: int,
    rows: int,
    factors: int,
    images: int,
    channels: int,
) -> None: ...
def norm_gradient_sums_cpu(
    x: int,
    grad: int,
    norm: tuple[int, int, int],
    statistics: int,
    sums: int,
    dtype: str,
    shape: tuple[int, int, int, int],
    activation: str,
    slopes: int,
    y: int,
    masked: int,
    threads: int,
) -> None: ...
def norm_gradient_cpu(
    x: int,
    grad: int,
    norm: tuple[int, int, int],
    factors: int,
    out: int,
    dtype: str,
    shape: tuple[int, int, int, int],
    activation: str,
    slopes: int,
    threads: int,
) -> None: ...
def winograd_lanes() -> int: ...
def winograd_weights_cpu(
    weight: int,
    transformed: int,
    in_channels: int,
    out_channels: int,
    strides: tuple[int, int, int, int],
    tile: int,
    threads: int,
) -> None: ...
def winograd_conv_cpu(
    x: int,
    weights: int,
    bias: int,
    skip: int,
    out: int,
    shape: tuple[int, int, int, int, int, int, int, int, int],
    skip_strides: tuple[int, int, int, int],
    activation: str,
    slopes: int,
    threads: int,
) -> None: ...
def winograd_weight_gradient_cpu(
    x: int,
    grad: int,
    weight: int,
    bias: int,
    shape: tuple[int, int, int, int, int, int, int, int, int],
    strides: tuple[int, int, int, int],
    threads: int,
) -> None: ...
def pointwise_panels() -> tuple[int, int]: ...
def pointwise_conv_cpu(
    x: int,
    weights: int,
    bias: int,
    skip: int,
    out: int,
    shape: tuple[int, ...],
    skip_strides: tuple[int, ...],
    activation: str,
    slopes: int,
    threads: int,
) -> None: ...
def depthwise_conv_cpu(
    x: int,
    weights: int,
    bias: int,
    skip: int,
    out: int,
    shape: tuple[int, ...],
    skip_strides: tuple[int, ...],
    activation: str,
    slopes: int,
    threads: int,
) -> None: ...
def stem_conv_cpu(
    x: int,
    weights: int,
    bias: int,
    skip: int,
    out: int,
    shape: tuple[int, ...],
    skip_strides: tuple[int, ...],
    activation: str,
    slopes: int,
    threads: int,
) -> None: ...

class PreparedConv:
    def __call__(self, x: int, skip: int, out: int, threads: int) -> None: ...

class ConvSeries:
    def __init__(self, layers: list[tuple[PreparedConv, tuple[int, int, int]]], offsets: list[int]) -> None: ...
    def __call__(self, maps: list[int], memory: int, threads: int) -> None: ...

def prepare_pointwise_conv(
    weights: int,
    bias: int,
    shape: tuple[int, ...],
    skip_strides: tuple[int, ...],
    activation: str,
    slopes: int,
) -> PreparedConv: ...
def prepare_depthwise_conv(
    weights: int,
    bias: int,
    shape: tuple[int, ...],
    skip_strides: tuple[int, ...],
    activation: str,
    slopes: int,
) -> PreparedConv: ...
def prepare_stem_conv(
    weights: int,
    bias: int,
    shape: tuple[int, ...],
    skip_strides: tuple[int, ...],
    activation: str,
    slopes: int,
) -> PreparedConv: ...
def tv_loss_partials(shape: tuple[int, int, int, int, int]) -> int: ...
def tv_loss_fwd_cuda(
    x: int,
    grad: int,
    loss: int,
    partials: int,
    dtype: str,
    norm: str,
    shape: tuple[int, int, int, int, int],
    x_strides: tuple[int, int, int],
    grad_strides: tuple[int, int, int],
    stream: int,
) -> None: ...
def norm_partials(shape: _NormShape, dtype: str) -> int: ...
def channel_statistics_cuda(
    x: int, statistics: int, partials: int, dtype: str, shape: _NormShape, stream: int
) -> None: ...
def scale_shift_cuda(
    x: int,
    norm: tuple[int, int, int],
    skip: int,
    out: int,
    dtype: str,
    shape: _NormShape,
    skip_strides: tuple[int, int, int, int],
    activation: tuple[str, int, float],
    stream: int,
) -> None: ...
def norm_from_statistics_cuda(
    statistics: tuple[int, int],
    count_step: int,
    parameters: tuple[int, int],
    eps: float,
    norm: int,
    images: int,
    channels: int,
    stream: int,
) -> None: ...
def update_running_statistics_cuda(
    statistics: tuple[int, int],
    count_step: int,
    share: float,
    mean: int,
    variance: int,
    channels: int,
    stream: int,
) -> None: ...
def norm_gradient_sums_cuda(
    x: int,
    grad: int,
    norm: tuple[int, int, int],
    statistics: int,
    sums: int,
    partials: int,
    dtype: str,
    shape: _NormShape,
    activation: tuple[str, int, float],
    y: int,
    masked: int,
    stream: int,
) -> None: ...
def norm_parameter_gradients_cuda(
    statistics: tuple[int, int],
    count_step: int,
    eps: float,
    sums: int,
    rows: int,
    gradients: int,
    images: int,
    channels: int,
    stream: int,
) -> None: ...
def norm_gradient_factors_cuda(
    statistics: tuple[int, int],
    count_step: int,
    parameters: tuple[int, int],
    eps: float,
    sums: int,
    rows: int,
    factors: int,
    images: int,
    channels: int,
    stream: int,
) -> None: ...
def norm_gradient_cuda(
    x: int,
    grad: int,
    norm: tuple[int, int, int],
    factors: int,
    out: int,
    dtype: str,
    shape: _NormShape,
    activation: tuple[str, int, float],
    stream: int,
) -> None: ...
def image_io_cuda(
    image: int,
    out: int,
    image_dtype: str,
    dtype: str,
    images: int,
    window: tuple[int, int, int, int, int, int],
    strides: tuple[int, int, int, int],
    scale: float,
    shift: float,
    stream: int,
) -> None: ...
def picture_cuda(
    y: int,
    bias: int,
    out: int,
    dtype: str,
    out_dtype: str,
    output: str,
    shape: tuple[int, int, int],
    strides: tuple[int, int, int, int],
    out_strides: tuple[int, int, int, int],
    stream: int,
) -> None: ...
