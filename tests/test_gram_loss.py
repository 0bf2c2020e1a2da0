"""Gram matrices and the style loss against their formulas in float64."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from cases import DEVICES, GPU, RUNS, dtype_id, error, half_precision, no_worse

from fastperc import GramLoss, gram_matrix, ops, reference, use_backend

# Layers of one call: fewer channels than a block, several blocks, one pixel, more pixels than one program takes.
LAYERS = {
    "paper-like": [(2, 64, 9, 13), (2, 130, 4, 5)],
    "odd": [(2, 3, 5, 7), (2, 17, 1, 1), (2, 1, 3, 4)],
    "many-pixels": [(1, 5, 67, 31)],
}
LAYOUTS = {
    "nchw": lambda x: x.contiguous(),
    "nhwc": lambda x: x.contiguous(memory_format=torch.channels_last),
    "cropped": lambda x: torch.nn.functional.pad(x, (2, 3, 1, 2))[..., 1 : 1 + x.shape[2], 2 : 2 + x.shape[3]],
    "some-channels": lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]],
    "some-channels-nhwc": lambda x: torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last)[:, : x.shape[1]],
    "some-images": lambda x: torch.cat([x, x])[::2] if len(x) % 2 == 0 else x,
    "expanded": lambda x: x[:, :1].expand(x.shape),
}
CASES = [
    pytest.param(device, backend, dtype, id=f"{device}-{backend}-{dtype_id(dtype)}")
    for device, backend in RUNS
    for dtype in [*([torch.float64, torch.float32] if backend == "native" else []), *half_precision(backend)]
]


def features_and_targets(layers, device, dtype, layout="nhwc"):
    """Leaves that want gradients, as activations are: mostly positive; and targets, one of them a batch's."""
    xs = [LAYOUTS[layout]((torch.randn(shape) + 0.5).to(device, dtype)) for shape in LAYERS[layers]]
    targets = [torch.randn(len(x) if k else 1, x.shape[1], x.shape[1], device=device) for k, x in enumerate(xs)]
    return [x.detach().requires_grad_() for x in xs], targets


def losses_and_gradients(run, xs, targets, weights):
    xs = [x.detach().requires_grad_() for x in xs]
    losses = run(xs, targets)
    (losses * weights).sum().backward()
    return losses.detach(), [x.grad for x in xs]


def plain(xs, targets):
    return torch.stack([reference.gram_loss(x, target) for x, target in zip(xs, targets)])


def gram_by_formula(x: torch.Tensor) -> torch.Tensor:
    """Equation 3 pixel by pixel, in numpy."""
    x = x.detach().double().numpy()
    n, c, h, w = x.shape
    total = np.zeros((n, c, c))
    for i in range(h):
        for j in range(w):
            total += np.einsum("nc,nd->ncd", x[:, :, i, j], x[:, :, i, j])
    return torch.from_numpy(total / (c * h * w))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 1, 1, 1), (3, 17, 4, 1), (0, 3, 4, 4)], ids=str)
