"""The LPIPS module: against its formula in float64 and the libraries that have it, its files, and what it refuses."""

from __future__ import annotations

import copy
import pickle
import sys
from functools import partial
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from cases import dtype_id, error
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import skip_init
from torch.utils.checkpoint import checkpoint

from fastperc import LPIPS, InputError, use_backend
from fastperc.losses import lpips_weights
from fastperc.models.vgg import CONVOLUTIONS, TORCHVISION_INDEX

CHANNELS = (64, 128, 256, 512, 512)


@pytest.fixture(scope="module")
def vgg():
    """VGG-16's convolutions, random and scaled so that activations keep their size, under torchvision's names."""
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for name, c_in, c_out in CONVOLUTIONS:
        weight = torch.randn(c_out, c_in, 3, 3, generator=generator) * (2 / (9 * c_in)) ** 0.5
        tensors[f"features.{TORCHVISION_INDEX[name]}.weight"] = weight
        tensors[f"features.{TORCHVISION_INDEX[name]}.bias"] = torch.randn(c_out, generator=generator) * 0.05
    return tensors


@pytest.fixture(scope="module")
def channels():
    """Channel weights under lpips' names."""
    generator = torch.Generator().manual_seed(6)
    return {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1, generator=generator) for i, c in enumerate(CHANNELS)}


@pytest.fixture(scope="module")
def files(vgg, channels, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lpips")
    torch.save(vgg, folder / "vgg16.pth")
    torch.save(channels, folder / "vgg.pth")
    return {"weights": folder / "vgg16.pth", "channel_weights": folder / "vgg.pth"}


@pytest.fixture(scope="module")
def loss(files):
    return LPIPS(**files)


def images(*shape, wanted=False):
    return (2 * torch.rand(shape) - 1).requires_grad_(wanted)


def by_formula(vgg, channels, size=None):
    """LPIPS in float64, as lpips writes it."""
    weights = {name: tensor.double() for name, tensor in (vgg | channels).items()}
    shift = torch.tensor([-0.030, -0.088, -0.188], dtype=torch.float64).view(1, 3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450], dtype=torch.float64).view(1, 3, 1, 1)

    def units(x):
        x = (x - shift) / scale
        for name, _, _ in CONVOLUTIONS:
            if name[-1] == "1" and name != "1_1":
                x = F.max_pool2d(x, 2)
            key = f"features.{TORCHVISION_INDEX[name]}"
            x = F.conv2d(x, weights[f"{key}.weight"], weights[f"{key}.bias"], padding=1).relu()
            if name in ("1_2", "2_2", "3_3", "4_3", "5_3"):
                yield x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + 1e-10)

    def distance(a, b):
        total = 0
        for i, (x, y) in enumerate(zip(units(a), units(b))):
            maps = F.conv2d((x - y) ** 2, weights[f"lin{i}.model.1.weight"])
            upsampled = size and F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
            total = total + (maps.mean((2, 3), keepdim=True) if size is None else upsampled)
        return total

    return distance


def value_and_gradients(run, a, b):
    a, b = (x.detach().clone().requires_grad_() for x in (a, b))
    value = run(a, b)
    value.backward(torch.linspace(1, 2, value.numel()).view_as(value).to(value))
    return value.detach(), [a.grad, b.grad]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("spatial", [False, True], ids=["mean", "spatial"])
def test_is_the_formula(files, vgg, channels, spatial, memory_format):
    loss, size = LPIPS(**files, spatial=spatial), (69, 54)
    a, b = (images(1, 3, *size).contiguous(memory_format=memory_format) for _ in range(2))
    ours, grads = value_and_gradients(loss, a, b)
    exact, exact_grads = value_and_gradients(
        by_formula(vgg, channels, size if spatial else None), a.double(), b.double()
    )
    assert ours.shape == ((1, 1, *size) if spatial else (1, 1, 1, 1)) and ours.dtype == torch.float32
    assert error(ours, exact) < 1e-5
    assert all(error(grad, expected) < 5e-4 for grad, expected in zip(grads, exact_grads))


