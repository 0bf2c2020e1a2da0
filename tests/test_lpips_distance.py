"""LPIPS of feature maps: its kernels against the formula in float64, in every dtype and layout."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import DEVICES, GPU, LAYOUTS, RUNS, dtype_id, error, no_worse

from fastperc import _native, ops, reference, use_backend

# Layers of one call: as VGG-16 has them, and channels and pixels that fill no block.
LAYERS = {
    "vgg-like": [(2, 64, 9, 13), (2, 128, 4, 5), (2, 512, 2, 3)],
    "odd": [(2, 3, 5, 7), (2, 17, 1, 1), (2, 2, 3, 4), (2, 130, 1, 9), (2, 5, 6, 1)],
    "many-pixels": [(1, 5, 67, 31)],
}
KERNEL_RUNS = [run for run in RUNS if run != ("cuda", "native")]
CASES = [
    pytest.param(device, backend, dtype, id=f"{device}-{backend}-{dtype_id(dtype)}")
    for device, backend in KERNEL_RUNS
    for dtype in [*[torch.float64] * (backend == "native"), torch.float32, torch.float16, torch.bfloat16]
]
ULP = {torch.float64: 1e-12, torch.float32: 4e-7, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # of a gradient's dtype


def features_of(layers, device, dtype, layout="nhwc"):
    """Two sides of features, as they are after a ReLU, and channel weights. One pixel of each side is zero."""
    sides = []
    for side in range(2):
        xs = [LAYOUTS[layout](torch.randn(shape).relu().to(device, dtype)) for shape in LAYERS[layers]]
        if layout != "expanded":
            xs[0][0, :, side, 0] = 0
        sides.append(xs)
    return *sides, [torch.rand(shape[1], device=device) for shape in LAYERS[layers]]


def distance_and_gradients(run, features_a, features_b, weights, size=None, wanted=(True, True)):
    sides = [
        [x.detach().requires_grad_(want) for x in features] for features, want in zip((features_a, features_b), wanted)
    ]
    distance = run(*sides, weights, size)
    distance.backward(torch.linspace(1, 2, distance.numel(), device=distance.device).view_as(distance).to(distance))
    return distance.detach(), [x.grad for side, want in zip(sides, wanted) if want for x in side]


def double(tensors):
    return [x.detach().double() for x in tensors]


def lpips_by_formula(features_a, features_b, weights, size):
    """As lpips has it, for features without a zero vector."""
    total = 0
    for a, b, weight in zip(features_a, features_b, weights):
        unit_a, unit_b = (x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10) for x in (a, b))
        distances = F.conv2d((unit_a - unit_b) ** 2, weight.view(1, -1, 1, 1))
        if size is None:
            total = total + distances.mean([2, 3], keepdim=True)
        else:
            total = total + torch.nn.Upsample(size=size, mode="bilinear", align_corners=False)(distances)
    return total


@pytest.mark.parametrize("size", [None, (24, 17)], ids=["mean", "spatial"])
def test_the_reference_is_the_formula(size):
    features = [[torch.rand(2, c, 6, 5, dtype=torch.float64) for c in (3, 8)] for _ in range(2)]
    weights = [torch.rand(c, dtype=torch.float64) for c in (3, 8)]
    ours, grads = distance_and_gradients(reference.lpips_distance, *features, weights, size)
    exact, exact_grads = distance_and_gradients(lpips_by_formula, *features, weights, size)
    assert ours.shape == ((2, 1, 1, 1) if size is None else (2, 1, *size)) and error(ours, exact) < 1e-12
    assert all(error(a, b) < 1e-12 for a, b in zip(grads, exact_grads))


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize(("device", "backend", "dtype"), CASES)
@pytest.mark.usefixtures("poisoned")
def test_every_backend_is_as_exact_as_plain_pytorch(device, backend, dtype, layout, layers):
    *features, weights = features_of(layers, device, dtype, layout)
    channels_last = torch.channels_last
    truncates = (
        backend == "triton" and dtype == torch.bfloat16 and not GPU
    )  # the interpreter does not round to bfloat16
    floor = 2.0**-7 if truncates else 4e-7
    for size in (None, (24, 17)):
        with use_backend(backend):
            distance, grads = distance_and_gradients(ops.lpips_distance, *features, weights, size)
        stock, stock_grads = distance_and_gradients(reference.lpips_distance, *features, weights, size)
        exact, exact_grads = distance_and_gradients(
            reference.lpips_distance, *map(double, features), double(weights), size
        )
        assert distance.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert distance.shape == exact.shape
        no_worse(distance, stock, exact)
        for x, grad, stock_grad, exact_grad in zip([*features[0], *features[1]], grads, stock_grads, exact_grads):
            assert grad.dtype == dtype and grad.shape == x.shape
            assert grad.is_contiguous() if layout == "nchw" else grad.is_contiguous(memory_format=channels_last)
            no_worse(grad, stock_grad, exact_grad, floor)


@pytest.mark.parametrize("wanted", [(True, False), (False, True)], ids=["first", "second"])
@pytest.mark.parametrize(("device", "backend"), KERNEL_RUNS, ids=str)
def test_gradients_of_one_side_alone(device, backend, wanted):
    *features, weights = features_of("odd", device, torch.float32)
    with use_backend(backend):
        _, both = distance_and_gradients(ops.lpips_distance, *features, weights)
        _, one = distance_and_gradients(ops.lpips_distance, *features, weights, wanted=wanted)
    layers = len(features[0])
    assert all(torch.equal(a, b) for a, b in zip(one, both[:layers] if wanted[0] else both[layers:]))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("device", "backend"), KERNEL_RUNS, ids=str)
def test_any_memory_layout(device, backend, layout):
    features_a, _, weights = features_of("odd", device, torch.float32, layout)
    _, features_b, _ = features_of("odd", device, torch.float32)
    with use_backend(backend):
        distance, grads = distance_and_gradients(ops.lpips_distance, features_a, features_b, weights)
    exact, exact_grads = distance_and_gradients(
        reference.lpips_distance, double(features_a), double(features_b), double(weights)
    )
    assert error(distance, exact) < 1e-6
    assert all(error(grad, expected) < 2e-6 for grad, expected in zip(grads, exact_grads))


@pytest.mark.parametrize(("device", "backend"), KERNEL_RUNS, ids=str)
def test_one_image_serves_all_others(device, backend):
    features_a, features_b, weights = features_of("odd", device, torch.float32)
    alone = [x[1:].clone() for x in features_b]
    for sides in ((features_a, alone), (alone, features_a)):
        with use_backend(backend):
            distance, grads = distance_and_gradients(ops.lpips_distance, *sides, weights)
        exact, exact_grads = distance_and_gradients(reference.lpips_distance, *map(double, sides), double(weights))
        assert distance.shape == (2, 1, 1, 1) and error(distance, exact) < 1e-6
        assert all(a.shape == b.shape and error(a, b) < 2e-6 for a, b in zip(grads, exact_grads))


@pytest.mark.parametrize(("device", "backend"), KERNEL_RUNS, ids=str)
def test_same_bits_every_time(device, backend):
    *features, weights = features_of("vgg-like", device, torch.float16)
    with use_backend(backend):
        runs = [distance_and_gradients(ops.lpips_distance, *features, weights) for _ in range(3)]
    for distance, grads in runs[1:]:
        assert torch.equal(distance, runs[0][0])
        assert all(torch.equal(a, b) for a, b in zip(grads, runs[0][1]))


def test_same_bits_on_one_thread_and_two():
    *features, weights = features_of("many-pixels", "cpu", torch.float32)
    threads, runs = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            maps = torch.ops.fastperc.lpips_distance_fwd(*features, weights, "native")
            runs.append([*maps, *torch.ops.fastperc.lpips_distance_bwd(*features, weights, maps, True, True, "native")])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@pytest.mark.parametrize("magnitude", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize(("device", "backend", "dtype"), [case for case in CASES if case.values[2].itemsize == 2])
def test_half_precision_is_finite_at_any_magnitude(device, backend, dtype, magnitude):
    """The square of a feature of 10⁴ passes float16's 65,504, that of 10⁻⁴ is below its least number."""
    shapes = [(1, 64, 6, 5), (1, 512, 2, 2)]
    features = [[(magnitude * (torch.rand(shape) + 0.1)).to(device, dtype) for shape in shapes] for _ in range(2)]
    weights = [torch.rand(shape[1], device=device) for shape in shapes]
    with use_backend(backend):
        distance, grads = distance_and_gradients(ops.lpips_distance, *features, weights)
    exact, exact_grads = distance_and_gradients(reference.lpips_distance, *map(double, features), double(weights))
    assert error(distance, exact) < 1e-5
    for grad, expected in zip(grads, exact_grads):
        least = 2.0**-24 * grad.numel() ** 0.5 if dtype == torch.float16 else 0  # what float16 rounds to 0
        assert grad.isfinite().all()
        assert (grad.double() - expected).norm() < ULP[dtype] * expected.norm() + least


