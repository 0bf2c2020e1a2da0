"""Total variation against its formula in float64: the reference, the native kernel, the operator and the module."""

from __future__ import annotations

import copy
import pickle
import threading
from importlib.util import find_spec

import pytest
import torch
from cases import DEVICES, DTYPES, GPU, GRAD_ERROR, LAYOUTS, LOSS_ERROR, NORMS, SHAPES, dtype_id, error, shape_id
from oracle import tv_loss as by_formula

from fastperc import TVLoss, _native, ops, reference, use_backend


@pytest.fixture(params=DEVICES)
def device(request):
    """Where the native kernel runs: the CPU, and a GPU if there is one that it was built for."""
    if obstacle := _native.why_not(torch.empty(0, device=request.param)):
        pytest.skip(obstacle)
    return request.param


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_matches_formula(device, shape, dtype, norm, backend):
    x = torch.rand(shape).to(device, dtype).requires_grad_()
    with use_backend(backend):
        loss = ops.tv_loss(x, norm)
    (3 * loss).backward()
    expected, grad = by_formula(x, norm)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert error(loss, expected) <= LOSS_ERROR[dtype]
    assert x.grad.dtype == dtype
    assert error(x.grad, 3 * grad) <= GRAD_ERROR[dtype]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_memory_layout(device, layout, norm):
    x = LAYOUTS[layout](torch.rand(2, 3, 9, 21, device=device)).detach().requires_grad_()
    with use_backend("native"):
        loss = ops.tv_loss(x, norm)
    loss.backward()
    expected, grad = by_formula(x, norm)
    assert error(loss, expected) <= LOSS_ERROR[torch.float32]
    assert error(x.grad, grad) <= GRAD_ERROR[torch.float32]


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=dtype_id)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_on_triton(layout, dtype, norm):
    """The same bits in each run; a gradient of any size; and one that can be differentiated again."""
    x = LAYOUTS[layout](torch.rand(2, 3, 9, 67).to(DEVICES[-1], dtype)).detach().requires_grad_()
    results = []
    with use_backend("triton"):
        for _ in range(2):
            loss = ops.tv_loss(x, norm)
            results.append((loss, *torch.autograd.grad(3 * loss, x)))
        (again,) = torch.autograd.grad(ops.tv_loss(x, norm), x, create_graph=True)
    (loss, gradient), repeated = results
    assert torch.equal(loss, repeated[0]) and torch.equal(gradient, repeated[1])
    expected, exact = by_formula(x, norm)
    assert loss.dtype == torch.float32 and error(loss, expected) <= LOSS_ERROR[dtype]
    assert gradient.dtype == dtype and error(gradient, 3 * exact) <= GRAD_ERROR[dtype]
    assert again.requires_grad and error(again, exact) <= GRAD_ERROR[dtype]


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 3, 1, 5), (2, 4, 7, 1)], ids=shape_id)
def test_rows_and_columns_on_triton(shape):
    x = torch.rand(shape, device=DEVICES[-1]).requires_grad_()
    with use_backend("triton"):
        loss = ops.tv_loss(x, reduction="mean")
    loss.backward()
    expected, grad = by_formula(x, "l2")
    assert error(loss, expected / x.numel()) <= LOSS_ERROR[torch.float32]
    assert error(x.grad, grad / x.numel()) <= GRAD_ERROR[torch.float32]


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_every_element_of_the_gradient_is_written(device, layout):
    x = LAYOUTS[layout](torch.rand(2, 3, 9, 67, device=device))
    grad = torch.full_like(x, float("nan"))
    loss = torch.full((), float("nan"), device=device)
    _native.tv_loss_fwd(x, grad, loss, "l2")
    assert grad.isfinite().all() and loss.isfinite()


@pytest.mark.parametrize("norm", NORMS)
def test_same_bits_on_any_number_of_threads(norm):
    x = torch.rand(3, 3, 300, 301)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 2, 1):
            torch.set_num_threads(threads)
            results.append(torch.ops.fastperc.tv_loss_fwd(x, norm, True))
    finally:
        torch.set_num_threads(before)
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(grad, results[0][1])


def test_same_bits_from_run_to_run(device):
    x = torch.rand(3, 3, 300, 301, device=device)
    results = [torch.ops.fastperc.tv_loss_fwd(x, "l2", True) for _ in range(3)]
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(grad, results[0][1])


@pytest.mark.skipif(not GPU, reason="streams are a GPU's")
def test_on_the_current_cuda_stream():
    x = torch.rand(4, 3, 1080, 1920, device="cuda")
    expected = torch.ops.fastperc.tv_loss_fwd(x, "l2", True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**8)  # what comes next on the stream waits, and so must the kernel
        twice = x * 2
        loss, grad = torch.ops.fastperc.tv_loss_fwd(twice, "l2", True)
    stream.synchronize()
    assert torch.equal(loss, 4 * expected[0]) and torch.equal(grad, 2 * expected[1])