def test_ranges_reductions_and_terms(files, loss):
    a, b = images(2, 3, 16, 20), images(2, 3, 16, 20)
    expected = loss(a, b)
    in_0_1 = LPIPS(**files, normalize=True)
    assert error(in_0_1((a + 1) / 2, (b + 1) / 2), expected) < 1e-5
    assert error(loss((a + 1) / 2, (b + 1) / 2, normalize=True), expected) < 1e-5
    assert error(in_0_1(a, b, normalize=False), expected) < 1e-6
    for reduction, reduce in (("mean", torch.mean), ("sum", torch.sum), (None, torch.clone), ("none", torch.clone)):
        assert torch.equal(LPIPS(**files, reduction=reduction)(a, b), reduce(expected))
    total, terms = loss(a, b, retPerLayer=True)
    assert len(terms) == 5 and torch.equal(total, expected) and error(sum(terms), expected) < 1e-6
    assert not loss(a, a).any() and error(loss(b, a), expected) < 1e-6


def test_a_prepared_target_serves_again(loss):
    a, b = images(3, 3, 33, 20, wanted=True), images(3, 3, 33, 20)
    expected = loss(a, b)
    grad = torch.autograd.grad(expected.sum(), a)[0]
    target = loss.prepare(b)
    assert not any(features.requires_grad for features in target.features)
    for _ in range(2):
        distance = loss(a, target)
        assert error(distance, expected) < 1e-6
        assert error(torch.autograd.grad(distance.sum(), a)[0], grad) < 1e-5
    with pytest.raises(ValueError, match=r"one size, got \[33, 24\] and \[33, 20\]"):
        loss(images(3, 3, 33, 24), target)


@pytest.mark.parametrize("wanted", [False, True], ids=["fixed", "wanted"])
def test_one_image_is_compared_with_all(loss, wanted):
    several, one = images(3, 3, 16, 18, wanted=True), images(1, 3, 16, 18, wanted=wanted)
    expected = torch.cat([loss(x[None], one) for x in several])
    leaves = [several, one] if wanted else [several]
    grads = torch.autograd.grad(expected.sum(), leaves)
    for distance in (
        loss(several, one),
        loss(one, several),
        *[loss(several, loss.prepare(one.detach()))] * (not wanted),
    ):
        assert error(distance, expected) < 1e-6
        assert all(error(a, b) < 1e-5 for a, b in zip(torch.autograd.grad(distance.sum(), leaves), grads))


# The module in a training loop.


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_in_a_training_loop(loss, backend):
    """Checkpointing, autocast, a gradient scaler's factor, and the graph of the loss taken twice."""
    x, target = images(2, 3, 16, 24, wanted=True), images(2, 3, 16, 24)
    with use_backend(backend):
        distance = loss(x, target)
        grad = torch.autograd.grad(distance.sum(), x)[0]
        checkpointed = checkpoint(loss, x, target, use_reentrant=False)
        assert torch.equal(checkpointed, distance)
        assert torch.equal(torch.autograd.grad(checkpointed.sum(), x)[0], grad)
        with torch.autocast("cpu", torch.bfloat16):
            low = loss(x, target)
        assert low.dtype == torch.float32 and error(low, distance) < 0.02
        scaled = torch.autograd.grad(2.0**16 * low.sum(), x)[0]
        assert scaled.dtype == torch.float32 and error(scaled / 2.0**16, grad) < 0.3  # rounding switches some ReLUs


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=dtype_id)
def test_in_half_precision(files, loss, dtype):
    a, b = images(1, 3, 16, 16), images(1, 3, 16, 16)
    half = LPIPS(**files).to(dtype)
    x = a.to(dtype).requires_grad_()
    distance = half(x, b.to(dtype))
    distance.sum().backward()
    assert half.lin0.dtype == torch.float32 and distance.dtype == torch.float32 and x.grad.dtype == dtype
    assert error(distance, loss(a, b)) < 0.02 and x.grad.isfinite().all()


