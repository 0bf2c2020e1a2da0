"""What the benchmarks rest on: rows, their merging and rendering, costs, memory, and the lab. Nothing is timed here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import ceilings  # noqa: E402
import costs  # noqa: E402
import harness  # noqa: E402
import lab  # noqa: E402
import providers  # noqa: E402
import report  # noqa: E402
import rows  # noqa: E402
from memory import peak_bytes  # noqa: E402

MiB = 2**20


def row(**changes):
    """A row of the fused total variation on a GPU that no one has, as today's kernel would have it."""
    plain = dict.fromkeys(rows.FIELDS, 1.0) | dict(
        operation="tv_loss",
        direction="forward+backward",
        shape="4x3x256x256",
        dtype="bf16",
        provider="fused",
        device="Imaginary G1",
        date="2026-01-02T03:04:05Z",
        commit="abcdef0",
        source=rows.source_hash("tv_loss"),
        torch="2.11.0",
        triton="3.6.0",
        cuda="13.0",
        median_ms=0.5,
        rounds=100,
        peak_bytes=None,
    )
    return plain | changes


@pytest.fixture
def results(tmp_path, monkeypatch):
    """An empty folder of results, and a README, in the place of the repository's."""
    folder, readme = tmp_path / "results", tmp_path / "README.md"
    folder.mkdir()
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    for module in (rows, report):
        monkeypatch.setattr(module, "RESULTS", folder)
        monkeypatch.setattr(module, "ROOT", tmp_path) if module is report else None
    monkeypatch.setattr(report, "README", readme)
    return folder


class TestRows:
    def test_every_result_in_the_repository_is_a_row_in_its_own_file(self):
        for path in rows.RESULTS.glob("*.json"):
            for measured in rows.read(path):
                assert rows.results_file(measured["device"], measured["cuda"]).name == path.name

    @pytest.mark.parametrize(
        ("changes", "told"),
        [({"median_ms": None}, "median_ms"), ({"median_ms": 0.0}, "median_ms"), ({"speed": 3}, "speed")],
        ids=["empty", "zero", "unknown"],
    )
    def test_refuses(self, changes, told):
        with pytest.raises(ValueError, match=told):
            rows.check(row(**changes))

    def test_refuses_a_missing_field(self):
        with pytest.raises(ValueError, match="device"):
            rows.check({key: value for key, value in row().items() if key != "device"})

    def test_newer_replaces_older_and_others_stay(self):
        old, other = row(median_ms=2.0), row(provider="reference", median_ms=9.0)
        new = row(median_ms=1.0, date="2026-02-02T00:00:00Z")
        for batches in ([[old, other], [new]], [[new], [old, other]]):
            merged = rows.merge(*batches)
            assert {(r["provider"], r["median_ms"]) for r in merged} == {("fused", 1.0), ("reference", 9.0)}

    def test_another_device_is_another_row(self):
        assert len(rows.merge([row()], [row(device="Imaginary G2")])) == 2

    def test_survive_a_run_that_was_killed(self, tmp_path):
        path = tmp_path / "rows.jsonl"
        rows.append(path, row())
        rows.append(path, row(provider="reference"))
        with path.open("a") as file:
            file.write(json.dumps(row(provider="compile"))[:70])
        assert [r["provider"] for r in rows.read(path)] == ["fused", "reference"]

    def test_written_and_read_again(self, tmp_path):
        path = tmp_path / "device.json"
        rows.write(path, [row(), row(provider="reference")])
        assert rows.read(path) == [row(), row(provider="reference")]
        rows.write(path, [])
        assert rows.read(path) == []

    def test_read_from_pytest_benchmark(self, tmp_path):
        path = tmp_path / "pytest.json"
        path.write_text(json.dumps({"benchmarks": [{"extra_info": row()}, {"extra_info": {}}]}))
        assert rows.read(path) == [row()]

    def test_source_follows_the_kernels_files(self, tmp_path, monkeypatch):
        monkeypatch.setattr(rows, "ROOT", tmp_path)
        kernel, other = tmp_path / "csrc/tv_loss.cu", tmp_path / "kernels/gram_loss.py"
        for path in (kernel, other):
            path.parent.mkdir(parents=True)
            path.write_text("a")

        def hashes():
            rows.source_hash.cache_clear()
            return [rows.source_hash(operation) for operation in ("tv_loss", "gram_loss", "training", "no_such")]

        before = hashes()
        kernel.write_text("b")
        after = hashes()
        rows.source_hash.cache_clear()
        assert [b == a for b, a in zip(before, after)] == [False, True, False, True]
        assert before[3] is None


