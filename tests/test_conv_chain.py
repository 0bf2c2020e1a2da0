"""Chains of convolutions in training against float64: output, every gradient, running statistics; and what is kept."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import GPU, dtype_id, error, no_worse
from torch import nn

from fastperc import SuperResolutionNet, TransformNet, backends, ops, use_backend
from fastperc.models.common import in_a_row, pictures_in_a_row
from fastperc.modules import ConvBNReLU, ResidualBlock, RGBConv, SubpixelConvBNReLU
from fastperc.ops.conv_chain import why_not_triton
from fastperc.presets import PRESETS

DEVICE = "cuda" if GPU else "cpu"  # where Triton's interpreter stands in
DTYPES = [torch.float32, torch.float16, *[torch.bfloat16] * GPU]  # the interpreter's products of bfloat16 are wrong
HALF = DTYPES[-1]
ROUNDING = {torch.float32: 4e-7, torch.float16: 5e-4, torch.bfloat16: 4e-3}  # of one number


class Row(nn.Module):
    def __init__(self, *modules):
        super().__init__()
        self.parts = nn.ModuleList(modules)

    def forward(self, x):
        return in_a_row(x, tuple(self.parts))


CASES = {  # the module, and the shape of its input
    "conv": (lambda: ConvBNReLU(8, 24, 3, padding=1), (2, 8, 9, 13)),
    "conv-bare": (lambda: ConvBNReLU(8, 24, 3, padding=1, relu=False), (2, 8, 5, 6)),
    "conv-valid": (lambda: ConvBNReLU(8, 24, 3), (2, 8, 9, 13)),
    "conv-kernel5": (lambda: ConvBNReLU(8, 16, 5, padding=2), (1, 8, 7, 6)),
    "conv-kernel1": (lambda: ConvBNReLU(20, 5, 1), (2, 20, 3, 5)),
    "conv-instance-reflect": (
        lambda: ConvBNReLU(8, 16, 3, padding=1, padding_mode="reflect", norm="instance"),
        (2, 8, 9, 13),
    ),
    "stride2-even": (lambda: ConvBNReLU(8, 24, 3, stride=2, padding=1, norm="instance"), (2, 8, 12, 14)),
    "stride2-odd": (lambda: ConvBNReLU(70, 24, 3, stride=2, padding=1), (1, 70, 9, 13)),
    "stride2-reflect-even": (lambda: ConvBNReLU(8, 16, 3, 2, 1, padding_mode="reflect"), (2, 8, 8, 14)),
    "stride2-reflect-odd": (lambda: ConvBNReLU(8, 16, 3, 2, 1, padding_mode="reflect"), (2, 8, 9, 13)),
    "stem": (lambda: ConvBNReLU(3, 16, 9, padding=4), (2, 3, 11, 13)),
    "stem-reflect": (lambda: ConvBNReLU(3, 16, 9, padding=4, padding_mode="reflect"), (1, 3, 11, 13)),
    "head": (lambda: Row(ConvBNReLU(4, 16, 3, padding=1), RGBConv(16, 9, 4)), (2, 4, 7, 10)),
    "head-reflect": (
        lambda: Row(ConvBNReLU(4, 16, 3, padding=1), RGBConv(16, 9, 4, padding_mode="reflect")),
        (1, 4, 7, 10),
    ),
    "transposed": (lambda: SubpixelConvBNReLU(16, 8), (2, 16, 5, 7)),
    "nearest": (lambda: SubpixelConvBNReLU(16, 8, upsample="nearest"), (2, 16, 5, 7)),
    "nearest-instance-reflect": (
        lambda: SubpixelConvBNReLU(16, 8, upsample="nearest", padding_mode="reflect", norm="instance"),
        (2, 16, 4, 7),
    ),
    "residual": (lambda: ResidualBlock(16), (2, 16, 7, 9)),
    "residual-valid": (lambda: ResidualBlock(16, 0, norm="instance"), (1, 16, 9, 10)),
    "residual-reflect": (lambda: ResidualBlock(16, padding_mode="reflect"), (1, 16, 6, 5)),
    "plain": (lambda: ResidualBlock(16, residual=False), (2, 16, 7, 9)),
    "row": (
        lambda: Row(ConvBNReLU(4, 16, 3, 2, 1), ResidualBlock(16), ResidualBlock(16), SubpixelConvBNReLU(16, 8)),
        (2, 4, 11, 9),
    ),
    "row-valid": (lambda: Row(ConvBNReLU(4, 8, 3), ResidualBlock(8, 0), ResidualBlock(8, 0)), (1, 4, 16, 15)),
}


class Painter(nn.Module):
    """A stem and a head between pictures in 0–1."""

    def __init__(self, output, norm="batch"):
        super().__init__()
        self.stem, self.head, self.output = (
            ConvBNReLU(3, 16, 9, padding=4, norm=norm),
            RGBConv(16, 9, padding=4),
            output,
        )

    def forward(self, x):
        return pictures_in_a_row(x, (self.stem, self.head), self.output)


CASES |= {
    "pictures-tanh": (lambda: Painter("tanh"), (2, 3, 13, 11)),
    "pictures-linear": (lambda: Painter("linear", "instance"), (2, 3, 12, 10)),
}


def varied(net, dtype=torch.float32):
    """Norms away from the values that hide a mistake; in half precision also from those where rounding switches a
    ReLU: there one channel in two passes, and one is stopped."""
    for module in net.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.InstanceNorm2d)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            if dtype != torch.float32:
                nn.init.uniform_(module.weight, 0.3, 0.6)
                module.bias.data += 4 - 8 * (torch.arange(len(module.bias)) % 2)
    return net.to(DEVICE).to(memory_format=torch.channels_last)


def run(net, x, backend, dtype):
    """The output and the gradients to the input and all parameters by name, and the running statistics."""
    net = copy.deepcopy(net).to(torch.float64 if dtype == torch.float64 else torch.float32)
    x = x.to(dtype).detach().requires_grad_()
    half = dtype in (torch.float16, torch.bfloat16)
    with use_backend(backend), torch.autocast(DEVICE, dtype if half else torch.bfloat16, enabled=half):
        y = net(x)
        incoming = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
        names, parameters = zip(*net.named_parameters())
        gradients = torch.autograd.grad(y, [x, *parameters], incoming)
    return {"output": y, "input": gradients[0], **dict(zip(names, gradients[1:]))}, dict(net.named_buffers())


def compare(net, x, dtype):
    exact, exact_statistics = run(net, x, "reference", torch.float64)
    stock, stock_statistics = run(net, x, "reference", dtype)
    ours, statistics = run(net, x, "triton", dtype)
    again = run(net, x, "triton", dtype)[0] if dtype == HALF else ours
    largest = max(one.norm() for one in exact.values())
    for name, mine in ours.items():
        assert torch.equal(mine, again[name]), name
        assert mine.shape == exact[name].shape and mine.dtype == stock[name].dtype, name
        if exact[name].norm() < 1e-6 * largest:  # what a norm takes off again has no gradient but rounding
            assert mine.norm() <= max(1e-6 * largest, 1.5 * stock[name].norm()), name
        else:
            no_worse(mine, stock[name], exact[name], ROUNDING[dtype])
    for name, mine in statistics.items():
        wanted = exact_statistics[name]
        rounding = 0.025 * ROUNDING[dtype]  # of the variance of some ten numbers, a tenth of it in the running mean
        assert error(mine, wanted) <= max(1e-6, rounding, 1.5 * error(stock_statistics[name], wanted)), name


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("case", CASES)
def test_modules_on_triton_match_the_formula(case, dtype):
    make, shape = CASES[case]
    compare(varied(make(), dtype), torch.randn(shape, device=DEVICE), dtype)


NETWORKS = {preset: lambda preset=preset: TransformNet(preset, width=4) for preset in ("paper", "examples")}
if GPU:  # in the interpreter they take minutes
    NETWORKS |= {preset: lambda preset=preset: TransformNet(preset, width=8) for preset in PRESETS}
    NETWORKS |= {"plain": lambda: TransformNet("paper", False), "x4": lambda: SuperResolutionNet(4)}


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_on_triton_match_the_formula(name):
    compare(varied(NETWORKS[name]()), torch.rand(1, 3, 18, 17, device=DEVICE), torch.float32)


def train(norm_options, steps, backend):
    """A block trained for some steps; its norms' state."""
    torch.manual_seed(0)
    block = varied(ConvBNReLU(4, 8, 3, padding=1))
    for name, value in norm_options.items():
        setattr(block.norm, name, value)
    with use_backend(backend):
        for _ in range(steps):
            block(torch.randn(2, 4, 6, 5, device=DEVICE) + 3).sum().backward()
    return block.norm


