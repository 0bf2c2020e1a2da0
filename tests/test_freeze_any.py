"""``freeze`` of networks that this library did not write."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable

import gallery
import pytest
import torch
import torch.nn.functional as F
from cases import error
from torch import Tensor, nn

from fastperc import freeze, use_backend

NETWORKS = gallery.networks(0.25)


def exact(net: nn.Module, *inputs: Tensor) -> Tensor:
    return copy.deepcopy(net).double().eval()(*(x.double() for x in inputs))


def check(net: nn.Module, *inputs: Tensor, tune: bool = False, **options: object) -> None:
    """The frozen network is as near to float64 as the network itself, or has an error below 1e-5."""
    net.eval()
    with torch.no_grad():
        expected, plain = exact(net, *inputs), net(*inputs)
        frozen = freeze(net, tune=tune, **options)
        first, second = frozen(*inputs), frozen(*inputs)
    assert first.shape == plain.shape and first.dtype == plain.dtype
    assert torch.equal(first, second)
    assert error(first, expected) < max(1e-5, 1.5 * error(plain, expected))


def layers_of(frozen) -> list[str]:
    (network,) = frozen._networks.values()
    return [group.name for group in network.groups.values()]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", NETWORKS)
def test_gallery(name, batch):
    net = NETWORKS[name]()
    height, width = gallery.SIZES[name].small
    check(net, torch.rand(batch, 3, height, width))


@pytest.mark.parametrize("name", NETWORKS)
def test_gallery_exported(name):
    """The same by torch.export, which knows no modules."""
    net = NETWORKS[name]().eval()
    x = torch.rand(2, 3, *gallery.SIZES[name].small)
    traced, exported = freeze(net, tune=False), freeze(net, tune=False, example=x)
    exported._exports = True
    assert error(exported(x), traced(x)) < 1e-5
    groups = [len(next(reversed(frozen._networks.values())).groups) for frozen in (traced, exported)]
    assert groups[0] == groups[1]


@pytest.mark.parametrize("name", ["unet", "rrdb", "resnet18"])
def test_measured(name):
    """Whatever is faster is right."""
    net = NETWORKS[name]()
    frozen = freeze(net)
    x = torch.rand(1, 3, *gallery.SIZES[name].small)
    check(net, x, tune=True)
    frozen(x)
    assert " by the network itself" in frozen.explain(x).splitlines()[0]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(("dtype", "batch"), [(torch.bfloat16, 1), (torch.bfloat16, 3), (torch.float16, 1)])
def test_half_precision(name, dtype, batch):
    """No farther from float64 than stock is in that dtype, by half as much again."""
    net = NETWORKS[name]().eval()
    x = torch.rand(batch, 3, *gallery.SIZES[name].small)
    with torch.no_grad():
        expected = exact(net, x)
        stock = copy.deepcopy(net).to(dtype)(x.to(dtype))
    y = freeze(net, dtype, tune=False)(x.to(dtype))
    assert y.dtype == dtype and error(y, expected) < 1.5 * error(stock, expected)


def conv(i: int = 32, o: int = 32, *args, **kwargs) -> nn.Conv2d:
    return nn.Conv2d(i, o, *(args or (3, 1, 1)), **kwargs)


class Twice(nn.Module):
    """One convolution with two norms, one of them in functional style."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.first, self.second = conv(), nn.BatchNorm2d(32), nn.BatchNorm2d(32)
        for norm in (self.first, self.second):
            nn.init.uniform_(norm.running_mean), nn.init.uniform_(norm.running_var, 0.5, 2), nn.init.uniform_(norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        second = self.second
        x = F.relu(self.first(self.conv(x)), inplace=True)
        y = F.batch_norm(self.conv(x), second.running_mean, second.running_var, second.weight, second.bias)
        return (x + y).relu_()


def of(function: Callable[..., Tensor], **modules: nn.Module) -> nn.Module:
    """A network with ``modules`` whose forward is ``function(self, x)``."""
    kind = type("Net", (nn.Module,), {"forward": function})
    net = kind()
    for name, module in modules.items():
        setattr(net, name, module)
    return net


def read_after_change(self, x):
    y = self.conv(x)
    z = F.relu_(y)
    return self.other(z) + y  # y is the ReLU by now


def change_after_read(self, x):
    x = self.conv(x)
    y = self.other(x)
    x.relu_()
    return self.norm(y) + x


def change_of_a_view(self, x):
    x = self.conv(x)
    half = x[:, :16]
    y = self.other(x)
    half.relu_()
    return F.relu(y) + x


def change_of_a_part(self, x):
    x = self.conv(x)
    y = self.other(x)
    x[:, :, 0] = 0
    return F.relu(y) * x


def residual_scaling(self, x):
    y = self.conv(x).mul(0.3) + x
    y = torch.add(x, self.other(y), alpha=0.2)
    y = self.conv(y) * 0.5 - x
    return y - self.other(y)


def broadcast(self, x):
    return F.relu(self.conv(x) + x.mean((2, 3), keepdim=True)) * torch.sigmoid(self.other(x))


def computed_weight(self, x):
    return F.silu(F.conv2d(x, self.conv.weight * 0.5, self.conv.bias, padding="same"))


def shared_padding(self, x):
    x = F.pad(x, (1, 1, 1, 1), mode="reflect")
    return F.conv2d(x, self.conv.weight) + F.conv2d(x, self.other.weight, self.other.bias)


def shuffles(self, x):
    return self.act(F.pixel_shuffle(self.conv(x), 2))


def concatenations(self, x):
    a = self.conv(x)
    b = self.other(torch.cat([x, a], 1))
    middle = torch.cat([a, b], 1)
    whole = torch.cat([torch.cat([x, a], 1), b, x * 2], 1)
    return torch.cat([whole, middle, self.conv(a), self.conv(b)], 1) + torch.cat((b, a, middle, whole), dim=1)


def of_sizes(self, x):
    h, w = x.shape[-2:]
    y = F.interpolate(self.conv(x), size=(h // 2, w // 2 + 1), mode="nearest")
    y = F.interpolate(y, size=x.size()[2:], mode="bilinear")
    assert x.shape[1] == 32, "channels"
    return y.view(x.shape[0], -1).reshape(x.shape) + self.other(x)


CASES = {
    "twice": Twice(),
    "read after change": of(read_after_change, conv=conv(), other=conv()),
    "change after read": of(change_after_read, conv=conv(), other=conv(), norm=nn.BatchNorm2d(32)),
    "change of a view": of(change_of_a_view, conv=conv(), other=conv()),
    "residual scaling": of(residual_scaling, conv=conv(), other=conv()),
    "broadcast": of(broadcast, conv=conv(), other=conv()),
    "computed weight": of(computed_weight, conv=conv()),
    "shared padding": of(shared_padding, conv=conv(), other=conv()),
    "shuffle, PReLU": of(shuffles, conv=conv(32, 128), act=nn.PReLU(32, 0.3)),
    "concatenations": of(concatenations, conv=conv(), other=conv(64, 32)),
    "sizes": of(of_sizes, conv=conv(), other=conv()),
    "batch statistics": nn.Sequential(conv(), nn.BatchNorm2d(32, track_running_stats=False), nn.ReLU(), conv()),
    "tracked instance norm": nn.Sequential(conv(), nn.InstanceNorm2d(32, track_running_stats=True), nn.ReLU6()),
    "instance norm, tanh": nn.Sequential(conv(), nn.InstanceNorm2d(32, affine=True), nn.Tanh()),
    "strides": nn.Sequential(conv(32, 32, (3, 5), (2, 1), (1, 0)), nn.LeakyReLU(0.1), conv(32, 32, 3, 3, bias=False)),
    "dilation, groups": nn.Sequential(
        conv(32, 64, 3, 1, 2, dilation=2), nn.PReLU(64), conv(64, 64, 3, 1, 1, groups=64), nn.SiLU(), conv(64, 32, 1)
    ),
    "padding modes": nn.Sequential(
        conv(padding_mode="reflect"), conv(padding_mode="replicate"), conv(padding_mode="circular"),
        conv(32, 32, 4, 1, "same"),
    ),
    "pads": nn.Sequential(nn.ReplicationPad2d(2), conv(32, 32, 5), nn.ZeroPad2d((1, 2, 0, 1)), conv(32, 32, 3, 2)),
    "transposed": nn.Sequential(
        nn.ConvTranspose2d(32, 32, 3, 2, 1, 1),
        nn.BatchNorm2d(32),
        nn.ReLU(True),
        nn.ConvTranspose2d(32, 16, 2, 2, groups=4),
        nn.BatchNorm2d(16),
        nn.ConvTranspose2d(16, 8, 4, 2, 1, bias=False),
        nn.Sigmoid(),
    ),
    "nearest": nn.Sequential(nn.Upsample(scale_factor=2), nn.ReflectionPad2d(1), conv(32, 32, 3), nn.LeakyReLU(0.2)),
    "ends": nn.Sequential(
        conv(32, 3, 9, 1, 4), nn.Tanh(), nn.ReflectionPad2d(3), conv(3, 32, 7), nn.PReLU(), conv(32, 3, 7, 1, 3)
    ),
    "no convolution": nn.Sequential(nn.Flatten(), nn.Linear(32 * 13 * 17, 5), nn.Softmax(1)),
    "dropouts": nn.Sequential(conv(), nn.Dropout2d(), nn.ReLU(), nn.Identity(), nn.Dropout(0.5, True), conv()),
}  # fmt: skip


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_styles(case, batch):
    torch.manual_seed(0)
    net, x = CASES[case], torch.randn(batch, 32, 13, 17)
    check(net, x.clone(), tune=batch == 2)
    if case != "sizes":  # whose view fails there
        check(net, x.clone(memory_format=torch.channels_last))


def test_what_is_fused():
    frozen = freeze(CASES["twice"], tune=False)
    assert layers_of(frozen) == ["conv", "conv"]
    lines = frozen.explain(torch.rand(1, 32, 16, 16)).splitlines()
    assert len(lines) == 3 and lines[1].startswith("conv ")


def test_hooks_are_respected():
    """A layer with a hook runs as it is, and so does a block with one."""
    net = nn.Sequential(conv(), nn.ReLU(), nn.Sequential(conv(), nn.ReLU()), conv()).eval()
    net[0].register_forward_hook(lambda module, args, output: output + 1)
    net[2].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    check(net, torch.rand(1, 32, 9, 9))
    assert layers_of(freeze(net, tune=False)) == ["3"]


def test_weights_are_copied():
    net, x = nn.Sequential(conv(), nn.BatchNorm2d(32)).eval(), torch.rand(1, 32, 8, 8)
    frozen = freeze(net)
    before = frozen(x)
    with torch.no_grad():
        net[0].weight.zero_()
    assert torch.equal(frozen(x), before)
    assert not net[1].training and net.train() is net and frozen(x).equal(before)


def test_copies_and_threads():
    net, x = NETWORKS["rrdb"]().eval(), torch.rand(1, 3, 9, 11)
    frozen = freeze(net, tune=False)
    expected = frozen(x)
    for other in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
        assert torch.equal(other(x), expected)
    results: dict[int, Tensor] = {}

    def run(size: int) -> None:
        results[size] = frozen(torch.full((1, 3, size, size), 0.5))

    threads = [threading.Thread(target=run, args=(size,)) for size in (8, 9, 10, 11)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[size], frozen(torch.full((1, 3, size, size), 0.5))) for size in results)
    assert len(results) == 4


def structured(self, x, y, scale=1.0, more=None, *, flag: bool = False):
    z = self.conv(x) * scale + y
    if flag:
        z = -z
    return {"sum": z if more is None else z + more, "both": (x, z.mean())}


def test_arguments_and_results():
    net = of(structured, conv=conv()).eval()
    x, y = torch.rand(1, 32, 8, 8), torch.rand(1, 32, 8, 8)
    frozen = freeze(net, tune=False)
    with torch.no_grad():
        for args, kwargs in [((x, y), {}), ((x, y, 0.5), {}), ((x,), dict(y=y, flag=True)), ((x, y), dict(more=x))]:
            expected, result = net(*args, **kwargs), frozen(*args, **kwargs)
            assert error(result["sum"], expected["sum"]) < 1e-6 and error(result["both"][1], expected["both"][1]) < 1e-5
    with pytest.raises(TypeError, match="missing a required argument: 'y'"):
        frozen(x)


def by_value(self, x):
    if x.sum() > 0:
        return self.conv(x)
    return x


class BySize(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(x.shape[-1] // 8):
            x = F.relu(self.conv(x))
        return x


def test_what_cannot_be_traced_names_the_line():
    line = by_value.__code__.co_firstlineno + 1
    net = of(by_value, conv=conv()).eval()
    message = (
        rf"Net cannot be traced at .*test_freeze_any.py, line {line}: `if x.sum\(\) > 0:`.*accelerate.*torch.compile"
    )
    with pytest.raises(TypeError, match=message):
        freeze(net)
    with pytest.raises(TypeError, match=rf"Net cannot be exported at .*line {line}: .*torch.compile"):
        freeze(net, example=torch.rand(1, 32, 8, 8))


def test_an_example_serves_what_depends_on_the_size():
    net = BySize().eval()
    with pytest.raises(TypeError, match=r"range\(x.shape"):
        freeze(net)
    frozen = freeze(net, example=torch.rand(1, 32, 8, 8), tune=False)
    for width in (8, 16, 31):
        x = torch.rand(2, 32, 5, width)
        assert error(frozen(x), net(x)) < 1e-5
    assert torch.equal(pickle.loads(pickle.dumps(frozen))(x), frozen(x))


def test_an_example_serves_what_changes_a_part():
    net = of(change_of_a_part, conv=conv(), other=conv()).eval()
    x = torch.randn(1, 32, 8, 8)
    with pytest.raises(TypeError, match=r"x\[:, :, 0\] = 0"):
        freeze(net)
    check(net, x, example=x)


def test_what_cannot_be_frozen():
    with pytest.raises(TypeError, match=r"freeze takes a torch.nn.Module, got function"):
        freeze(by_value)
    net = conv()
    nn.init.constant_(net.bias, float("nan"))
    with pytest.raises(ValueError, match="the network's bias has values that are not finite"):
        freeze(net)
    with pytest.raises(ValueError, match="on the meta device"):
        freeze(nn.Sequential(conv(device="meta")))


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_a_forced_backend(backend):
    net, x = nn.Sequential(conv(), nn.ReLU(), conv()).eval(), torch.rand(1, 32, 16, 16)
    frozen = freeze(net)
    with use_backend(backend):
        assert error(frozen(x), net(x)) < 1e-5
        assert backend in frozen.explain(x)
