"""The benchmarks' parts: costs, memory, harness and providers. Nothing is timed here."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from measured import BENCHMARKS
from torch import nn

from fastperc import ConvBNReLU, ResidualBlock, SubpixelConvBNReLU, TransformNet

# isort: split
import ceilings
import comparison
import costs
import harness
import networks
import operations
import providers
import rows
import stages
from memory import peak_bytes

MiB = 2**20


class TestCosts:
    def test_convolution_forward_and_backward(self):
        x = torch.rand(2, 8, 10, 12, requires_grad=True)
        weight = torch.rand(16, 8, 3, 3, requires_grad=True)
        forward, backward = costs.convolutions(lambda: F.conv2d(x, weight, padding=1).sum().backward())
        out = 2 * 16 * 10 * 12
        assert forward == costs.Cost(4 * (x.numel() + weight.numel() + out), 2 * out * 8 * 9)
        assert backward == costs.Cost(4 * (2 * x.numel() + 2 * weight.numel() + out), 2 * forward.flops)

    def test_frozen_weights_cost_no_gradient(self):
        x = torch.rand(2, 8, 10, 12, requires_grad=True)
        weight = torch.rand(16, 8, 3, 3)
        forward, backward = costs.convolutions(lambda: F.conv2d(x, weight, padding=1).sum().backward())
        assert backward == costs.Cost(forward.bytes, forward.flops)

    def test_half_stride_convolution_multiplies_no_zeros(self):
        x, weight = torch.rand(1, 8, 5, 6), torch.rand(8, 4, 3, 3)
        (cost,) = costs.convolutions(lambda: F.conv_transpose2d(x, weight, stride=2, padding=1, output_padding=1))
        assert cost.flops == 2 * 5 * 6 * weight.numel()

    def test_floor_is_the_slower_of_memory_and_arithmetic(self):
        assert costs.Cost(bytes=100, flops=30).floor(bandwidth=10, rate=10) == 10
        assert costs.Cost(bytes=100, flops=300).floor(bandwidth=10, rate=10) == 30


class TestMemory:
    def test_counts_what_is_held_at_once(self):
        def step():
            a = torch.empty(MiB)
            del a
            b = torch.empty(2 * MiB)
            c = torch.empty(MiB)
            del b, c

        assert peak_bytes(step) == pytest.approx(12 * MiB, rel=0.01)

    def test_counts_temporaries_within_an_operation_but_not_the_inputs(self):
        x = torch.rand(MiB)
        assert peak_bytes(lambda: x.double().sum()) == pytest.approx(8 * MiB, rel=0.01)
        assert peak_bytes(lambda: x.add_(1)) < MiB


def bench_cases(name, device, monkeypatch):
    """The cases of a bench file as they are on ``device``."""
    for module in ("networks", name):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setattr(harness, "DEVICE", device)
    monkeypatch.setattr(harness, "DTYPE", {"cpu": "fp32", "cuda": "bf16"}[device])
    module = __import__(name)
    monkeypatch.delitem(sys.modules, name)
    return module.CASES


BENCHES = sorted(path.stem for path in BENCHMARKS.glob("bench_*.py"))


def names(case):
    """The names of the providers that run ``case``."""
    return [parameters.values[1].name for parameters in harness.runs([case]).args[1]]


def check(case, name):
    """Runs the provider ``name`` on ``case`` and checks its results, without timing."""
    provider = next(provider for provider in providers.PROVIDERS if provider.name == name)
    harness.measure(SimpleNamespace(disabled=True, pedantic=lambda step: step()), case, provider, 0.1, None)


class FakeBenchmark:
    """Runs as pytest-benchmark's fixture does, and keeps the times."""

    disabled = False

    def __init__(self):
        self.extra_info = {}

    def pedantic(self, step, setup, rounds, warmup_rounds):
        for _ in range(warmup_rounds):
            step()
        times = [harness.seconds_of(step) for _ in range(rounds)]
        stats = SimpleNamespace(median=statistics.median(times), iqr=0.0, rounds=rounds)
        self.stats = SimpleNamespace(stats=stats)


def identity_case(fused):
    """A case of no work, computed by ``fused``."""
    return harness.Case(
        "tv_loss",
        "inference",
        "8",
        "fp32",
        module=nn.Identity,
        inputs=lambda: (torch.rand(8),),
        reference=networks.forward,
        fused=fused,
        tolerance=(1e-6, 0),
    )


