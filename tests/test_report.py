"""Measured rows: how they are stored, compared, merged and rendered."""

from __future__ import annotations

import json
import re

import pytest
from measured import BENCHMARKS, row

# isort: split
import ceilings
import operations
import report
import rows
from comparison import number


@pytest.fixture
def results(tmp_path, monkeypatch):
    """An empty folder of results, README and docs/performance.md, in place of the repository's."""
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    for module in (rows, report):
        monkeypatch.setattr(module, "RESULTS", folder)
    monkeypatch.setattr(report, "ROOT", tmp_path)
    for name, path in (("README", tmp_path / "README.md"), ("PERFORMANCE", tmp_path / "docs" / "performance.md")):
        path.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
        monkeypatch.setattr(report, name, path)
    return folder


class TestRows:
    def test_every_result_in_the_repository_is_a_row_in_its_own_file(self):
        for path in rows.RESULTS.glob("*.json"):
            for measured in rows.read(path):
                assert rows.results_file(measured["device"]).name == path.name

    def test_rows_of_an_emulated_machine_are_refused(self, results, tmp_path, monkeypatch, capsys):
        ceilings.device_name.cache_clear()
        monkeypatch.setattr(ceilings, "device_type", lambda: "cpu")
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
        emulated = ceilings.device_name()
        ceilings.device_name.cache_clear()
        given = tmp_path / "rows.jsonl"
        for measured in (row(), row(device=emulated, cuda=None)):
            rows.append(given, measured)
        assert report.main([str(given)]) == 2
        assert "hidden instruction sets" in capsys.readouterr().err and not list(results.iterdir())

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
            ("fastperc/ops/rgb_conv.py", {"rgb_conv", "inference", "training", "gallery"}),
            (
                "kernels/instance_norm.py",
                {
                    *("conv_bn_relu", "residual_block", "rgb_conv", "subpixel_conv_bn_relu"),
                    *("inference", "training", "gallery"),
                },
            ),
            ("fastperc/engine/engine.py", {"inference", "gallery"}),
            ("fastperc/models/transform_net.py", {"vgg_loss", "lpips", "training", "inference"}),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_the_hash_follows_the_files_that_a_benchmark_runs_on(self, tmp_path, monkeypatch, changed, affected):
        benchmarks = [path.stem.removeprefix("bench_") for path in BENCHMARKS.glob("bench_*.py")]
        monkeypatch.setattr(operations, "ROOT", tmp_path)
        for path in (tmp_path / changed, tmp_path / "kernels/gram_loss.py"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("a")

        def hashes():
            rows.source_hash.cache_clear()
            return {name: rows.source_hash(name) for name in (*benchmarks, "no_such")}

        before = hashes()
        (tmp_path / changed).write_text("b")
        after = hashes()
        rows.source_hash.cache_clear()
        assert {name for name in before if before[name] != after[name]} == affected
        assert before["no_such"] is None

    def test_every_operation_has_sources_that_exist(self):
        for operation in operations.OPERATIONS:
            sources = list(operations.sources_of(operation))
            assert sources and all(path.is_file() for path in sources)

    def test_a_composed_benchmark_names_operations_and_folders_that_exist(self):
        for benchmark in operations.COMPOSED.values():
            assert set(benchmark.operations) <= set(operations.OPERATIONS)
            assert all(list((operations.ROOT / folder).glob("*.py")) for folder in benchmark.folders)

    def test_every_benchmark_has_a_name_and_every_composed_one_a_file(self):
        files = {path.stem.removeprefix("bench_") for path in BENCHMARKS.glob("bench_*.py")}
        assert set(operations.COMPOSED) <= files <= set(operations.names())


def measured_networks():
    """Rows of whole networks, by which README's table and the large one can be compared."""
    source = rows.source_hash("inference")
    network = dict(operation="inference", direction="inference", shape="great_wave 1x3x256x256", source=source)
    medians = {"fused": 2.0, "reference": 8.0, "compile": 5.0, "openvino": 3.0}
    return [row(provider=provider, median_ms=median, **network) for provider, median in medians.items()]


class TestReport:
    def test_a_current_row_is_shown(self, results):
        rows.write(results / "imaginary-g1.json", [row(), row(provider="reference", median_ms=4.0)])
        text = report.render_performance()
        assert "**0.500**" in text and "8.0×" in text and "not measured" not in text

    def test_a_changed_kernel_is_not_measured(self, results):
        rows.write(results / "imaginary-g1.json", [row(source="0123"), row(provider="reference", median_ms=4.0)])
        text = report.render_performance()
        assert report.NOT_MEASURED_NOTE in text and "4.00" in text
        assert "0.500" not in text and "8.0×" not in text and "speedup" not in text

    def test_the_note_is_left_out_where_all_is_current(self, results):
        rows.write(results / "imaginary-g1.json", measured_networks())
        assert report.NOT_MEASURED not in report.render_performance() + report.render_readme()

    def test_the_best_peer_is_named_and_every_network_shown_by_all_providers(self, results):
        rows.write(results / "imaginary-g1.json", measured_networks())
        tables = [text for text in report.render_performance().split("\n\n") if text.startswith("| ")]
        compared, networks = tables
        assert compared.splitlines()[2].split(" | ")[3:9] == ["OpenVINO", "3.00", "8.00", "**2.00**", "4.0×", "1.50×"]
        assert networks.splitlines()[2].split(" | ")[2:] == ["8.00", "5.00", "3.00", "**2.00** |"]

    def test_a_peer_that_is_faster_is_not_hidden(self, results):
        measured = [
            row(median_ms=2.0),
            row(provider="reference", median_ms=4.0),
            row(provider="compile", median_ms=1.0),
        ]
        rows.write(results / "imaginary-g1.json", measured)
        assert "| `torch.compile` | 1.00 | 4.00 | **2.00** | 2.0× | 0.50× |" in report.render_performance()

    def test_a_peer_stays_when_the_kernel_changes(self):
        assert rows.is_current(row(provider="compile", source="0123"))

    def test_without_a_gpu_it_says_so(self, results):
        assert report.render_performance() == report.NO_GPU
        assert report.render_readme().startswith(report.NO_GPU)
        measured = dict(device="Imaginary C1", cuda=None)
        rows.write(results / "imaginary-c1.json", [row(**measured), row(provider="reference", **measured)])
        assert report.render_performance().endswith(report.NO_GPU)
        assert report.NO_GPU in report.render_readme()

    def test_a_gpu_whose_rows_are_all_stale_is_not_measured(self, results):
        rows.write(results / "imaginary-g1.json", [row(source="0123"), row(provider="reference", median_ms=4.0)])
        assert report.NO_GPU in report.render_performance() and report.NO_GPU in report.render_readme()

    @staticmethod
    def write_processor(results, device, date, source=None, **changes):
        """Writes rows of a processor; of another ``source`` they are stale."""
        changes |= dict(device=device, date=date, cuda=None, **({"source": source} if source else {}))
        measured = [measured | changes for measured in measured_networks()]
        rows.write(results / rows.results_file(device).name, measured)

    def test_the_two_processors_measured_last_are_shown_side_by_side(self, results):
        self.write_processor(results, "Old C0, 2 cores, AVX", "2026-01-01T00:00:00Z")
        self.write_processor(results, "Mid C1, 2 cores, AVX2", "2026-02-01T00:00:00Z", median_ms=6.0)
        self.write_processor(results, "Stale C2, 2 cores, AVX-512", "2026-03-01T00:00:00Z", source="0123")
        self.write_processor(results, "New C3, 2 cores, AVX-512 BF16", "2026-02-02T00:00:00Z")
        assert [device.name.partition(",")[0] for device in report.devices()] == ["New C3", "Mid C1"]
        for text in (report.render_readme(), report.render_performance()):
            assert "C0" not in text and "C2" not in text
            assert "**New C3, 2 cores, AVX-512 BF16**" in text and "**Mid C1, 2 cores, AVX2**" in text
            head, _, line = [line for line in text.splitlines() if line.startswith("| ")][:3]
            assert "| AVX-512 BF16: best peer | fastperc | speedup | AVX2: best peer | fastperc | speedup |" in head
            assert line.split(" | ")[3:9] == [
                "3.00, OpenVINO", "**2.00**", "1.50×", "6.00, eager PyTorch", "**6.00**", "1.00× |"
            ]  # fmt: skip
        assert report.render_performance().count("medians in milliseconds") == 3  # both, and each by itself

    def test_of_two_processors_with_the_same_instructions_the_names_are_shown(self, results):
        for name in ("A, 2 cores, AVX2", "B, 4 cores, AVX2"):
            self.write_processor(results, name, "2026-02-01T00:00:00Z")
        assert "| A, 2 cores, AVX2: best peer |" in report.render_readme()

    def test_a_case_that_one_processor_lacks(self, results):
        self.write_processor(results, "A, AVX2", "2026-02-01T00:00:00Z")
        self.write_processor(results, "B, AVX-512", "2026-02-02T00:00:00Z", shape="great_wave 1x3x512x512")
        for text in (report.render_performance(), report.render_readme()):
            assert f"|  | {report.NOT_MEASURED} |  |" in text and report.NOT_MEASURED_NOTE in text

    def test_without_current_rows_the_processor_measured_last_is_shown(self, results):
        self.write_processor(results, "A, AVX2", "2026-02-01T00:00:00Z", source="0123")
        self.write_processor(results, "B, AVX-512", "2026-02-02T00:00:00Z", source="0123")
        assert [device.name for device in report.devices()] == ["B, AVX-512"]

    def test_a_row_that_was_timed_once_is_marked(self, results):
        measured = [row(), row(provider="reference", median_ms=40.0, timed_once=True)]
        rows.write(results / "imaginary-g1.json", measured)
        text = report.render_performance()
        assert (
            "| eager PyTorch | 40.0 (once) | 40.0 (once) | **0.500** | 80× |" in text and report.TIMED_ONCE_NOTE in text
        )
        rows.write(results / "imaginary-g1.json", [row(), row(provider="reference")])
        assert report.TIMED_ONCE_NOTE not in report.render_performance()

    def test_readme_shows_a_few_rows_and_links_to_the_rest(self, results):
        rows.write(results / "imaginary-g1.json", [*measured_networks(), row()])
        text = report.render_readme()
        lines = [line for line in text.splitlines() if line.startswith("| ")]
        assert lines[2].split(" | ")[1:] == [
            "great_wave 1×3×256×256", "bf16", "8.00", "3.00, OpenVINO", "**2.00**", "1.50× |"
        ]  # fmt: skip
        assert len(lines) == 3 and "Total variation" not in text  # which is no highlight
        assert "](docs/performance.md)" in text

    def test_readme_says_what_is_not_measured(self, results):
        stale = [measured | dict(source="0123") for measured in measured_networks()]
        rows.write(results / "imaginary-g1.json", stale)
        text = report.render_readme()
        assert f"| {report.NOT_MEASURED} |  |" in text and report.NOT_MEASURED_NOTE in text
        assert "3.00, OpenVINO" in text and "2.00" not in text

    def test_every_highlight_is_measured(self):
        measured = [device.comparisons for device in report.devices()]
        assert measured
        for comparisons in measured:
            assert all(report.highlighted(comparisons, *highlight) for highlight in report.HIGHLIGHTS)

    def test_documents_between_their_markers(self, results, tmp_path, capsys):
        given = tmp_path / "rows.jsonl"
        for measured in (row(), row(provider="reference", median_ms=4.0)):
            rows.append(given, measured)
        pytest.importorskip("matplotlib")
        assert report.main(["--check"]) == 1
        assert report.main([str(given)]) == 0
        for path, start in ((report.README, report.BEGIN), (report.PERFORMANCE, f"{report.BEGIN}\n**Imaginary G1**")):
            text = path.read_text()
            assert text.startswith(f"before\n{start}") and text.endswith(f"{report.END}\nafter\n")
            assert "old" not in text
        assert report.main(["--check"]) == 0
        assert (results / "imaginary-g1.json").exists()
        assert {path.name for path in results.glob("*.svg")} == {
            "imaginary-g1-speedup.svg",
            "imaginary-g1-roofline.svg",
        }
        capsys.readouterr()
        report.PERFORMANCE.write_text(f"{report.BEGIN}{report.END}")
        assert report.main(["--check"]) == 1
        told = capsys.readouterr().out
        assert "docs/performance.md" in told and "README" not in told

    def test_links_lead_to_files(self, results):
        pytest.importorskip("matplotlib")
        rows.write(results / "imaginary-g1.json", [row(), row(provider="reference")])
        assert report.main([]) == 0
        links = re.findall(r"\]\((.*?)\)", report.PERFORMANCE.read_text())
        assert len(links) == 3 and all((report.PERFORMANCE.parent / link).is_file() for link in links)

    def test_figures_go_when_the_kernel_changes(self, results):
        pytest.importorskip("matplotlib")
        rows.write(results / "imaginary-g1.json", [row(), row(provider="reference")])
        report.draw_figures()
        first = {path.name: path.read_bytes() for path in results.glob("*.svg")}
        report.draw_figures()
        assert first == {path.name: path.read_bytes() for path in results.glob("*.svg")}
        rows.write(results / "imaginary-g1.json", [row(source="0123"), row(provider="reference")])
        report.draw_figures()
        assert first and not list(results.glob("*.svg"))

    def test_no_roofline_of_a_cpu(self, results):
        pytest.importorskip("matplotlib")
        rows.write(results / "imaginary-g1.json", [row(cuda=None), row(cuda=None, provider="reference")])
        report.draw_figures()
        assert [path.name for path in results.glob("*.svg")] == ["imaginary-g1-speedup.svg"]

    @pytest.mark.parametrize("text", ["none", report.BEGIN, f"{report.BEGIN}{report.END}{report.END}"])
    def test_refuses_a_document_without_its_markers(self, text):
        with pytest.raises(ValueError, match="once each"):
            report.between_markers(text, "")

    @pytest.mark.parametrize(
        ("x", "text"), [(0.0123, "0.0123"), (0.4, "0.400"), (1, "1.00"), (39.54, "39.5"), (432.1, "432")], ids=str
    )
    def test_numbers(self, x, text):
        assert number(x) == text