@pytest.mark.parametrize("backend", ["native", "triton", "reference"])
def test_zero_vectors_get_a_gradient_of_zero(backend):
    a, b, weight = torch.zeros(1, 4, 2, 2), torch.rand(1, 4, 2, 2), torch.rand(4)
    a[..., 1] = 1
    with use_backend(backend):
        distance, (grad_a, grad_b) = distance_and_gradients(ops.lpips_distance, [a], [b], [weight])
    assert distance.isfinite() and grad_a.isfinite().all() and grad_b.isfinite().all()
    assert not grad_a[..., 0].any() and grad_a[..., 1].all() and grad_b.all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=dtype_id)
@pytest.mark.parametrize(("device", "backend"), KERNEL_RUNS, ids=str)
def test_equal_features_have_no_distance(device, backend, dtype):
    features, _, weights = features_of("vgg-like", device, dtype)
    with use_backend(backend):
        distance, grads = distance_and_gradients(ops.lpips_distance, features, [x.clone() for x in features], weights)
    assert not distance.any() and not any(grad.any() for grad in grads)


@pytest.mark.parametrize(("device", "backend"), KERNEL_RUNS, ids=str)
def test_one_channel_has_one_direction(device, backend):
    a, b = ([(torch.rand(2, 1, 3, 4, device=device) + 0.1)] for _ in range(2))
    with use_backend(backend):
        distance, grads = distance_and_gradients(ops.lpips_distance, a, b, [torch.ones(1, device=device)])
    assert distance.max() < 1e-12 and all(grad.abs().max() < 1e-6 for grad in grads)