class TestReport:
    def test_a_current_row_is_shown(self, results):
        rows.write(results / "imaginary-g1.json", [row(), row(provider="reference", median_ms=4.0)])
        text = report.render()
        assert "**0.500**" in text and "8.0×" in text and "not measured" not in text

    def test_a_changed_kernel_is_not_measured(self, results):
        rows.write(results / "imaginary-g1.json", [row(source="0123"), row(provider="reference", median_ms=4.0)])
        text = report.render()
        assert report.NOT_MEASURED in text and "4.00" in text
        assert "0.500" not in text and "8.0×" not in text and "speedup" not in text

    def test_a_peer_stays_when_the_kernel_changes(self):
        assert rows.is_current(row(provider="compile", source="0123"))

    def test_without_a_gpu_it_says_so(self, results):
        assert report.render() == "On a GPU: not measured."
        rows.write(results / "cpu.json", [row(device="Imaginary C1", cuda=None), row(provider="reference", cuda=None)])
        assert report.render().endswith("On a GPU: not measured.")

    def test_the_device_measured_last_is_shown(self, results):
        older = [row(cuda=None, device="Old C0"), row(cuda=None, device="Old C0", provider="reference")]
        newer = [row(cuda=None, device="New C1", date="2026-03-01T00:00:00Z")]
        rows.write(results / "cpu.json", newer + older)
        assert "New C1" in report.render() and "Old C0" not in report.render()

    def test_readme_between_its_markers(self, results, tmp_path):
        given = tmp_path / "rows.jsonl"
        for measured in (row(), row(provider="reference", median_ms=4.0)):
            rows.append(given, measured)
        pytest.importorskip("matplotlib")
        assert report.main(["--check"]) == 1
        assert report.main([str(given)]) == 0
        text = report.README.read_text()
        assert text.startswith(f"before\n{report.BEGIN}\n**Imaginary G1**") and text.endswith(f"{report.END}\nafter\n")
        assert report.main(["--check"]) == 0
        assert (results / "imaginary-g1.json").exists()
        assert {path.name for path in results.glob("*.svg")} == {
            "imaginary-g1-speedup.svg",
            "imaginary-g1-roofline.svg",
        }

    def test_figures_go_when_the_kernel_changes(self, results):
        pytest.importorskip("matplotlib")
        rows.write(results / "imaginary-g1.json", [row(), row(provider="reference")])
        report.draw()
        first = {path.name: path.read_bytes() for path in results.glob("*.svg")}
        report.draw()
        assert first == {path.name: path.read_bytes() for path in results.glob("*.svg")}
        rows.write(results / "imaginary-g1.json", [row(source="0123"), row(provider="reference")])
        report.draw()
        assert first and not list(results.glob("*.svg"))

    def test_no_roofline_of_a_cpu(self, results):
        pytest.importorskip("matplotlib")
        rows.write(results / "cpu.json", [row(cuda=None), row(cuda=None, provider="reference")])
        report.draw()
        assert [path.name for path in results.glob("*.svg")] == ["cpu-speedup.svg"]

    @pytest.mark.parametrize("text", ["none", report.BEGIN, f"{report.BEGIN}{report.END}{report.END}"])
    def test_refuses_a_readme_without_its_markers(self, text):
        with pytest.raises(ValueError, match="once each"):
            report.between_markers(text, "")

    @pytest.mark.parametrize(
        ("x", "text"), [(0.0123, "0.0123"), (0.4, "0.400"), (1, "1.00"), (39.54, "39.5"), (432.1, "432")], ids=str
    )
    def test_numbers(self, x, text):
        assert report.number(x) == text


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