def test_one_graph_for_the_compiler(loss):
    torch.compiler.reset()
    x, target = images(1, 3, 16, 16, wanted=True), images(1, 3, 16, 16)
    compiled = torch.compile(lambda x, target: loss(x, target).mean(), fullgraph=True, backend="aot_eager")
    grads = [torch.autograd.grad(run(x, target), x)[0] for run in (compiled, lambda x, target: loss(x, target).mean())]
    assert error(*grads) < 1e-4


@pytest.mark.parametrize("spatial", [False, True], ids=["mean", "spatial"])
def test_an_empty_batch(files, spatial):
    x = images(0, 3, 16, 24, wanted=True)
    distance = LPIPS(**files, spatial=spatial)(x, images(0, 3, 16, 24))
    assert distance.shape == ((0, 1, 16, 24) if spatial else (0, 1, 1, 1))
    distance.sum().backward()
    assert x.grad.shape == x.shape


def test_is_frozen_copies_and_pickles(loss):
    a, b = images(1, 3, 16, 16), images(1, 3, 16, 16)
    assert not any(parameter.requires_grad for parameter in loss.train().parameters())
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(twin(a, b), loss(a, b))
    other = copy.deepcopy(loss)
    other.lin0.zero_()
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other(a, b), loss(a, b))
    assert loss.double()(a.double(), b.double()).dtype == torch.float64
    loss.float()


# The libraries that have it.


@pytest.fixture(scope="module")
def torchvision_features(vgg):
    """A stand-in for torchvision's ``vgg16().features``."""
    layers, channels = [], 3
    for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0):
        conv = [skip_init(nn.Conv2d, channels, width, 3, padding=1), nn.ReLU(inplace=True)] if width else []
        layers += conv or [nn.MaxPool2d(2, 2)]
        channels = width or channels
    features = nn.Sequential(*layers)
    features.load_state_dict({name.removeprefix("features."): tensor for name, tensor in vgg.items()})
    return features


def assert_same(theirs, loss, a, b):
    """Values in float32; gradients in float64, where no rounding switches a ReLU."""
    assert error(loss(a, b).flatten(), theirs(a, b).flatten()) < 1e-5
    x, y, target = a.double().requires_grad_(), a.double().requires_grad_(), b.double()
    (loss.double()(x, target).sum() + theirs.double()(y, target).sum()).backward()
    assert error(x.grad, y.grad) < 1e-5
    loss.float(), theirs.float()


def test_equals_torchmetrics(monkeypatch, files, torchvision_features):
    pytest.importorskip("torchmetrics")
    from torchmetrics.functional.image import lpips as theirs

    monkeypatch.setattr(theirs, "_get_tv_model_features", lambda *arguments: torchvision_features)
    for normalize in (False, True):
        loss = LPIPS(weights=files["weights"], normalize=normalize)  # with the weights that torchmetrics carries
        a, b = ((images(2, 3, 40, 33) + normalize) / (1 + normalize) for _ in range(2))
        network = theirs._NoTrainLpips(net="vgg")
        network.forward = partial(network.forward, normalize=normalize)
        assert_same(network, loss, a, b)
        for reduction in ("mean", "sum"):
            value = theirs.learned_perceptual_image_patch_similarity(a, b, "vgg", reduction, normalize)
            ours = LPIPS(weights=files["weights"], normalize=normalize, reduction=reduction)(a, b)
            assert ours.shape == value.shape and error(ours, value) < 1e-5