@pytest.mark.parametrize(("device", "backend"), KERNEL_RUNS, ids=str)
def test_not_finite_stays_visible(device, backend):
    *features, weights = features_of("odd", device, torch.float16)
    features[0][0][1, 1, 2, 3] = float("nan")
    with use_backend(backend):
        distance, grads = distance_and_gradients(ops.lpips_distance, *features, weights)
    assert distance[1].isnan() and distance[0].isfinite() and grads[0].isnan().any()


def kernels_of(backend):
    from fastperc.kernels import lpips_distance as triton_kernels

    return _native if backend == "native" else triton_kernels


@pytest.mark.parametrize(("device", "backend", "dtype"), [case for case in CASES if case.values[2].itemsize < 8])
def test_units_take_the_place_of_features(device, backend, dtype):
    """What the loss network does with the kernel: unit gradients in the features' memory, behind a ReLU."""
    *features, weights = features_of("vgg-like", device, dtype)
    for a, b, weight in zip(*features, weights):
        _, exact = distance_and_gradients(reference.lpips_distance, [a.double()], [b.double()], [weight.double()])
        nan = torch.full((len(a), 1, *a.shape[2:]), torch.nan, device=device)
        distances, inverses, masks = nan.clone(), (nan.clone(), nan.clone()), (a != 0, b != 0)
        kernels_of(backend).lpips_distance((a, b), weight, distances, None, (a, b), inverses, True)
        incoming = torch.linspace(1, 2, len(a), device=device).view(-1, 1, 1, 1) / a.shape[2:].numel()
        for units, inverse, mask, expected in zip((a, b), inverses, masks, exact):
            assert error(units.double() * inverse * incoming, expected * mask) < ULP[dtype] + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=dtype_id)
def test_units_are_added(dtype):
    device = "cuda" if GPU else "cpu"
    unit, grad = (torch.randn(2, 5, 9, 7, device=device).to(dtype) for _ in range(2))
    unit, grad = (x.contiguous(memory_format=torch.channels_last) for x in (unit, grad))
    coefficient, out = torch.rand(2, 1, 9, 7, device=device), torch.full_like(grad, torch.nan)
    for above in (grad, None):
        kernels_of("triton").add_units(unit, coefficient, above, out)
        expected = unit.double() * coefficient + (0 if above is None else above.double())
        assert error(out, expected) < ULP[dtype]