@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
def test_running_statistics_on_triton_are_pytorchs(momentum):
    ours, stock = (train(dict(momentum=momentum), 3, backend) for backend in ("triton", "reference"))
    assert ours.num_batches_tracked == stock.num_batches_tracked == 3
    assert error(ours.running_mean, stock.running_mean) < 1e-6 and error(ours.running_var, stock.running_var) < 1e-6


def test_a_frozen_norm_on_triton():
    net = varied(Row(ConvBNReLU(4, 8, 3, padding=1), ResidualBlock(8)))
    net.parts[0].norm.running_mean.normal_()
    net.parts[0].norm.running_var.uniform_(0.5, 2)
    net.parts[0].norm.eval()
    before = net.parts[0].norm.running_mean.clone()
    compare(net, torch.randn(2, 4, 6, 7, device=DEVICE), torch.float32)
    assert torch.equal(net.parts[0].norm.running_mean, before)


def test_statistics_of_several_processes_on_triton(monkeypatch):
    """Of two processes with the same images: the gradients of one are those without the other."""
    from fastperc.ops import fused_chain

    net, x = varied(ConvBNReLU(4, 8, 3, padding=1)), torch.randn(2, 4, 6, 7, device=DEVICE)
    alone, _ = run(net, x, "triton", torch.float32)
    monkeypatch.setattr(fused_chain, "group_of", lambda norm: "a group")
    monkeypatch.setattr(fused_chain, "gathered", lambda mine, group: torch.stack([mine, mine]))
    together, _ = run(net, x, "triton", torch.float32)
    for name, gradient in alone.items():
        assert error(together[name], gradient) < 1e-5 or gradient.abs().max() < 1e-5, name


