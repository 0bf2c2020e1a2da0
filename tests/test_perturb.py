"""What a network sees in training besides the photos: noise, and shifted copies whose pictures must not differ."""

from __future__ import annotations

import pytest
import torch
from cases import DEVICES
from pictures import picture
from torch._subclasses.fake_tensor import FakeTensorMode

from fastperc.losses import PerceptualTerms
from fastperc.photos.photo import Photo
from fastperc.training import perturb
from fastperc.training.perturb import SHIFT, StabilityLoss, add_noise, seed_step, shifted

CPU = torch.device("cpu")


def plain_loss(output, photos):
    """Stands for a perceptual loss."""
    content = (output - photos).square().mean()
    return PerceptualTerms(content, content, content * 0, content * 0)


@pytest.fixture
def photos():
    return torch.cat([Photo(picture(40, 32, seed)).tensor() for seed in (1, 2)])


@pytest.fixture
def without_noise(monkeypatch):
    monkeypatch.setattr(perturb, "LEAST_NOISE", 0.0)


def stability(weight=1.0, noise=0.0):
    return StabilityLoss(plain_loss, weight, noise)


@pytest.mark.parametrize("device", DEVICES)
def test_noise_has_the_deviation_asked_for(device):
    noise = add_noise(torch.zeros(4, 3, 64, 64, device=device), 0.1)
    assert abs(float(noise.std()) - 0.1) < 0.002 and abs(float(noise.mean())) < 0.002


def test_no_noise_is_the_photos_themselves(photos):
    assert add_noise(photos, 0.0) is photos


@pytest.mark.parametrize("device", DEVICES)
def test_random_numbers_depend_on_seed_step_and_rank_alone(device):
    def drawn(*numbers):
        seed_step(torch.device(device), *numbers)
        return torch.rand(4, device=device).tolist()

    drawings = [drawn(*numbers) for numbers in ((0, 1, 0), (1, 1, 0), (0, 2, 0), (0, 1, 1), (2**63, 1, 0))]
    assert drawn(0, 1, 0) == drawings[0] and len(set(map(tuple, drawings))) == 5


def test_a_network_that_moves_with_the_photo_is_stable(photos, without_noise):
    loss, shifts = stability(), set()
    for step in range(60):
        seed_step(CPU, 0, step, 0)
        seen = loss.perturb(photos)
        assert seen.shape == (4, 3, 32, 40) and torch.equal(seen[:2], photos)
        down, right = loss.shift.tolist()
        shifts.add((down, right))
        moved = photos.roll((down, right), (2, 3))[:, :, SHIFT:-SHIFT, SHIFT:-SHIFT]
        assert torch.equal(seen[2:, :, SHIFT:-SHIFT, SHIFT:-SHIFT], moved)
        assert loss(seen, photos).stability == 0
        still = loss(torch.cat([photos, photos]), photos).stability
        assert (still > 0) == ((down, right) != (0, 0)), "a picture that does not move with the photo"
    assert {down for down, _ in shifts} == {right for _, right in shifts} == set(range(-SHIFT, SHIFT + 1))


def test_photos_are_reflected_at_the_borders(photos):
    moved = shifted(photos, torch.tensor([2, -3]))
    rows, columns = [2, 1, *range(30)], [*range(3, 40), 38, 37, 36]
    assert torch.equal(moved, photos[:, :, rows][:, :, :, columns])


def test_terms_add_up_and_both_pictures_get_a_gradient(photos):
    loss = stability(weight=3.0)
    output = loss.perturb(photos).requires_grad_()
    terms = loss(output, photos)
    assert terms._fields == ("total", "content", "style", "tv", "stability")
    assert torch.allclose(terms.total, terms.content + terms.stability)
    assert torch.allclose(terms.stability, 3.0 * torch.tensor(perturb.LEAST_NOISE) ** 2, rtol=0.1)
    terms.stability.backward()
    first, second = output.grad.chunk(2)
    assert first.abs().sum() > 0 and torch.allclose(first.sum(), -second.sum(), atol=1e-4)


def test_the_copy_gets_at_least_a_little_noise(photos):
    for noise, expected in ((0.0, perturb.LEAST_NOISE), (0.2, 0.2)):
        flat = torch.full_like(photos, 0.5)
        first, second = stability(noise=noise).perturb(flat).chunk(2)
        assert (
            abs(float(first.std()) - noise) < 0.05 * expected and abs(float(second.std()) - expected) < 0.05 * expected
        )


def test_nothing_waits_for_the_device(photos):
    """Fake tensors have no values: an operation that would read one raises, as it does while a graph is recorded."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        loss = stability(noise=0.1)
        fake = mode.from_tensor(photos)
        terms = loss(loss.perturb(fake), fake)
    assert terms.total.shape == ()