def test_gram_matrix_matches_the_formula(shape, dtype, memory_format):
    x = torch.randn(shape).to(dtype).contiguous(memory_format=memory_format)
    gram = gram_matrix(x)
    assert gram.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert error(gram, gram_by_formula(x)) < (1e-12 if dtype == torch.float64 else 1e-6)
    assert torch.equal(gram, gram_matrix(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_never_overflows(dtype):
    x = (10 * torch.randn(1, 4, 256, 256)).to(dtype).requires_grad_()  # ΣF² is 6.5 million, float16 ends at 65,504
    with torch.autocast("cpu", torch.bfloat16):
        gram = gram_matrix(x)
        loss = GramLoss()(x, torch.zeros(1, 4, 4))
    psi = x.detach().double().flatten(2)
    expected = psi @ psi.mT / psi[0].numel()
    loss.backward()
    assert gram.dtype == torch.float32 and error(gram, expected) < 1e-5
    assert error(loss, expected.square().sum()) < 1e-5
    assert x.grad.isfinite().all() and x.grad.any()


def test_loss_and_gradient_match_the_formula():
    x = torch.randn(2, 5, 6, 7, requires_grad=True)
    target = torch.randn(1, 5, 9, 4)  # another size: only channels must agree
    loss = GramLoss(weight=3.0)(x, target)
    loss.backward()

    x64 = x.detach().double()
    difference = gram_by_formula(x64) - gram_by_formula(target)
    expected = 3 * difference.square().sum(dim=(1, 2)).mean()
    # d‖G − A‖²/dψ = 4 (G − A) ψ / CHW, and the batch of two is averaged.
    grad = 3 / 2 * 4 * (difference @ x64.flatten(2)).view_as(x64) / x64[0].numel()
    assert error(loss, expected) < 1e-6
    assert error(x.grad, grad) < 1e-5


def test_target_may_be_a_gram_matrix():
    x, target = torch.randn(2, 5, 6, 7), torch.randn(1, 5, 6, 7)
    assert torch.equal(GramLoss()(x, target), GramLoss()(x, gram_matrix(target)))
    assert GramLoss()(x, gram_matrix(x)).item() < 1e-12


def test_gradcheck():
    x = torch.randn(2, 3, 3, 4, dtype=torch.float64, requires_grad=True)
    target = torch.randn(1, 3, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: GramLoss()(x, target), x)


@pytest.mark.parametrize(
    "shapes",
    [((2, 5, 6, 7), (2, 4, 6, 7)), ((2, 5, 6, 7), (3, 5, 5)), ((5, 6, 7), (1, 5, 5)), ((2, 5, 6, 7), (5, 5))],
    ids=str,
)
def test_loss_refuses_shapes_that_do_not_fit(shapes):
    with pytest.raises(ValueError, match=r"gram_loss needs .*got"):
        GramLoss()(*(torch.randn(shape) for shape in shapes))


@pytest.mark.parametrize("shape", [(3, 4, 4), (1, 3, 0, 4)], ids=str)
def test_gram_matrix_refuses_what_has_none(shape):
    with pytest.raises(ValueError, match=r"\[N, C, H, W\]"):
        gram_matrix(torch.rand(shape))


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize(("device", "backend", "dtype"), CASES)
def test_every_backend_is_as_exact_as_plain_pytorch(device, backend, dtype, layout, layers):
    xs, targets = features_and_targets(layers, device, dtype, layout)
    weights, channels_last = 1000 * torch.randn(len(xs), device=device), torch.channels_last
    with use_backend(backend):
        losses, grads = losses_and_gradients(ops.gram_loss, xs, targets, weights)
    stock_losses, stock_grads = losses_and_gradients(plain, xs, targets, weights)
    exact, exact_grads = losses_and_gradients(
        plain, [x.double() for x in xs], [target.double() for target in targets], weights
    )
    assert losses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for k in range(len(xs)):
        assert grads[k].dtype == dtype
        assert grads[k].is_contiguous() if layout == "nchw" else grads[k].is_contiguous(memory_format=channels_last)
        no_worse(losses[k], stock_losses[k], exact[k])
        no_worse(grads[k], stock_grads[k], exact_grads[k])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("device", "backend"), RUNS, ids=str)
def test_any_memory_layout(device, backend, layout):
    dtype = torch.float16
    xs, targets = features_and_targets("odd", device, dtype, layout)
    weights = torch.ones(len(xs), device=device)
    with use_backend(backend):
        losses, grads = losses_and_gradients(ops.gram_loss, xs, targets, weights)
    exact, exact_grads = losses_and_gradients(
        plain, [x.double() for x in xs], [target.double() for target in targets], weights
    )
    assert error(losses, exact) < 1e-6
    assert all(error(grad, expected) < 1e-3 for grad, expected in zip(grads, exact_grads))


@pytest.mark.parametrize(("device", "backend"), RUNS, ids=str)
def test_same_bits_every_time(device, backend):
    xs, targets = features_and_targets("odd", device, torch.float16)
    with use_backend(backend):
        runs = [losses_and_gradients(ops.gram_loss, xs, targets, torch.ones(3, device=device)) for _ in range(3)]
    for losses, grads in runs[1:]:
        assert torch.equal(losses, runs[0][0])
        assert all(torch.equal(a, b) for a, b in zip(grads, runs[0][1]))


def test_the_kernel_writes_every_element():
    from fastperc.kernels import gram_loss as kernels

    device = "cuda" if GPU else "cpu"
    xs, targets = features_and_targets("odd", device, torch.float16)
    xs = [x.detach() for x in xs]
    nan = float("nan")
    losses, scales = (torch.full((len(xs),), nan, device=device) for _ in range(2))
    halves = [x.new_full((len(x), 2, x.shape[1], x.shape[1]), nan) for x in xs]
    kernels.gram_loss_fwd(xs, targets, losses, scales, halves)
    grads = [torch.full_like(x, nan) for x in xs]
    kernels.gram_loss_bwd(xs, scales, halves, torch.ones(len(xs), device=device), grads)
    assert all(tensor.isfinite().all() for tensor in (losses, scales, *halves, *grads))


@pytest.mark.parametrize(("device", "backend"), RUNS, ids=str)
@pytest.mark.parametrize("value", [0.0, 0.3, 300.0])
def test_constant_features(device, backend, value):
    x = torch.full((1, 4, 40, 40), value, dtype=torch.float16, device=device, requires_grad=True)
    with use_backend(backend):
        loss = ops.gram_loss([x], [torch.zeros(1, 4, 4, device=device)]).sum()
    loss.backward()
    rounded = x[0, 0, 0, 0].double().item()
    assert error(loss, torch.tensor(16 * (rounded**2 / 4) ** 2)) < 4e-6  # equal terms round alike, all one way
    assert error(x.grad, torch.full_like(x, 4 / 6400 * 4 * rounded**2 / 4 * rounded)) < 1e-3


@pytest.mark.parametrize(("device", "backend", "dtype"), CASES)
def test_a_map_of_65536_pixels_neither_overflows_nor_loses_digits(device, backend, dtype):
    if backend == "triton" and not GPU:
        pytest.skip("a thousand steps of the interpreter")
    x = (10 * torch.randn(1, 16, 256, 256)).to(device, dtype).requires_grad_()  # mean square 100
    target = torch.zeros(1, 16, 16, device=device)
    with use_backend(backend):
        loss = ops.gram_loss([x], [target]).sum()
    (2.0**16 * loss).backward()  # a GradScaler's factor
    x64 = x.detach().double().requires_grad_()
    exact = reference.gram_loss(x64, target.double())
    (2.0**16 * exact).backward()
    assert error(loss, exact.detach()) < 1e-5
    assert x.grad.isfinite().all() and error(x.grad, x64.grad) < {2: 1e-2}.get(x.element_size(), 1e-5)


@pytest.mark.parametrize(("device", "backend"), RUNS, ids=str)
def test_differences_beyond_half_precision(device, backend):
    """G − A of 10⁶ and of 10⁻⁶ in one batch of layers: float16 holds neither."""
    xs = [torch.randn(1, 4, 8, 8, device=device).half().requires_grad_() for _ in range(2)]
    targets = [torch.full((1, 4, 4), 1e6, device=device), gram_matrix(xs[1]).detach() + 1e-6]
    weights = torch.tensor([1e-4, 1e6], device=device)
    with use_backend(backend):
        losses, grads = losses_and_gradients(ops.gram_loss, xs, targets, weights)
    exact, exact_grads = losses_and_gradients(
        plain, [x.double() for x in xs], [target.double() for target in targets], weights
    )
    assert error(losses[0], exact[0]) < 1e-6 and error(losses[1], exact[1]) < 0.1  # a difference of rounded numbers
    assert error(grads[0], exact_grads[0]) < 1e-3 and error(grads[1], exact_grads[1]) < 0.1


@pytest.mark.parametrize(("device", "backend"), RUNS, ids=str)
def test_a_target_need_not_be_symmetric(device, backend):
    x = torch.randn(2, 20, 3, 5, device=device).half().requires_grad_()
    target = torch.randn(2, 20, 20, device=device)
    weights = torch.ones(1, device=device)
    with use_backend(backend):
        losses, grads = losses_and_gradients(ops.gram_loss, [x], [target], weights)
    exact, exact_grads = losses_and_gradients(plain, [x.double()], [target.double()], weights)
    assert error(losses, exact) < 1e-6 and error(grads[0], exact_grads[0]) < 1e-3


@pytest.mark.parametrize(("device", "backend"), RUNS, ids=str)
def test_not_finite_stays_visible(device, backend):
    x = torch.rand(1, 4, 8, 8, device=device).half()
    x[0, 1, 2, 3] = float("nan")
    x.requires_grad_()
    with use_backend(backend):
        loss = ops.gram_loss([x], [torch.zeros(1, 4, 4, device=device)]).sum()
    loss.backward()
    assert loss.isnan() and x.grad.isnan().any()


@pytest.mark.parametrize("device", DEVICES)
def test_under_autocast(device):
    x, target = torch.randn(2, 5, 6, 7, device=device), torch.randn(1, 5, 5, device=device)
    with torch.autocast(device, torch.bfloat16):
        loss = ops.gram_loss([x], [target])
    assert loss.dtype == torch.float32 and torch.equal(loss, ops.gram_loss([x], [target]))


@pytest.mark.parametrize(("device", "backend"), RUNS, ids=str)
def test_operators_are_registered_right(device, backend):
    xs = [torch.rand(2, 3, 4, 5, device=device).half(), torch.rand(2, 4, 2, 2, device=device).half()]
    targets = [torch.rand(1, 3, 3, device=device), torch.rand(2, 4, 4, device=device)]
    # Tracing with made-up tensors works on a GPU alone for Triton: the interpreter wants real ones.
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.fastperc.gram_loss_fwd, (xs, targets, backend), test_utils=tests)
    _, scales, *deltas = torch.ops.fastperc.gram_loss_fwd(xs, targets, backend)
    arguments = (xs, scales, deltas, torch.rand(2, device=device), backend)
    torch.library.opcheck(torch.ops.fastperc.gram_loss_bwd, arguments, test_utils=tests)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_without_a_graph_break(device, dynamic):
    torch.compiler.reset()
    compiled = torch.compile(ops.gram_loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for size in (6, 9):
        xs = [torch.randn(shape, device=device) for shape in ((2, 5, size, 7), (2, 3, 4, size))]
        if device == "cuda":
            xs = [x.bfloat16() for x in xs]  # what the Triton kernel takes
        targets, weights = (
            [torch.eye(5, device=device)[None], torch.eye(3, device=device)[None]],
            torch.ones(2, device=device),
        )
        losses, grads = losses_and_gradients(ops.gram_loss, xs, targets, weights)
        again, grads_again = losses_and_gradients(compiled, xs, targets, weights)
        assert torch.equal(losses, again)
        assert all(error(a, b) < 1e-6 for a, b in zip(grads_again, grads))


def test_gradcheck_twice():
    x = torch.randn(2, 3, 3, 4, dtype=torch.float64, requires_grad=True)
    target = torch.randn(1, 3, 3, dtype=torch.float64)
    with use_backend("native"):
        assert torch.autograd.gradcheck(lambda x: ops.gram_loss([x, x * x], [target, target]), x)
        assert torch.autograd.gradgradcheck(lambda x: ops.gram_loss([x, x * x], [target, target]), x)


def test_a_target_that_wants_a_gradient_gets_one():
    x, target = torch.randn(2, 3, 4, 5), torch.randn(1, 3, 3, requires_grad=True)
    ops.gram_loss([x], [target]).sum().backward()
    assert error(target.grad, -2 * (gram_matrix(x) - target.detach()).mean(dim=0, keepdim=True)) < 1e-5


@pytest.mark.skipif(not GPU, reason="streams are a GPU's")
def test_on_the_current_cuda_stream():
    xs, targets = features_and_targets("paper-like", "cuda", torch.bfloat16)
    expected = ops.gram_loss(xs, targets)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        losses = ops.gram_loss(xs, targets)
    stream.synchronize()
    assert torch.equal(losses, expected)


def test_an_empty_batch_is_as_in_plain_pytorch():
    assert ops.gram_loss([torch.rand(0, 3, 4, 4)], [torch.rand(1, 3, 3)]).isnan().all()


def test_copies_and_pickles():
    module, x, target = GramLoss(2.0), torch.randn(1, 3, 4, 4), torch.randn(1, 3, 4, 4)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x, target), module(x, target))