@pytest.mark.parametrize("device", DEVICES)
def test_under_autocast(device):
    *features, weights = features_of("odd", device, torch.float32)
    with torch.autocast(device, torch.bfloat16):
        distance = ops.lpips_distance(*features, weights)
    assert distance.dtype == torch.float32 and torch.equal(distance, ops.lpips_distance(*features, weights))


@pytest.mark.parametrize(("device", "backend"), KERNEL_RUNS, ids=str)
def test_operators_are_registered_right(device, backend):
    *features, weights = features_of("odd", device, torch.float16)
    tests = ("test_schema", "test_faketensor")  # tracing works on a GPU alone for Triton: the interpreter wants values
    torch.library.opcheck(torch.ops.fastperc.lpips_distance_fwd, (*features, weights, backend), test_utils=tests)
    maps = torch.ops.fastperc.lpips_distance_fwd(*features, weights, backend)
    arguments = (*features, weights, maps, True, True, backend)
    torch.library.opcheck(torch.ops.fastperc.lpips_distance_bwd, arguments, test_utils=tests)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("device", DEVICES)
def test_compiles_without_a_graph_break(device, dynamic):
    torch.compiler.reset()
    compiled = torch.compile(ops.lpips_distance, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for size in (6, 9):
        features = [[torch.rand(2, c, size, 7, device=device) for c in (5, 3)] for _ in range(2)]
        weights = [torch.rand(c, device=device) for c in (5, 3)]
        distance, grads = distance_and_gradients(ops.lpips_distance, *features, weights)
        again, grads_again = distance_and_gradients(compiled, *features, weights)
        assert error(again, distance) < 1e-6
        assert all(error(a, b) < 1e-6 for a, b in zip(grads_again, grads))


def test_gradcheck_once_and_twice():
    a, b = ((torch.rand(2, 3, 2, 3, dtype=torch.float64) + 0.1).requires_grad_() for _ in range(2))
    weights = [torch.rand(3, dtype=torch.float64)] * 2

    def distance(a, b):
        return ops.lpips_distance([a, a * b], [b, b], weights)

    with use_backend("native"):
        assert torch.autograd.gradcheck(distance, (a, b))
        assert torch.autograd.gradgradcheck(distance, (a, b))


def test_channel_weights_that_want_gradients_get_them():
    *features, weights = features_of("odd", "cpu", torch.float32)
    weights = [weight.view(1, -1, 1, 1).requires_grad_() for weight in weights]  # as lpips has them
    ops.lpips_distance(*features, weights).sum().backward()
    assert all(weight.grad.any() for weight in weights)


def test_an_empty_batch_gives_no_distance():
    x = torch.rand(0, 3, 4, 4, requires_grad=True)
    distance = ops.lpips_distance([x], [x], [torch.rand(3)])
    assert distance.shape == (0, 1, 1, 1)
    distance.sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize(
    ("shapes", "told"),
    [
        (([(2, 3, 4, 4)], [], [(3,)]), "as many layers"),
        (([(2, 3, 4, 4)], [(2, 3, 4, 5)], [(3,)]), r"got \[2, 3, 4, 4\], \[2, 3, 4, 5\] and \[3\]"),
        (([(2, 3, 4, 4)], [(2, 3, 4, 4)], [(4,)]), "weights"),
        (([(2, 3, 4, 4)], [(3, 3, 4, 4)], [(3,)]), r"\[N or 1, C, H, W\]"),
        (([(2, 3, 4, 4), (1, 3, 4, 4)], [(2, 3, 4, 4), (2, 3, 4, 4)], [(3,), (3,)]), r"\[N or 1, C, H, W\]"),
        (([(3, 4, 4)], [(3, 4, 4)], [(4,)]), r"\[N or 1, C, H, W\]"),
    ],
    ids=["layers", "sizes", "weights", "batches", "batches-of-layers", "dimensions"],
)
def test_refuses_what_does_not_fit(shapes, told):
    with pytest.raises(ValueError, match=told):
        ops.lpips_distance(*([torch.rand(shape) for shape in side] for side in shapes))


def test_refuses_other_dtypes():
    x, weights = torch.rand(1, 3, 4, 4), [torch.rand(3)]
    for a, b in ((x, x.half()), (x.long(), x.long())):
        with pytest.raises(ValueError, match="of one dtype"):
            ops.lpips_distance([a], [b], weights)