class TestHarness:
    @pytest.mark.parametrize("device", ["cpu", "cuda"])
    @pytest.mark.parametrize("name", BENCHES)
    def test_cases_have_ids_of_their_own(self, name, device, monkeypatch):
        cases = bench_cases(name, device, monkeypatch)
        ids = [case.id for case in cases]
        assert ids and len(set(ids)) == len(ids)
        for case in cases:
            assert case.operation == name.removeprefix("bench_") and case.operation in operations.names()
            assert case.dtype in harness.DTYPES and (case.infers or case.tolerance[1] > 0)

    def test_no_provider_runs_a_case_twice(self, monkeypatch):
        for name in BENCHES:
            for case in bench_cases(name, "cpu", monkeypatch):
                runs = names(case)
                assert len(set(runs)) == len(runs)
                assert (case.fused is None) == (not set(runs) & set(rows.FUSED))

    def test_peers_that_freeze_weights_run_inference_alone(self, monkeypatch):
        monkeypatch.setattr(providers, "find_spec", lambda name: None)
        layer, training = bench_cases("bench_conv_bn_relu", "cpu", monkeypatch)
        assert names(layer) == ["reference", "fused", "folded", "compile", "compile-freezing"]
        assert names(training) == ["reference", "compile"]

    def test_libraries_run_whole_networks_where_they_are_installed(self, monkeypatch):
        network = bench_cases("bench_inference", "cpu", monkeypatch)[0]
        libraries = {"onnxruntime", "openvino"}
        for found in (None, "found"):
            monkeypatch.setattr(providers, "find_spec", lambda name, found=found: found)
            assert libraries & set(names(network)) == (libraries if found else set())

    def test_every_provider_has_a_title_in_the_report(self):
        assert {provider.name for provider in providers.PROVIDERS} == set(comparison.PROVIDER_TITLES)

    def test_every_bench_is_a_stage_of_the_lab(self):
        assert {f"bench_{stage.name}" for stage in stages.STAGES} >= set(BENCHES)

    def test_tiny_runs_the_smallest_case_of_each_file(self):
        command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "--tiny", "-k", "reference or fused"]
        files = [str(BENCHMARKS / f"bench_{name}.py") for name in ("inference", "tv_loss")]
        listed = subprocess.run([*command, *files], capture_output=True, text=True, cwd=BENCHMARKS.parent).stdout
        tests = [line.rpartition("/")[2] for line in listed.splitlines() if "::" in line]
        assert len(tests) == 4 and len({test.rpartition("-")[0] for test in tests}) == 2

    def test_errors(self):
        exact = harness.Oracle(torch.tensor([3.0, 4.0]), [torch.tensor([10.0]), torch.tensor([1e-12])], [])
        output, gradient = harness.errors(torch.tensor([3.0, 4.5]), [torch.tensor([11.0]), torch.tensor([0.5])], exact)
        assert (output, gradient) == (pytest.approx(0.1), pytest.approx(0.1))
        nan = torch.tensor([float("nan")])
        assert harness.errors(exact.output, [exact.gradients[0], nan], exact)[1] == float("inf")

    def test_a_wrong_provider_is_not_timed(self):
        case = harness.Case(
            "tv_loss",
            "forward+backward",
            "8",
            "fp32",
            inputs=lambda: (torch.rand(8, requires_grad=True),),
            reference=lambda x: x.square().sum(),
            fused=lambda x: x.detach().square().sum() + (2.02 * x.detach() * (x - x.detach())).sum(),
            tolerance=(1e-6, 1e-6),
        )
        with pytest.raises(AssertionError, match=r"fused: gradient off by 1\.0e-02"):
            check(case, "fused")

    def test_another_library_that_is_wrong_is_skipped(self):
        case = harness.Case(
            "tv_loss",
            "inference",
            "8",
            "fp32",
            module=nn.Identity,
            inputs=lambda: (torch.rand(8),),
            reference=lambda module, x: x.square().sum() * (1 if x.dtype == torch.float64 else 2),
            tolerance=(1e-6, 1e-6),
        )
        with pytest.raises(pytest.skip.Exception, match=r"folded: output off by 1\.0e\+00"):
            check(case, "folded")
        with pytest.raises(AssertionError, match="reference: output off by"):
            check(case, "reference")

    @pytest.mark.parametrize("provider", ["reference", "folded", "fused"])
    def test_video(self, provider):
        from bench_inference import video

        case = video("great_wave", 24, 32, "fp32", frames=3)
        check(replace(case, tolerance=(1e-3, 0)), provider)  # rounding switches some levels

    def test_the_row_of_a_video_is_per_frame(self, monkeypatch):
        monkeypatch.setattr(harness, "rate", lambda dtype: 1e12)
        monkeypatch.setattr(harness, "bandwidth", lambda: 1e12)
        from bench_inference import video

        provider, stats = providers.PROVIDERS[0], SimpleNamespace(median=6.0, iqr=0.6, rounds=5)
        case = video("paper", 24, 32, "fp32", frames=60)
        measurement = harness.Measurement(case, provider, [costs.Cost(1e9, 1e9)], 0.0, None, timed_once=False)
        made = harness.make_row(measurement, stats)
        assert (made["median_ms"], made["iqr_ms"], made["gb_per_s"]) == (100, 10, 10)

    @pytest.mark.parametrize(("slower", "timed_once"), [(2, False), (30, True)], ids=["slow", "cliff"])
    def test_a_peer_beyond_the_cliff_is_timed_once(self, slower, timed_once, tmp_path, monkeypatch):
        """The peer stands still in each call; fastperc and eager PyTorch take 10 ms."""
        monkeypatch.setattr(harness, "rate", lambda dtype: 1e12)
        monkeypatch.setattr(harness, "bandwidth", lambda: 1e12)
        monkeypatch.setattr(harness, "PATIENCE", 0.2)
        monkeypatch.setattr(harness, "_fastest", {})
        calls = []

        def sleeping(factor):
            def wrap(step):
                def run():
                    calls.append(factor)
                    time.sleep(0.01 * factor)
                    step()

                return run

            return wrap

        case = identity_case(networks.forward)
        for provider in (
            providers.Provider("reference", False, wrap_step=sleeping(1)),
            providers.Provider("fused", True, wrap_step=sleeping(1)),
            providers.Provider("compile", False, wrap_step=sleeping(slower)),
        ):
            harness.measure(FakeBenchmark(), case, provider, 0.1, tmp_path / "rows.jsonl")
        reference, fused, peer = rows.read(tmp_path / "rows.jsonl")
        assert not reference["timed_once"] and not fused["timed_once"] and fused["rounds"] >= 5
        assert peer["timed_once"] == timed_once and (peer["rounds"] == 1) == timed_once
        assert (calls.count(slower) <= 3) == timed_once and peer["median_ms"] > 10 * slower

    def test_a_library_that_fails_is_skipped_and_fastperc_is_not(self):
        def fail(*inputs):
            raise RuntimeError("first line\nno such primitive")

        case = identity_case(fail)
        benchmark = SimpleNamespace(disabled=True, pedantic=lambda step: step())
        with pytest.raises(RuntimeError, match="no such primitive"):
            harness.measure(benchmark, case, providers.Provider("fused", True), 0.1, None)
        for peer in (
            providers.Provider("openvino", False, prepare=fail),
            providers.Provider("openvino", False, wrap_call=lambda call: fail),
        ):
            with pytest.raises(pytest.skip.Exception, match="openvino cannot run this case here: no such primitive"):
                harness.measure(benchmark, case, peer, 0.1, None)

    def test_a_provider_that_cannot_run_a_case_is_skipped(self):
        case = harness.Case(
            "inference",
            "inference",
            "8",
            "fp32",
            module=lambda: nn.Linear(8, 8),
            inputs=lambda: (torch.rand(8),),
            reference=networks.forward,
            fused=networks.forward,
            freeze=lambda module, x: None,
            tolerance=(1e-5, 0),
        )
        with pytest.raises(pytest.skip.Exception, match="fused cannot run this case"):
            check(case, "fused")

    def test_ceilings(self):
        if ceilings.device_type() == "cpu":
            assert 1e8 < ceilings.bandwidth() < 1e13 and 1e8 < ceilings.rate(torch.float32) < 1e15


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return networks.trained(TransformNet("paper", width=4)).eval()