def test_weights_that_want_no_gradient_on_triton_get_none():
    net = varied(Row(ConvBNReLU(4, 8, 3, padding=1), ConvBNReLU(8, 8, 3, padding=1)))
    net.parts[0].requires_grad_(False)
    x = torch.randn(1, 4, 6, 7, device=DEVICE)
    with use_backend("triton"):
        net(x).square().sum().backward()
    wanted = [p.grad for p in net.parts[1].parameters()]
    assert all(p.grad is None for p in net.parts[0].parameters())
    net.requires_grad_(True).zero_grad()
    with use_backend("triton"):
        net(x).square().sum().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parts[1].parameters(), wanted))


def test_gradients_of_gradients_on_triton():
    net, x = varied(Row(ConvBNReLU(3, 4, 3, padding=1), ResidualBlock(4))), torch.randn(1, 3, 5, 4, device=DEVICE)

    def penalty(backend):
        leaf = x.clone().requires_grad_()
        with use_backend(backend):
            (gradient,) = torch.autograd.grad(net(leaf).pow(3).sum(), leaf, create_graph=True)
            parameters = [p for p in net.parameters() if p.requires_grad]
            return torch.autograd.grad(gradient.square().sum(), [leaf, *parameters], allow_unused=True)

    ours, stock = penalty("triton"), penalty("reference")
    largest = max(one.norm() for one in stock if one is not None)
    for mine, theirs in zip(ours, stock):
        mine, theirs = (torch.zeros(()) if one is None else one for one in (mine, theirs))
        assert (mine - theirs).norm() < 1e-4 * largest