class TestHarness:
    @pytest.mark.parametrize("device", ["cpu", "cuda"])
    @pytest.mark.parametrize("name", BENCHES)
    def test_cases_are_told_apart(self, name, device, monkeypatch):
        cases = bench_cases(name, device, monkeypatch)
        ids = [case.id for case in cases]
        assert ids and len(set(ids)) == len(ids)
        for case in cases:
            assert case.operation == name.removeprefix("bench_") and case.operation in report.OPERATIONS
            assert case.dtype in harness.DTYPES and (case.direction == "inference" or case.tolerance[1] > 0)

    def test_no_code_has_two_names(self, monkeypatch):
        for name in BENCHES:
            for case in bench_cases(name, "cpu", monkeypatch):
                runs = [p.values[1].name for p in harness.runs([case]).args[1]]
                assert len(set(runs)) == len(runs)
                assert (case.fused is None) == (not set(runs) & set(rows.FUSED))

    def test_every_provider_has_a_column(self):
        assert [provider.name for provider in providers.PROVIDERS if provider.name not in report.PROVIDERS] == []

    def test_every_bench_is_a_stage_of_the_lab(self):
        assert {f"bench_{stage.name}" for stage in lab.STAGES} >= set(BENCHES)

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
        fused = next(provider for provider in providers.PROVIDERS if provider.name == "fused")
        with pytest.raises(AssertionError, match=r"fused: gradient off by 1\.0e-02"):
            harness.measure(None, case, fused, 0.1, None)

    def test_ceilings(self):
        if ceilings.device_type() == "cpu":
            assert 1e8 < ceilings.bandwidth() < 1e13 and 1e8 < ceilings.rate(torch.float32) < 1e15


class TestLab:
    def test_list(self):
        listed = subprocess.run([sys.executable, BENCHMARKS / "lab.py", "--list"], capture_output=True, text=True)
        assert listed.returncode == 0
        assert [line.split()[0] for line in listed.stdout.splitlines()][:2] == ["tests", "tv_loss"]

    def test_refuses_an_unknown_stage(self):
        with pytest.raises(ValueError, match="no stage nonesuch"):
            lab.choose(["nonesuch"], False)

    def stage(self, name, code, seconds=1.0):
        return lab.Stage(name, seconds, name, ("-c", code))

    @pytest.fixture
    def run(self, tmp_path, monkeypatch, capsys):
        """Runs stages in a lab whose package is there already; returns the status and what was printed."""
        monkeypatch.setattr(lab.Lab, "provide_package", lambda self, needed: True)
        monkeypatch.setattr(lab.Lab, "ask", lambda self, code: "")  # no GPU

        def run(*stages, budget=30.0):
            status = lab.experiment(lab.Lab(tmp_path, budget), stages, needs_build=False)
            return status, capsys.readouterr().out

        return run

    def appended(self, path):
        line = json.dumps(row()) + "\n"
        return f"open({str(path / 'rows.jsonl')!r}, 'a').write({line!r})"

    def test_a_failing_stage_does_not_stop_the_rest(self, run, tmp_path):
        status, out = run(self.stage("bad", "raise SystemExit(3)"), self.stage("good", self.appended(tmp_path)))
        assert status == 1
        assert "bad                     FAILED: exit status 3" in out and "good                    ok" in out
        assert "tv_loss forward+backward  4x3x256x256  bf16   0.5" in out

    def test_rows_of_a_stage_that_is_cut_off_are_kept(self, run, tmp_path):
        endless = f"{self.appended(tmp_path)}; import time; time.sleep(60)"
        status, out = run(self.stage("endless", endless), self.stage("late", "pass", seconds=20), budget=2)
        assert status == 1 and "cut off" in out and "late                    skipped" in out
        assert rows.read(tmp_path / "rows.jsonl") == [row()]

    def test_all_well(self, run):
        assert run(self.stage("good", "pass"))[0] == 0
