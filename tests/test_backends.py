"""Who runs an operation, and what happens when the one asked for cannot."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastperc import _native, backends, ops, use_backend
from fastperc.backends import Implementation, Operation, use_implementation
from fastperc.kernels.configs import LARGEST, conv_tile, shared_memory


def operation(**reasons):
    """An operation "op": an implementation for each backend with the reason why it cannot serve, and plain PyTorch."""
    implementations = [
        Implementation(backend, lambda x, backend=backend: backend, lambda x, reason=reason: reason)
        for backend, reason in reasons.items()
    ]
    return Operation("op", "Op", (*implementations, Implementation("reference", lambda x: "reference")))


X = torch.empty(1, 3, 8, 8)


def test_the_first_that_can_serve_is_chosen():
    assert operation(native=None, triton=None)(X) == "native"
    assert operation(native="too small", triton=None)(X) == "triton"
    assert operation(native="too small")(X) == "reference"


def test_one_that_is_expected_to_be_slow_is_chosen_only_where_it_is_asked_for():
    slow = Implementation("native", lambda x: "slow", why_slow=lambda x: "few pixels", label="winograd")
    fast = Implementation("native", lambda x: "fast", label="library")
    plain = Implementation("reference", lambda x: "reference")
    assert Operation("op", "Op", (slow, fast, plain))(X) == "fast"
    assert Operation("op", "Op", (slow, plain))(X) == "reference"
    with use_backend("native"):
        assert Operation("op", "Op", (slow, fast, plain))(X) == "fast"
        assert Operation("op", "Op", (slow, plain))(X) == "slow"
    with backends.recorded() as choices:
        Operation("op", "Op", (slow, fast, plain))(X)
    assert choices == [("", "op", "native", "library: not winograd: few pixels", "library")]


def test_a_forced_backend_serves_or_says_why_not():
    with use_backend("reference"):
        assert operation(native=None)(X) == "reference"
    with use_backend("native"):
        assert operation(native=None, triton=None)(X) == "native"
        with pytest.raises(RuntimeError, match="op cannot run on the native backend: too small"):
            operation(native="too small", triton=None)(X)
    with use_backend("triton"), pytest.raises(backends.CannotServe, match="tv_loss cannot run on the triton backend"):
        ops.tv_loss(torch.rand(1, 3, 8, 8).double())


def test_what_is_made_of_other_operations_serves_every_backend_that_it_has_no_kernel_of():
    composed = Implementation(None, lambda x: "composed")
    triton = Implementation("triton", lambda x: "triton", lambda x: "no GPU")
    winograd = Implementation("native", lambda x: "winograd", lambda x: "no 9×9", label="winograd")
    for backend in ("native", "reference"):
        with use_backend(backend):
            assert Operation("op", "Op", (triton, composed))(X) == "composed"
    with use_backend("native"):  # a way for some shapes
        assert Operation("op", "Op", (winograd, composed))(X) == "composed"
    with (
        use_backend("triton"),
        pytest.raises(backends.CannotServe, match="op cannot run on the triton backend: no GPU"),
    ):
        Operation("op", "Op", (triton, composed))(X)


def test_one_implementation_can_be_asked_for_by_name():
    op = operation(native=None, triton="no GPU")
    with use_implementation("op", "reference"):
        assert op(X) == "reference"
        with use_implementation("op", "native"):
            assert op(X) == "native"
        assert op(X) == "reference"
    with use_implementation("another", "reference"):
        assert op(X) == "native"
    with use_implementation("op", "triton"), pytest.raises(backends.CannotServe, match="no GPU"):
        op(X)


def test_the_choice_ends_with_the_block_even_after_an_error():
    with pytest.raises(ZeroDivisionError), use_backend("reference"):
        raise ZeroDivisionError
    assert operation(native=None)(X) == "native"


@pytest.mark.parametrize("name", ops.OPERATIONS)
def test_every_operation_has_a_record_that_works(name):
    """Its last implementation serves every call, its sources exist, and its tuning cases are calls of it."""
    record = ops.OPERATIONS[name]
    assert record.name == name and record.title
    last = record.implementations[-1]
    assert last.backend in (None, "reference")
    root = Path(__file__).resolve().parent.parent
    assert all(any(root.glob(source)) for source in record.sources), record.sources
    (shapes, *_) = record.tuning_cases.shapes(1, 16)
    tensors = [torch.rand(shape).requires_grad_(not record.frozen) for shape in shapes]
    call = record.tuning_cases.call(*tensors)
    assert last.why_not(*call) is None
    assert [x.shape for x in record.measured_by(*call)] == [x.shape for x in tensors]
    record(*call)


def test_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="'cuda'"), use_backend("cuda"):
        pass


def test_native_kernels_are_built_and_used_here():
    assert _native.why_not(torch.rand(1, 3, 8, 8)) is None
    assert "meta" in str(_native.why_not(torch.empty(1, 3, 8, 8, device="meta")))


def test_an_unsupported_dtype_falls_back():
    x = torch.rand(1, 3, 8, 8).to(torch.float8_e4m3fn)
    assert "float8" in str(_native.why_not(x))


def test_triton_serves_gpu_tensors_of_its_dtypes(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backends, "_has_triton", True)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(1, device="cuda")
        assert backends.why_not_triton(x) is None or torch.version.hip
        assert "float64" in str(backends.why_not_triton(x.double()))
    assert "cpu" in str(backends.why_not_triton(torch.rand(1)))
    with use_backend("triton"):
        assert "cpu" in str(backends.why_not_triton(torch.rand(1)))
    monkeypatch.setattr(backends, "_has_triton", False)
    assert "not installed" in str(backends.why_not_triton(x))


def test_the_interpreter_serves_only_where_triton_is_asked_for(monkeypatch):
    monkeypatch.setattr(backends, "_has_triton", True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "interpreted" in str(backends.why_not_triton(torch.rand(1)))
    with use_backend("triton"):
        assert backends.why_not_triton(torch.rand(1)) is None
        assert "float64" in str(backends.why_not_triton(torch.rand(1).double()))
    with use_backend("native"):
        assert "interpreted" in str(backends.why_not_triton(torch.rand(1)))


@pytest.mark.parametrize(
    ("capability", "why_not"),
    [
        *[
            ((major, minor), None)
            for major, minor in ((8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0))
        ],
        *[((7, minor), f"sm_80 and newer GPUs; this is sm_7{minor}, which is left to cuDNN") for minor in (0, 5)],
    ],
    ids=str,
)
def test_gpus_with_the_tensor_cores_that_triton_compiles_for_get_its_kernels(monkeypatch, capability, why_not):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    reason = backends._why_not_gpu.__wrapped__(torch.device("cuda"))
    assert reason is None if why_not is None else why_not in reason


def test_the_limit_of_shared_memory_is_the_one_that_the_device_reports(monkeypatch):
    assert shared_memory(torch.device("cpu")) == LARGEST == 232448
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for limit in (101376, 166912, 232448):
        properties = SimpleNamespace(shared_memory_per_block_optin=limit)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, properties=properties: properties)
        assert shared_memory.__wrapped__(torch.device("cuda", 0)) == limit


def test_a_large_tile_is_for_gpus_with_much_shared_memory():
    """The tile that was measured on an H200, for a picture of 1080p and a small one; and the others, which fit."""
    assert conv_tile(2, 128, 128, 480 * 270, LARGEST) == (8, 16, 128, 64, 8, 3)
    assert conv_tile(2, 128, 128, 64 * 64, LARGEST) == (8, 8, 64, 64, 8, 4)
    for limit in (99 * 1024, 163 * 1024):
        for channels in (16, 32, 64, 128, 256):
            for pixels in (32 * 32, 480 * 270):
                tile = conv_tile(2, channels, channels, pixels, limit)
                step = 2 * tile.channels_in * (tile.height * tile.width + tile.channels_out)
                assert step * tile.num_stages <= limit