def test_checkpointing_and_accumulation_on_triton():
    net, x = varied(Row(ConvBNReLU(3, 4, 3, padding=1), ResidualBlock(4))), torch.randn(2, 3, 6, 5, device=DEVICE)
    gradients = []
    with use_backend("triton"):
        for checkpointed in (False, True):
            net.zero_grad()
            for half in x.split(1):
                again = torch.utils.checkpoint.checkpoint(net, half, use_reentrant=False) if checkpointed else net(half)
                again.square().sum().backward()
            gradients.append([p.grad.clone() for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def kept_bytes(net, x, backend):
    """What the backward is kept waiting with, each piece of memory once; parameters and the input not counted."""
    seen = {}
    known = {t.untyped_storage().data_ptr() for t in (x, *net.parameters(), *net.buffers())}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            seen[storage.data_ptr()] = (storage.nbytes(), t)  # held, so that its address is not given out again
        return t

    hooks, autocast = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast(DEVICE, HALF)
    with use_backend(backend), hooks, autocast:
        y = net(x)
    del y
    return sum(size for size, _ in seen.values())


@pytest.mark.usefixtures("half_computed")  # as on a GPU
def test_little_is_kept_for_the_backward_on_triton():
    net, x = varied(TransformNet("paper", width=16)), torch.rand(1, 3, 32, 32, device=DEVICE)
    assert kept_bytes(net, x, "triton") <= 0.55 * kept_bytes(net, x, "reference")


def chosen(net, x):
    with backends.recorded() as choices:
        net(x)
    return [choice.implementation for choice in choices if choice.operation == "conv_chain"]


CAUSES = {
    "hook": lambda net: net.parts[1].norm1.register_forward_hook(lambda module, inputs, output: 2 * output),
    "groups": lambda net: setattr(net.parts[0], "conv", nn.Conv2d(4, 8, 3, padding=1, groups=2)),
    "no bias": lambda net: setattr(net.parts[0], "conv", nn.Conv2d(4, 8, 3, padding=1, bias=False)),
    "circular": lambda net: setattr(net.parts[0], "conv", nn.Conv2d(4, 8, 3, padding=1, padding_mode="circular")),
    "affine": lambda net: setattr(net.parts[0], "norm", nn.BatchNorm2d(8, affine=False)),
    "other norm": lambda net: setattr(net.parts[0], "norm", nn.GroupNorm(2, 8)),
    "no gradient": lambda net: net.requires_grad_(False),
    "he": lambda net: setattr(net.parts[1], "residual", "he"),
    "float64": lambda net: net.double(),
}


@pytest.mark.parametrize("cause", CAUSES)
def test_the_rest_is_not_triton_s(cause, monkeypatch):
    net = Row(ConvBNReLU(4, 8, 3, padding=1), ResidualBlock(8)).to(DEVICE)
    x = torch.randn(2, 4, 6, 7, device=DEVICE, dtype=torch.float64 if cause == "float64" else torch.float32)
    layers = [layer for part in net.parts for layer in part.layers()]
    with use_backend("triton"):
        if cause != "float64":
            assert why_not_triton(x, layers) is None
        CAUSES[cause](net)
        net.to(DEVICE)
        layers = [layer for part in net.parts for layer in part.layers()]
        assert why_not_triton(x, layers)
        with pytest.raises(backends.CannotServe, match="conv_chain cannot run on the triton backend"):
            ops.conv_chain(x, layers)
    assert net(x).shape == (2, 8, 6, 7)


def test_a_wide_layer_of_three_channels_reads_an_image_only():
    first, wide = ConvBNReLU(16, 3, 3, padding=1), ConvBNReLU(3, 16, 5, padding=2)
    layers = [*first.to(DEVICE).layers(), *wide.to(DEVICE).layers()]
    with use_backend("triton"):
        x = torch.randn(1, 16, 8, 9, device=DEVICE)
        assert "reads an image only" in why_not_triton(x, layers)
        assert why_not_triton(x[:, :3], layers[1:]) is None


def test_hooks_between_modules_are_called():
    net, seen = TransformNet("paper", width=4).to(DEVICE), []
    net.blocks[2].register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    net(torch.rand(1, 3, 16, 16, device=DEVICE))
    assert seen == [(1, 16, 4, 4)]


def test_a_subclass_does_what_it_does():
    class Negative(ConvBNReLU):
        def forward(self, x):
            return -super().forward(x)

    net = Row(Negative(4, 8, 3, padding=1), ConvBNReLU(8, 8, 3, padding=1, relu=False)).to(DEVICE)
    x = torch.randn(2, 4, 6, 7, device=DEVICE)
    with use_backend("triton"):
        assert torch.equal(net(x), net.parts[1](-ConvBNReLU.forward(net.parts[0], x)))


@pytest.mark.parametrize("shape", [(0, 4, 6, 6), (2, 4, 1, 1), (1, 4, 1, 1)], ids=["empty", "few", "one"])
def test_what_has_few_values_is_pytorchs(shape):
    block = ConvBNReLU(4, 8, 3, padding=1).to(DEVICE)
    x = torch.randn(shape, device=DEVICE)
    if shape[0] == 1:
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            block(x)
    else:
        stock = copy.deepcopy(block)
        expected = stock.norm(stock.conv(x)).relu()
        assert torch.equal(block(x), expected)


def test_a_nan_reaches_the_output_and_the_gradients_on_triton():
    block, x = varied(ConvBNReLU(4, 8, 3, padding=1)), torch.randn(1, 4, 6, 6, device=DEVICE)
    x[0, 1, 2, 3] = torch.nan
    with use_backend("triton"):
        y = block(x)
        y.sum().backward()
    assert y.isnan().all() and block.conv.weight.grad.isnan().all()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_instance_norm_of_one_image_has_the_right_gradient(layout):
    """PyTorch's own has not, on a CPU, where its output's gradient lies in NHWC."""
    net = Row(ResidualBlock(4, norm="instance"), SubpixelConvBNReLU(4, 4, norm="instance")).double()
    twin = Row(ResidualBlock(4), SubpixelConvBNReLU(4, 4)).double()  # of one image the same
    twin.load_state_dict(net.state_dict(), strict=False)
    x, results = torch.randn(1, 4, 5, 5, dtype=torch.float64), []
    for one in (net, twin):
        one.to(memory_format=layout)
        leaf = x.contiguous(memory_format=layout).requires_grad_()
        (gradient,) = torch.autograd.grad(one(leaf).pow(3).sum(), leaf)
        results.append(gradient)
    assert error(*results) < 1e-10
