"""The lab: its stages, their limits and processes, and what it keeps of a stage that fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from measured import BENCHMARKS, row

# isort: split
import lab
import providers
import rows
import stages

BENCHES = sorted(path.stem for path in BENCHMARKS.glob("bench_*.py"))


def test_list():
    listed = subprocess.run([sys.executable, BENCHMARKS / "lab.py", "--list"], capture_output=True, text=True)
    assert listed.returncode == 0
    names = [line.split()[0] for line in listed.stdout.splitlines()]
    assert names[:4] == ["smoke", "tests_inference", "tests_training", "inference"]


def test_the_smoke_test_comes_first_and_takes_a_minute_at_most():
    assert stages.STAGES[0].name == "smoke" and stages.STAGES[0].limit <= 60


@pytest.mark.slow
def test_the_smoke_test():
    command = [sys.executable, BENCHMARKS / "smoke.py", "--tiny"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    names = [line[:28].strip() for line in done.stdout.splitlines()]
    assert sum(name.startswith("engine") for name in names) == 10 and {"step amp", "step fp32", "video"} < {*names}


def test_every_test_of_a_kernel_is_in_a_stage_and_under_the_sanitizers():
    kernels = {path.stem for path in (lab.ROOT / "fastperc/ops").glob("*.py")} | {"step", "engine", "graphs"}
    tested = {path for path in (lab.ROOT / "tests").glob("test_*.py") if path.stem[5:] in kernels}
    for chosen in (stages.STAGES, stages.SANITIZERS[:1], stages.SANITIZERS[1:]):
        arguments = {argument for stage in chosen for command in stage.commands for argument in command}
        assert {str(path) for path in tested} <= arguments


@pytest.mark.parametrize("name", BENCHES)
def test_each_family_of_providers_has_a_process_of_its_own_and_compilers_come_last(name):
    commands = [
        (place, command[command.index("-k") + 1])
        for place, stage in enumerate(stages.STAGES)
        for command in stage.commands
        if any(f"{name}.py" in part for part in command)
    ]
    families = [family for _, family in commands]
    assert families[: len(stages.FAMILIES)] == [*stages.FAMILIES]
    last = len(stages.STAGES) - len(stages.COMPILED_LAST)
    assert all((family == stages.COMPILED) == (place >= last) for place, family in commands)


def test_each_provider_is_in_one_family():
    from _pytest.mark.expression import Expression

    compiled = {provider.name: provider.name.startswith(("compile", "max")) for provider in providers.PROVIDERS}
    for name, is_compiled in compiled.items():
        families = [*stages.FAMILIES, stages.COMPILED]
        matches = [
            Expression.compile(family).evaluate(lambda word, name=name, **_: word in name) for family in families
        ]
        assert sum(matches) == 1 and matches[-1] == is_compiled


def test_tests_run_in_several_processes_where_pytest_can(monkeypatch):
    for found in (None, "found"):
        monkeypatch.setattr(stages, "find_spec", lambda name, found=found: found)
        (command,) = stages.tests("some", 60, "", ["engine"]).commands
        assert ("-n" in command) == bool(found)
        assert "-n" not in stages.sanitizer("memcheck").commands[0]


REHEARSED = ("smoke", "tests_inference", "tv_loss", "training_speed")  # all of them take some minutes


@pytest.mark.slow
def test_rehearsal(tmp_path):
    """Stages of each kind in their order on the CPU."""
    only = [argument for name in REHEARSED for argument in ("--only", name)]
    command = [sys.executable, BENCHMARKS / "lab.py", "--out", tmp_path, "--rehearse", *only]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout
    outcomes = [line.split(None, 1) for line in done.stdout.splitlines()[-len(REHEARSED) :]]
    assert [name for name, _ in outcomes] == [stage.name for stage in stages.STAGES if stage.name in REHEARSED]
    assert all(outcome.startswith("ok") and "no test" not in outcome for _, outcome in outcomes)
    rehearsed = rows.read(tmp_path / "rehearsal" / "rows.jsonl")
    assert {row["operation"] for row in rehearsed} == {"tv_loss"}
    assert not [*tmp_path.glob("*.json*")], "which the report would read"


def test_refuses_an_unknown_stage():
    with pytest.raises(ValueError, match="no stage nonesuch"):
        lab.choose(["nonesuch"], False)


def stage(name, *codes, limit=7.0, **options):
    return lab.Stage(name, limit, name, [("-c", code) for code in codes], **options)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs stages in a lab whose package is already installed; returns the status and what was printed."""
    monkeypatch.setattr(lab.Lab, "provide_package", lambda self, must_build: True)
    monkeypatch.setattr(lab.Lab, "output_of", lambda self, code: "")  # no GPU

    def run(*stages, budget=30.0):
        status = lab.experiment(lab.Lab(tmp_path, budget), stages, must_build=False)
        return status, capsys.readouterr().out

    return run


def appended(path):
    line = json.dumps(row()) + "\n"
    return f"open({str(path / 'rows.jsonl')!r}, 'a').write({line!r})"


def test_a_failing_stage_does_not_stop_the_rest(run, tmp_path):
    status, out = run(stage("bad", "raise SystemExit(3)"), stage("good", appended(tmp_path)))
    assert status == 1
    assert "bad                     FAILED: exit status 3" in out and "good                    ok" in out
    assert "tv_loss forward+backward  4x3x256x256  bf16   0.5" in out


def test_rows_of_a_stage_that_is_cut_off_are_kept(run, tmp_path):
    endless = f"{appended(tmp_path)}; import time; time.sleep(60)"
    status, out = run(stage("endless", endless), stage("late", "pass", limit=90), budget=2)
    assert status == 1 and "cut off" in out and "late                    skipped" in out
    assert rows.read(tmp_path / "rows.jsonl") == [row()]


def test_a_stage_has_a_limit_of_its_own(run, tmp_path):
    endless = f"{appended(tmp_path)}; import time; time.sleep(60)"
    status, out = run(stage("endless", endless, "pass", limit=1), stage("good", "pass"))
    assert status == 1 and "FAILED: cut off at 1 s" in out and "good                    ok" in out


def test_a_family_that_crashes_does_not_stop_the_others(run, tmp_path, monkeypatch):
    monkeypatch.setattr(lab.Lab, "output_of", lambda self, code: "some GPU")
    status, out = run(stage("families", "raise SystemExit(3)", appended(tmp_path)))
    assert status == 1 and "FAILED: exit status 3" in out and rows.read(tmp_path / "rows.jsonl") == [row()]


def test_on_a_cpu_the_first_family_runs(run, tmp_path):
    assert run(stage("families", "pass", appended(tmp_path)))[0] == 0
    assert not (tmp_path / "rows.jsonl").exists()


def test_all_well(run):
    assert run(stage("good", "pass"))[0] == 0