def test_equals_lpips(monkeypatch, files, torchvision_features):
    if find_spec("lpips") is None:
        pytest.skip("needs lpips")
    torchvision, trainer = ModuleType("torchvision"), ModuleType("lpips.trainer")
    torchvision.models = ModuleType("torchvision.models")
    torchvision.models.vgg16 = lambda **options: type("VGG", (), {"features": torchvision_features})
    stand_ins = {"torchvision": torchvision, "torchvision.models": torchvision.models, "lpips.trainer": trainer}
    for name, module in stand_ins.items():
        monkeypatch.setitem(sys.modules, name, module)
    import lpips

    for spatial in (False, True):
        loss = LPIPS(weights=files["weights"], spatial=spatial)  # with the weights that the package carries
        theirs = lpips.LPIPS(net="vgg", spatial=spatial, verbose=False)
        a, b = images(2, 3, 40, 33), images(2, 3, 40, 33)
        assert loss(a, b).shape == theirs(a, b).shape
        assert_same(theirs, loss, a, b)
        terms, expected = loss(a, b, retPerLayer=True)[1], theirs(a, b, retPerLayer=True)[1]
        assert all(error(x, y) < 1e-5 for x, y in zip(terms, expected))


# Files, and what is refused.


@pytest.mark.parametrize("names", ["no-dropout", "prefix", "short", "safetensors", "state-dict"])
def test_channel_weights_under_every_name(tmp_path, files, channels, loss, names):
    renamed = {
        "no-dropout": {f"lin{i}.model.0.weight": x for i, x in enumerate(channels.values())},
        "prefix": {f"loss.lpips.{name}": x for name, x in channels.items()},
        "short": {f"lin{i}": x.flatten() for i, x in enumerate(channels.values())},
        "safetensors": channels,
        "state-dict": {
            "scaling_layer.shift": torch.zeros(1, 3, 1, 1),
            "net.slice1.0.weight": torch.zeros(64, 3, 3, 3),
            **channels,
            **{f"{'lin' + 's'}.{i}.model.1.weight": x for i, x in enumerate(channels.values())},
        },
    }[names]
    path = tmp_path / f"channels.{'safetensors' if names == 'safetensors' else 'pth'}"
    (save_file if names == "safetensors" else torch.save)(renamed, path)
    read = lpips_weights.channel_weights(path, dict(zip(range(5), CHANNELS)))
    assert all(torch.equal(a, getattr(loss, f"lin{i}")) for i, a in enumerate(read))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"lin1.model.1.weight": torch.rand(1, 192, 1, 1)}, r"another network: .*relu2_2 .*\[1, 192, 1, 1\]"),  # alex
        ({"lin4.model.1.weight": None}, "lin4 is missing"),
        ({f"lin{i}.model.1.weight": torch.rand(1, 512, 1, 1) for i in (5, 6)}, "another network"),  # squeeze
        ({"lin2.model.1.weight": torch.full((1, 256, 1, 1), torch.nan)}, "lin2 has values that are not finite"),
        (None, "holds no channel weights of LPIPS"),
    ],
    ids=["alex", "missing", "squeeze", "not-finite", "nothing"],
)
def test_other_channel_weights_are_refused(tmp_path, files, channels, change, told):
    tensors = (
        {"x": torch.rand(3)} if change is None else {k: v for k, v in (channels | change).items() if v is not None}
    )
    torch.save(tensors, tmp_path / "channels.pth")
    with pytest.raises(InputError, match=rf"channels\.pth: .*{told}"):
        LPIPS(weights=files["weights"], channel_weights=tmp_path / "channels.pth")


