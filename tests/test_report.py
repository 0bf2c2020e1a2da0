"""Measured rows: how they are kept, told apart, merged and rendered."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import report  # noqa: E402
import rows  # noqa: E402
from measured import row  # noqa: E402


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

    @pytest.mark.parametrize(
        ("changed", "affected"),
        [
            ("csrc/tv_loss.cu", {"tv_loss", "vgg_loss", "training"}),
            ("fastperc/ops/rgb_conv.py", {"rgb_conv", "inference", "training"}),
            (
                "kernels/instance_norm.py",
                {"conv_bn_relu", "residual_block", "rgb_conv", "subpixel_conv_bn_relu", "inference", "training"},
            ),
            ("fastperc/engine.py", {"inference"}),
            ("fastperc/models/transform_net.py", {"vgg_loss", "training", "inference"}),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_source_follows_the_files_that_an_operation_runs_on(self, tmp_path, monkeypatch, changed, affected):
        monkeypatch.setattr(rows, "ROOT", tmp_path)
        for path in (tmp_path / changed, tmp_path / "kernels/gram_loss.py"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("a")

        def hashes():
            rows.source_hash.cache_clear()
            return {operation: rows.source_hash(operation) for operation in (*report.OPERATIONS, "no_such")}

        before = hashes()
        (tmp_path / changed).write_text("b")
        after = hashes()
        rows.source_hash.cache_clear()
        assert {operation for operation in before if before[operation] != after[operation]} == affected
        assert before["no_such"] is None

    def test_every_file_that_an_operation_runs_on_is_there(self):
        for names in rows.OTHERS.values():
            assert all((rows.ROOT / name).exists() for name in names)
        for names in rows.KERNELS.values():
            assert all(any(any((rows.ROOT / f).glob(f"{name}.*")) for f in rows.KERNEL_FOLDERS) for name in names)


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

    def test_the_best_of_all_peers_is_named_and_every_networks_peer_shown(self, results):
        measured = [
            row(operation="inference", direction="inference", source=rows.source_hash("inference"), **changes)
            for changes in (
                dict(median_ms=2.0),
                dict(provider="reference", median_ms=8.0),
                dict(provider="compile", median_ms=5.0),
                dict(provider="openvino", median_ms=3.0),
            )
        ]
        rows.write(results / "imaginary-g1.json", measured)
        compared, networks = [text for text in report.render().split("\n\n") if text.startswith("| ")]
        assert compared.splitlines()[2].split(" | ")[3:9] == ["OpenVINO", "3.00", "8.00", "**2.00**", "4.0×", "1.50×"]
        assert networks.splitlines()[2].split(" | ")[2:] == ["8.00", "5.00", "3.00", "**2.00** |"]

    def test_a_peer_that_is_faster_is_not_hidden(self, results):
        measured = [
            row(median_ms=2.0),
            row(provider="reference", median_ms=4.0),
            row(provider="compile", median_ms=1.0),
        ]
        rows.write(results / "imaginary-g1.json", measured)
        assert "| `torch.compile` | 1.00 | 4.00 | **2.00** | 2.0× | 0.50× |" in report.render()

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