class TestPeers:
    """The other libraries' versions of a module compute the same."""

    x = torch.rand(1, 3, 20, 24)

    @staticmethod
    def difference(module, peer, *inputs):
        with torch.inference_mode():
            expected = module(*inputs).double()
            return ((peer(*inputs) - expected).norm() / expected.norm()).item()

    def test_trained_norms_would_show_a_wrong_folding(self, net):
        for norm in (module for module in net.modules() if isinstance(module, nn.BatchNorm2d)):
            assert norm.running_mean.abs().max() > 1e-2 and norm.bias.abs().max() > 1e-2
        with torch.no_grad():
            assert net(self.x).std() > 0.05

    def test_folded(self, net):
        folded = providers.folded(net, self.x)
        assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
        assert any(isinstance(module, nn.BatchNorm2d) for module in net.modules())
        assert self.difference(net, folded, self.x) < 1e-6

    @pytest.mark.parametrize("library", ["onnxruntime", "openvino"])
    def test_libraries(self, net, library):
        for needed in ("onnx", "onnxscript", library):
            pytest.importorskip(needed)
        assert self.difference(net, getattr(providers, library)(net, self.x), self.x) < 1e-5

    def test_onnxruntime_has_no_bfloat16(self, net):
        assert providers.onnxruntime(net, self.x.bfloat16()) is None

    @pytest.mark.slow
    def test_freezing_takes_the_weights_as_constants(self):
        from torch._inductor.utils import run_and_get_code

        case = harness.Case(
            "conv_bn_relu",
            "inference",
            "1x4x5x5",
            "fp32",
            module=lambda: networks.trained(ConvBNReLU(4, 8, 3, padding=1)),
            inputs=lambda: (torch.rand(1, 4, 5, 5),),
            reference=networks.forward,
            tolerance=(1e-5, 0),
            channels_last=True,
        )
        for name, constant in (("compile", False), ("compile-freezing", True)):
            _, code = run_and_get_code(lambda name=name: check(case, name))
            assert ("_frozen_param" in "".join(code)) == constant

    def test_cudnns_fused_convolutions(self, net, monkeypatch):
        """cuDNN's calls are replaced by two plain calls each, so that this runs without a GPU."""

        def conv_relu(x, weight, bias, *geometry):
            return F.conv2d(x, weight, bias, *geometry).relu()

        def conv_add_relu(x, weight, z, alpha, bias, *geometry):
            return (F.conv2d(x, weight, bias, *geometry) + alpha * z).relu()

        monkeypatch.setattr(torch, "cudnn_convolution_relu", conv_relu)
        monkeypatch.setattr(torch, "cudnn_convolution_add_relu", conv_add_relu)
        assert self.difference(net, providers.cudnn_fused(net, self.x), self.x) < 1e-6
        block = networks.trained(ResidualBlock(4, residual="he")).eval()
        x = networks.features(2, 4, 9, 7)
        assert self.difference(block, providers.cudnn_fused(block, x), x) < 1e-6
        assert providers.cudnn_fused(ResidualBlock(4, norm="instance").eval(), x) is None
        assert providers.cudnn_fused(ResidualBlock(4, padding=0).eval(), x) is None

    @pytest.mark.parametrize(
        ("make", "x"),
        [
            (lambda: ConvBNReLU(3, 8, 9, padding=4), networks.image(2, 12, 10)),
            (lambda: networks.FromLevels(ConvBNReLU(3, 8, 9, padding=4)), networks.levels(2, 12, 10)),
            (lambda: ConvBNReLU(4, 8, 3, stride=2, padding=1), networks.features(1, 4, 12, 10)),
            (lambda: ResidualBlock(4), networks.features(2, 4, 9, 7)),
            (lambda: SubpixelConvBNReLU(8, 4), networks.features(1, 8, 5, 6)),
            (lambda: nn.Conv2d(8, 3, 9, padding=4), networks.features(2, 8, 12, 10)),
            (lambda: networks.ToLevels(nn.Conv2d(8, 3, 9, padding=4)), networks.features(2, 8, 12, 10)),
        ],
        ids=["stem", "stem-levels", "conv", "block", "subpixel", "head", "head-levels"],
    )
    def test_a_layer_as_the_engine_runs_it(self, make, x):
        module = networks.trained(make()).eval()
        frozen = networks.frozen(module, x)
        levels = isinstance(module, networks.ToLevels)
        assert self.difference(module, frozen, x) < (1e-3 if levels else 1e-6)
        with torch.inference_mode():
            assert (frozen(x).dtype == torch.uint8) == levels