def test_calls_from_several_threads_do_not_mix():
    images = [torch.rand(1, 3, 64, 64) * (i + 1) for i in range(6)]
    losses: dict[int, float] = {}
    threads = [
        threading.Thread(target=lambda i=i: losses.update({i: ops.tv_loss(images[i]).item()}))
        for i in range(len(images))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert losses == {i: ops.tv_loss(image).item() for i, image in enumerate(images)}


def test_error_is_no_worse_than_plain_pytorch(device):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = torch.rand(2, 3, 257, 311).to(device, dtype)
        fused, stock = x.clone().requires_grad_(), x.clone().requires_grad_()
        ops.tv_loss(fused).backward()
        reference.tv_loss(stock).backward()
        _, grad = by_formula(x, "l2")
        assert error(fused.grad, grad) <= 1.5 * error(stock.grad, grad) + 1e-8


def test_reductions():
    x = torch.rand(2, 3, 8, 9)
    assert torch.allclose(ops.tv_loss(x, reduction="mean"), ops.tv_loss(x) / x.numel())
    with use_backend("reference"):
        assert torch.allclose(ops.tv_loss(x, reduction="mean"), ops.tv_loss(x) / x.numel())


def test_module_is_the_weighted_operation():
    x = torch.rand(2, 3, 8, 9, requires_grad=True)
    module = TVLoss(weight=0.25, norm="l1", reduction="mean")
    module(x).backward()
    expected, grad = by_formula(x, "l1")
    assert error(module(x), 0.25 * expected / x.numel()) < 1e-6
    assert error(x.grad, 0.25 * grad / x.numel()) < 1e-6


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_backward_again_after_the_gradient_was_changed(weight):
    """The first backward hands out the gradient that came with the loss: a second must not find it changed."""
    x = torch.rand(1, 3, 16, 16, requires_grad=True)
    loss = weight * ops.tv_loss(x)
    grad = weight * by_formula(x, "l2")[1]
    loss.backward(retain_graph=True)
    x.grad.zero_()
    loss.backward(retain_graph=True)
    assert error(x.grad, grad) < 1e-6
    loss.backward()
    assert error(x.grad, 2 * grad) < 1e-6


def test_constant_image_has_no_variation_and_no_gradient():
    for norm in NORMS:
        x = torch.full((1, 3, 8, 8), 0.3, requires_grad=True)
        loss = ops.tv_loss(x, norm)
        loss.backward()
        assert loss.item() == 0 and not x.grad.any()


def test_half_precision_neither_overflows_nor_underflows(device):
    x = (torch.rand(1, 3, 256, 256, device=device) * 200).half().requires_grad_()
    loss = 1e-7 * ops.tv_loss(x)  # the sum itself is far beyond float16's 65,504
    (loss * 65536).backward()  # a GradScaler's factor
    expected, grad = by_formula(x, "l2")
    assert error(loss, 1e-7 * expected) < 1e-5
    assert error(x.grad, 1e-7 * 65536 * grad) < 2e-3


def test_not_finite_stays_visible(device):
    x = torch.rand(1, 3, 8, 8, device=device)
    x[0, 1, 4, 4] = float("nan")
    assert ops.tv_loss(x).isnan()


def test_stays_float32_under_autocast(device):
    x = torch.rand(1, 3, 16, 16, device=device, requires_grad=True)
    with torch.autocast(device, torch.bfloat16):
        loss = ops.tv_loss(x)
    assert loss.dtype == torch.float32
    assert error(loss, by_formula(x, "l2")[0]) < 1e-6


@pytest.mark.parametrize("norm", NORMS)
def test_gradcheck_once_and_twice(norm):
    x = torch.rand(2, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ops.tv_loss(x, norm), x)
    assert torch.autograd.gradgradcheck(lambda x: ops.tv_loss(x, norm), x)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("layout", ["nchw", "nhwc", "cropped"])
def test_operator_is_registered_right(device, layout, norm):
    x = LAYOUTS[layout](torch.rand(2, 3, 5, 6, device=device))
    torch.library.opcheck(torch.ops.fastperc.tv_loss_fwd, (x, norm, True))


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_compiles_without_a_graph_break(device, layout):
    torch.compiler.reset()
    module = TVLoss(weight=0.5)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for shape in ((2, 3, 8, 9), (1, 3, 12, 7)):
        x = LAYOUTS[layout](torch.rand(shape, device=device)).detach().requires_grad_()
        y = x.detach().clone().requires_grad_()
        compiled(x).backward()
        module(y).backward()
        assert torch.equal(x.grad, y.grad)


def test_exports():
    x = torch.rand(1, 3, 8, 8)
    exported = torch.export.export(TVLoss(), (x,)).module()
    assert torch.equal(exported(x), TVLoss()(x))


def test_copies_and_pickles():
    module = TVLoss(2.0, "l1", "mean")
    x = torch.rand(1, 3, 8, 8)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x), module(x))


@pytest.mark.parametrize(
    ("x", "kwargs", "told"),
    [
        (torch.rand(3, 8, 8), {}, r"\[N, C, H, W\].*\[3, 8, 8\]"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.int32), {}, "int32"),
        (torch.rand(1, 3, 8, 8), {"norm": "l3"}, "l3"),
        (torch.rand(1, 3, 8, 8), {"reduction": "none"}, "none"),
    ],
    ids=["3-dimensions", "integers", "norm", "reduction"],
)
def test_refuses(x, kwargs, told):
    with pytest.raises(ValueError, match=told):
        ops.tv_loss(x, **kwargs)


def test_matches_kornia():
    kornia = pytest.importorskip("kornia")
    x = torch.rand(2, 3, 17, 23)
    expected = kornia.losses.total_variation(x, reduction="sum").sum()  # one value an image, an L1 sum
    assert error(ops.tv_loss(x, "l1"), expected) < 1e-5