@pytest.mark.parametrize(
    ("features", "targets", "told"),
    [
        ([], [], "a target for each layer"),
        ([torch.rand(1, 3, 4, 4)], [], "a target for each layer, got 1 and 0"),
        ([torch.rand(1, 3, 4, 4), torch.rand(2, 3, 4, 4)], [torch.rand(1, 3, 3)] * 2, "one dtype, device and batch"),
        ([torch.rand(1, 3, 4, 4), torch.rand(1, 3, 4, 4).half()], [torch.rand(1, 3, 3)] * 2, "float16"),
    ],
    ids=["nothing", "no-target", "batches", "dtypes"],
)
def test_refuses_layers_that_do_not_fit(features, targets, told):
    with pytest.raises(ValueError, match=told):
        ops.gram_loss(features, targets)


def test_layers_made_of_each_other_in_a_gradient_that_is_differentiated_again():
    x = torch.randn(1, 8, 12, 12, dtype=torch.float64, requires_grad=True)
    targets = [torch.zeros(1, 8, 8, dtype=torch.float64)] * 2

    def gradient(create_graph):
        first = x * 1
        losses = ops.gram_loss([first, 3 * first.tanh()], targets)
        return torch.autograd.grad(losses.sum(), x, create_graph=create_graph)[0]

    assert error(gradient(True), gradient(False)) < 1e-12
