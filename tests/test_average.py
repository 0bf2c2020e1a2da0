"""The mean of the weights over the last iterations of a run."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from cases import DEVICES, error
from torch import Tensor

from fastperc import TransformNet, checkpoints
from fastperc.training.average import WeightAverage, first_averaged
from fastperc.training.recipe import Recipe
from fastperc.training.step import EAGER_STEPS, TrainStep, adam


class Terms(NamedTuple):
    total: Tensor


def build(device="cpu"):
    torch.manual_seed(1)
    return TransformNet("paper", width=4).to(device, memory_format=torch.channels_last)


def change(net, step):
    """Stands for a step of training: new weights, statistics and counters."""
    for tensor in net.state_dict().values():
        tensor.copy_(torch.full_like(tensor, step))


@pytest.mark.parametrize(
    ("iterations", "first"), [(40_000, 36_001), (100, 91), (19, 19), (9, 9), (1, 1)], ids=lambda value: str(value)
)
def test_the_last_tenth_is_averaged(iterations, first):
    assert first_averaged(Recipe(data="", iterations=iterations)) == first


def test_is_the_mean_of_the_weights_after_each_iteration():
    net = build()
    average = WeightAverage(net, first=3)
    for step in range(1, 7):
        change(net, step)
        average.update(step)
        assert average.begun == (step >= 3)
    for name, tensor in average.net.state_dict().items():
        expected = 6 if name.endswith("num_batches_tracked") else (3 + 4 + 5 + 6) / 4
        assert torch.allclose(tensor.double(), torch.full_like(tensor, expected, dtype=torch.float64)), name
    assert all((tensor == 6).all() for tensor in net.state_dict().values()), "training goes on with its own weights"
    layouts = [w.is_contiguous(memory_format=torch.channels_last) for w in average.net.parameters() if w.dim() == 4]
    assert all(layouts)


def test_goes_on_from_a_checkpoint_bit_for_bit(tmp_path):
    net, optimizer = build(), torch.optim.Adam(build().parameters())
    average = WeightAverage(net, first=2)
    for step in range(1, 4):
        change(net, step / 3)
        average.update(step)
    path = tmp_path / "c.safetensors"
    checkpoints.save(net, path, optimizer=optimizer, average=average.net)
    again = build()
    resumed = WeightAverage(again, first=2, done=3)
    checkpoints.load_training(path, again, torch.optim.Adam(again.parameters()), resumed.net)
    for network, mean in ((net, average), (again, resumed)):
        change(network, 4 / 3)
        mean.update(4)
    assert resumed.count == average.count == 3
    for a, b in zip(average.net.state_dict().values(), resumed.net.state_dict().values()):
        assert torch.equal(a, b)
    loaded = checkpoints.load(path)
    assert float(loaded.head.bias[0].detach()) == 1.0, "a checkpoint loads as the network that is trained"


@pytest.mark.parametrize("device", DEVICES)
def test_follows_each_step_of_training(device):
    """On a GPU the last of these steps are replays of a CUDA graph."""

    def objective(output, photos):
        return Terms((output - photos).square().mean())

    net = build(device)
    step = TrainStep(net, objective, adam(net.parameters(), 1e-2, torch.device(device)))
    average, states = WeightAverage(net, first=EAGER_STEPS), []
    photos = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    for i in range(1, EAGER_STEPS + 5):
        step(photos, 1e-2)
        average.update(i)
        if i >= EAGER_STEPS:
            states.append([weight.detach().double().clone() for weight in net.parameters()])
    for i, weight in enumerate(average.net.parameters()):
        assert error(weight.detach(), torch.stack([state[i] for state in states]).mean(0)) < 1e-5