def test_channel_weights_of_installed_packages(monkeypatch, tmp_path, files, channels):
    """lpips comes first; neither package is imported."""
    for package, file in lpips_weights.PACKAGES.items():
        path = tmp_path / package / file
        path.parent.mkdir(parents=True)
        (tmp_path / package / "__init__.py").write_text("raise RuntimeError('imported')")
        torch.save({name: x * (2 if package == "lpips" else 3) for name, x in channels.items()}, path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for package in lpips_weights.PACKAGES:
        monkeypatch.delitem(sys.modules, package, raising=False)
    for factor, package in ((2, "lpips"), (3, "torchmetrics")):
        found = lpips_weights.channel_weights(None, dict(zip(range(5), CHANNELS)))
        assert torch.equal(found[0], factor * channels["lin0.model.1.weight"].flatten())
        (tmp_path / package / lpips_weights.PACKAGES[package]).unlink()
    monkeypatch.setattr(lpips_weights, "find_spec", lambda package: None)
    with pytest.raises(InputError, match=r"install lpips or torchmetrics, .* or pass lpips' file vgg.pth"):
        LPIPS(weights=files["weights"])


def test_files_that_are_missing(tmp_path, files):
    for argument in files:
        with pytest.raises(InputError, match=r"none\.pth: no such file"):
            LPIPS(**files | {argument: tmp_path / "none.pth"})


def test_caffes_vgg_is_refused(tmp_path, files, vgg):
    index = {number: name for name, number in TORCHVISION_INDEX.items()}
    caffe = {f"conv{index[int(name.split('.')[1])]}.{name.split('.')[2]}": tensor for name, tensor in vgg.items()}
    save_file(caffe, tmp_path / "caffe.safetensors")
    with pytest.raises(InputError, match="holds Caffe's VGG-16"):
        LPIPS(weights=tmp_path / "caffe.safetensors", channel_weights=files["channel_weights"])


@pytest.mark.parametrize(
    ("a", "b", "told"),
    [
        (images(1, 3, 16, 16), 255 * images(1, 3, 16, 16), r"second image must be RGB in −1…1, got values from"),
        ((255 * images(1, 3, 16, 16)).byte(), images(1, 3, 16, 16), r"first image must be RGB in −1…1, .*uint8"),
        (images(1, 1, 16, 16), images(1, 3, 16, 16), r"first image must be RGB \[N, 3, H, W\].* got shape \[1, 1"),
        (images(1, 3, 16, 16), images(3, 16, 16), r"second image must be RGB \[N, 3, H, W\]"),
        (images(1, 3, 16, 16), images(1, 3, 16, 15), r"at least 16, got shape \[1, 3, 16, 15\]"),
        (images(1, 3, 16, 16), images(1, 3, 16, 17), r"one size, got \[16, 16\] and \[16, 17\]"),
        (images(2, 3, 16, 16), images(3, 3, 16, 16), "as many images on both sides"),
    ],
    ids=["levels", "uint8", "grey", "no-batch", "tiny", "sizes", "batches"],
)
def test_images_that_do_not_fit(loss, a, b, told):
    with pytest.raises(ValueError, match=told):
        loss(a, b)


@pytest.mark.parametrize(
    ("options", "told"),
    [({"net": "alex"}, "net must be 'vgg', got 'alex'"), ({"reduction": "max"}, "reduction must be one of none, mean")],
)
def test_other_options_are_refused(files, options, told):
    with pytest.raises(ValueError, match=told):
        LPIPS(**files, **options)


def test_the_mean_over_no_images_is_zero(files):
    empty = torch.zeros(0, 3, 32, 32)
    assert LPIPS(**files, reduction="mean")(empty, empty) == 0


def test_a_network_that_leaves_the_range_can_be_evaluated(loss):
    with torch.no_grad():
        assert loss(9 * torch.rand(1, 3, 32, 32), images(1, 3, 32, 32)).isfinite().all()


def test_second_image_made_of_the_first_in_a_gradient_that_is_differentiated_again(loss):
    x = images(1, 3, 32, 32, wanted=True)
    gradients = [
        torch.autograd.grad(loss(x.tanh(), (x.tanh() * 0.5).sin()).sum(), x, create_graph=create)[0]
        for create in (False, True)
    ]
    assert error(gradients[1], gradients[0]) < 1e-4
