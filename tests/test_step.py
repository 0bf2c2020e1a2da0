"""A training step: the same operation by operation and replayed from a recording, on any device."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from cases import DEVICES, GPU, error
from steps import FixedAddress, batches, build, equal, objective, rate, trained
from torch import Tensor, nn

from fastperc import SuperResolutionNet, TransformNet, checkpoints, reference
from fastperc.training import step
from fastperc.training.step import EAGER_STEPS, Recording, TrainStep, adam, train_step


@pytest.mark.parametrize("scale", [None, 2], ids=["style", "sr"])
def test_is_a_step_of_adam_on_photos_in_0_to_1(scale):
    degrade = partial(reference.degrade, scale=scale, blur=1.0) if scale else None
    make = (lambda: SuperResolutionNet(scale, width=4)) if scale else (lambda: TransformNet("paper", width=4))
    net, terms, _ = trained(3, degrade=degrade, make=make)
    other = build(make=make)
    optimizer = torch.optim.Adam(other.parameters(), lr=1e-3, fused=True)
    for i, levels in enumerate(batches(3)):
        photos = levels.to(memory_format=torch.channels_last).float() / 255
        optimizer.param_groups[0]["lr"] = rate(i)
        expected = train_step(other, objective, optimizer, photos, degrade(photos) if degrade else photos, amp=False)
        assert torch.equal(terms[i], torch.stack(expected)) and not expected.total.requires_grad
    assert equal(net, other)


def test_fused_adam_is_adam():
    net, other = build(), build()
    fused, plain = adam(net.parameters(), 1e-3, torch.device("cpu")), torch.optim.Adam(other.parameters(), 1e-3)
    photos = batches(1)[0].to(memory_format=torch.channels_last).float() / 255
    for trained_net, optimizer in ((net, fused), (other, plain)):
        for _ in range(4):
            train_step(trained_net, objective, optimizer, photos, photos, amp=False)
    assert fused.defaults["fused"] and not plain.defaults["fused"]
    for actual, expected in zip(net.parameters(), other.parameters()):  # rounding alone moves a bias before a norm
        assert (actual - expected).abs().max() < 1e-5 or actual.dim() == 1


@pytest.mark.parametrize("before", ["fused", "not fused"])
@pytest.mark.parametrize("device", DEVICES)
def test_a_checkpoints_state_fits_any_optimizer(tmp_path, device, before):
    """Saved by one optimizer, loaded by another and trained further: as if the first had gone on."""
    net, _, run = trained(3)
    optimizer = run.optimizer
    if before == "not fused":
        other = torch.optim.Adam(net.parameters(), lr=1e-3)
        other.load_state_dict({**optimizer.state_dict(), "param_groups": other.state_dict()["param_groups"]})
        optimizer = other
    checkpoints.save(net, tmp_path / "c.safetensors", optimizer=optimizer)

    again = build(device)
    for parameter in again.parameters():
        nn.init.zeros_(parameter)
    fresh = adam(again.parameters(), 1.0, torch.device(device))
    checkpoints.load_training(tmp_path / "c.safetensors", again, fresh)
    go_on = TrainStep(again, objective, fresh)
    for i, photos in enumerate(batches(2)):
        run(photos, rate(i)), go_on(photos, rate(i))
    assert equal(net, again) if device == "cpu" else similar(again, net)
    checkpoints.save(again, tmp_path / "d.safetensors", optimizer=fresh)  # and back
    twin = build()
    state = adam(twin.parameters(), 1.0, torch.device("cpu"))
    checkpoints.load_training(tmp_path / "d.safetensors", twin, state)
    TrainStep(twin, objective, state)(batches(1)[0], 1e-3)
    assert {float(moments["step"]) for moments in state.state_dict()["state"].values()} == {6.0}


def similar(net, other, tolerance=2e-3):
    pairs = zip(net.state_dict().items(), other.state_dict().values())
    return all(error(a.cpu(), b.cpu()) < tolerance for (name, a), b in pairs if "weight" in name)


def record_on_cpu(run):
    """A stand-in for a CUDA graph: recording computes nothing, and each replay overwrites the terms."""
    terms: list[Tensor] = []

    def replay():
        latest = run()
        terms[:] = terms or [torch.empty_like(term) for term in latest]
        for kept, term in zip(terms, latest):
            kept.copy_(term)

    class KeptTerms:
        def __iter__(self):
            return iter(terms)

    return Recording(replay, KeptTerms())


def stack(terms):
    return torch.stack(tuple(terms))


def test_nothing_is_recorded_on_a_cpu():
    _, _, run = trained(EAGER_STEPS + 1)
    assert run.recording is None


def test_the_first_steps_run_op_by_op_and_none_is_lost(monkeypatch):
    expected, terms, _ = trained(EAGER_STEPS + 4)
    monkeypatch.setattr(step, "record", record_on_cpu)
    net = build()
    run = TrainStep(net, objective, adam(net.parameters(), 1.0, torch.device("cpu")))
    run.may_record, run.transfer = True, FixedAddress()
    for i, photos in enumerate(batches(EAGER_STEPS + 4)):
        assert torch.equal(stack(run(photos, rate(i))), terms[i])
        assert (run.recording is not None) == (i >= EAGER_STEPS)
    assert equal(net, expected)


def test_a_step_that_cannot_be_recorded_goes_on_op_by_op(monkeypatch, capsys):
    expected, terms, _ = trained(EAGER_STEPS + 3)

    def record(run):
        raise RuntimeError("operation not permitted when stream is capturing\nand much more")

    monkeypatch.setattr(step, "record", record)
    net, actual, _ = trained(EAGER_STEPS + 3, prepare=lambda run: setattr(run, "may_record", True))
    assert equal(net, expected) and torch.equal(actual, terms)
    message = "training goes on without a CUDA graph: operation not permitted when stream is capturing\n"
    assert capsys.readouterr().err == message, "it is tried once"


needs_gpu = pytest.mark.skipif(not GPU, reason="CUDA graphs need a GPU")


@needs_gpu
@pytest.mark.parametrize("amp", [False, True], ids=["fp32", "amp"])
@pytest.mark.parametrize("scale", [None, 2], ids=["style", "sr"])
def test_cuda_graphs_train_as_op_by_op(scale, amp, capsys):
    """With another learning rate and other photos at each step."""
    degrade = partial(reference.degrade, scale=scale, blur=1.0) if scale else None
    make = (lambda: SuperResolutionNet(scale, width=16)) if scale else (lambda: TransformNet("paper", width=16))
    arguments = dict(device="cuda", amp=amp, degrade=degrade, make=make)
    eager, expected, _ = trained(12, **arguments, prepare=lambda run: setattr(run, "may_record", False))
    graphed, terms, run = trained(12, **arguments)
    assert run.recording is not None and "without a CUDA graph" not in capsys.readouterr().err
    assert error(terms, expected) < (3e-2 if amp else 1e-3)
    assert similar(graphed, eager, 5e-2 if amp else 5e-3)
    counts = {int(n) for name, n in graphed.state_dict().items() if name.endswith("num_batches_tracked")}
    assert counts <= {12}, "recording does not count as a step"


@needs_gpu
def test_cuda_graphs_follow_the_step_size():
    net = build("cuda")
    run = TrainStep(net, objective, adam(net.parameters(), 1.0, torch.device("cuda")))
    (photos,) = batches(1)
    for _ in range(EAGER_STEPS + 2):
        run(photos, 1e-3)
    before = copy.deepcopy(dict(net.named_parameters()))
    run(photos, 0.0)
    assert all(torch.equal(parameter, before[name]) for name, parameter in net.named_parameters())
    run(photos, 1e-3)
    assert not torch.equal(net.stem.conv.weight, before["stem.conv.weight"])


@needs_gpu
def test_cuda_graphs_read_photos_of_one_shape():
    _, _, run = trained(EAGER_STEPS + 1, device="cuda")
    with pytest.raises(ValueError, match=r"expected photos \[2, 3, 32, 32\] as before, got \[1, 3, 32, 32\]"):
        run(batches(1)[0][:1], 1e-3)
