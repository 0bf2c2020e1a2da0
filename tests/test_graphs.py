"""CUDA graphs that cannot be recorded: what PyTorch leaves under way is ended, and computing goes on op by op.

``torch.cuda`` is replaced by a stand-in with the faults of torch 2.11.
"""

from __future__ import annotations

import pytest
import torch
from fake_cuda import FakeCuda
from steps import FixedAddress, Terms, batches, build, equal, objective, rate, trained

from fastperc import TransformNet
from fastperc.engine import cuda
from fastperc.training.step import EAGER_STEPS, TrainStep, adam


@pytest.fixture(params=[False, True], ids=["torch-2.11", "torch-2.12"])
def fake(request, monkeypatch):
    return FakeCuda(monkeypatch, tells_allocator=request.param)


def instance_net():
    """Without running statistics: here a recording computes, and would update them."""
    return TransformNet("instance", width=4)


@pytest.mark.parametrize("error", ["refused", "of Python"])
def test_a_step_that_cannot_be_recorded_leaves_nothing_under_way(fake, error, capsys):
    expected, terms, _ = trained(EAGER_STEPS + 3, make=instance_net)
    attempts = []

    def loss(output, photos):
        if fake.capturing:
            attempts.append(len(fake.capturing))
            if error == "of Python":
                raise RuntimeError("not today")
            fake.wait()
        return objective(output, photos)

    net = build(make=instance_net)
    run = TrainStep(net, loss, adam(net.parameters(), 1.0, torch.device("cpu")))
    run.may_record, run.transfer = True, FixedAddress()
    for i, photos in enumerate(batches(EAGER_STEPS + 3)):
        assert torch.equal(torch.stack(run(photos, rate(i))), terms[i])
        assert fake.is_clean
    assert equal(net, expected) and len(attempts) == 1 and fake.offset == 8
    reason = "not today" if error == "of Python" else "CUDA error: operation not permitted when stream is capturing"
    assert capsys.readouterr().err == f"training goes on without a CUDA graph: {reason}\n", "the first error"


def test_a_recording_that_succeeds_is_left_alone(fake):
    stream = torch.cuda.current_stream()
    graph, result = cuda.record(lambda: Terms(1, 2, 3), stream)
    assert result == Terms(1, 2, 3) and graph.replay() is None
    assert fake.is_clean and fake.offset == 8


def test_an_interrupted_recording_leaves_nothing_under_way(fake):
    def run():
        fake.invalid = True
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cuda.record(run, torch.cuda.current_stream())
    assert fake.is_clean


def painted(graphs, paint, count):
    image = torch.rand(1, 3, 4, 4)
    return [torch.equal(graphs.run("key", image, paint), 2 * image) for _ in range(count)]


@pytest.fixture
def graphs(fake, monkeypatch):
    """Graphs of an engine on images that say they are on a GPU."""
    graphs = cuda.Graphs()

    def on_cpu(image, paint):
        return cuda.Graph(*cuda.record(lambda: paint(image), fake.first_stream, (7, 7)), image)

    monkeypatch.setattr(graphs, "_record", on_cpu)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    return graphs


def test_an_engine_that_cannot_be_recorded_paints_op_by_op(fake, graphs):
    attempts = []

    def paint(image):
        if fake.capturing:
            attempts.append(1)
            fake.wait()
        return 2 * image

    reason = "painting goes on without CUDA graphs: CUDA error: operation not permitted when stream is capturing$"
    with pytest.warns(UserWarning, match=reason) as warned:
        assert all(painted(graphs, paint, 4))
    assert len(attempts) == len(warned) == 1 and fake.is_clean


def test_a_graph_that_memory_is_too_short_for_is_tried_again_for_the_next_picture(fake, graphs, recwarn):
    attempts = []

    def paint(image):
        if fake.capturing:
            attempts.append(1)
            fake.invalid = True
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 2 * image

    assert all(painted(graphs, paint, 3)) and len(attempts) == 2 and not recwarn and fake.is_clean
