"""Who runs an operation, and what happens when the one asked for cannot."""

from __future__ import annotations

import pytest
import torch

from fastperc import _native, backends, ops, use_backend


def test_the_first_without_an_obstacle_is_chosen():
    assert backends.choose("op", native=None, triton=None) == "native"
    assert backends.choose("op", native="too small", triton=None) == "triton"
    assert backends.choose("op", native="too small") == "reference"


def test_a_forced_backend_serves_or_says_why_not():
    with use_backend("reference"):
        assert backends.choose("op", native=None) == "reference"
    with use_backend("native"):
        assert backends.choose("op", native=None, triton=None) == "native"
        with pytest.raises(RuntimeError, match="op cannot run on the native backend: too small"):
            backends.choose("op", native="too small", triton=None)
    with use_backend("triton"), pytest.raises(backends.CannotServe, match="tv_loss cannot run on the triton backend"):
        ops.tv_loss(torch.rand(1, 3, 8, 8))


def test_the_choice_ends_with_the_block_even_after_an_error():
    with pytest.raises(ZeroDivisionError), use_backend("reference"):
        raise ZeroDivisionError
    assert backends.choose("op", native=None) == "native"


def test_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="'cuda'"), use_backend("cuda"):
        pass


def test_native_kernels_are_built_and_used_here():
    assert _native.unsupported(torch.rand(1, 3, 8, 8)) is None
    assert "meta" in str(_native.unsupported(torch.empty(1, 3, 8, 8, device="meta")))


def test_an_unsupported_dtype_falls_back():
    x = torch.rand(1, 3, 8, 8).to(torch.float8_e4m3fn)
    assert "float8" in str(_native.unsupported(x))


def test_triton_serves_gpu_tensors_of_its_dtypes(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backends, "_has_triton", True)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(1, device="cuda")
        assert backends.triton_unsupported(x) is None or torch.version.hip
        assert "float64" in str(backends.triton_unsupported(x.double()))
    assert "cpu" in str(backends.triton_unsupported(torch.rand(1)))
    with use_backend("triton"):
        assert "cpu" in str(backends.triton_unsupported(torch.rand(1)))
    monkeypatch.setattr(backends, "_has_triton", False)
    assert "not installed" in str(backends.triton_unsupported(x))


def test_the_interpreter_serves_only_where_triton_is_asked_for(monkeypatch):
    monkeypatch.setattr(backends, "_has_triton", True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "interpreted" in str(backends.triton_unsupported(torch.rand(1)))
    with use_backend("triton"):
        assert backends.triton_unsupported(torch.rand(1)) is None
        assert "float64" in str(backends.triton_unsupported(torch.rand(1).double()))
    with use_backend("native"):
        assert "interpreted" in str(backends.triton_unsupported(torch.rand(1)))


@pytest.mark.parametrize(
    ("capability", "why_not"),
    [((8, 0), None), ((9, 0), None), ((10, 0), None), ((8, 6), "sm_80, and this is sm_86"), ((12, 0), "sm_120")],
    ids=str,
)
def test_a_gpu_with_little_shared_memory_gets_no_triton_kernel(monkeypatch, capability, why_not):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    told = backends._gpu_unsupported.__wrapped__(torch.device("cuda"))
    assert told is None if why_not is None else why_not in told
