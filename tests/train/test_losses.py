"""Each loss against a value computed by hand."""

import pytest
import torch

from asdm_core.packs import PREDICTIONS
from train import losses

HALF = torch.full((2, 1, 1, 1), 0.6), torch.full((2, 1, 1, 1), 0.8)


def pictures(*values):
    return torch.tensor(values)[:, None, None, None].expand(-1, 4, 2, 2).clone()


def test_squared_error_is_the_mean_of_each_sample_in_float32():
    a, b = torch.zeros(2, 3, 2), torch.zeros(2, 3, 2)
    a[0, 0, 0], a[1] = 6.0, 1.0
    assert losses.squared_error(a, b).tolist() == [6.0, 1.0]
    big = torch.full((1, 4), 1000.0, dtype=torch.float16)  # its square is beyond float16
    error = losses.squared_error(big, torch.zeros_like(big))
    assert error.dtype == torch.float32 and error.tolist() == [1e6]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_squared_error_has_the_gradient_of_plain_autograd_and_keeps_nothing_more(dtype):
    g = torch.Generator().manual_seed(0)
    given = torch.rand(3, generator=g)

    def pair():
        g.manual_seed(1)
        return [torch.randn(3, 5, 7, 2, generator=g).to(dtype).requires_grad_() for _ in range(2)]

    (a, b), (c, d) = pair(), pair()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        found = losses.squared_error(a, b)
    assert set(kept) == {a.data_ptr(), b.data_ptr()}
    plain = (c.float() - d.float()).square().flatten(1).mean(1)
    assert torch.equal(found, plain)
    found.backward(given)
    plain.backward(given)
    assert torch.equal(a.grad, c.grad) and torch.equal(b.grad, d.grad)


def test_task_compares_with_the_noise_or_with_v():
    x0, noise, predicted = pictures(1.0, 2.0), pictures(3.0, 0.0), pictures(0.0, 0.0)
    assert losses.task(predicted, x0, noise, *HALF, "eps").tolist() == [9.0, 0.0]
    # v = 0.6 noise - 0.8 x0: 1.8 - 0.8 = 1 and 0 - 1.6
    torch.testing.assert_close(losses.task(predicted, x0, noise, *HALF, "v"), torch.tensor([1.0, 2.56]))


def test_output_compares_with_the_teacher():
    assert losses.output(pictures(1.0, 2.0), pictures(1.0, -1.0)).tolist() == [0.0, 9.0]


def test_features_are_a_weighted_sum_over_the_taps():
    student = {"down.0": pictures(1.0, 0.0), "mid": torch.tensor([[2.0], [4.0]]), "unused": pictures(9.0, 9.0)}
    teacher = {"down.0": pictures(0.0, 0.0), "mid": torch.tensor([[0.0], [1.0]]), "unused": pictures(0.0, 0.0)}
    # [1 * 1 + 0.5 * 4, 0 + 0.5 * 9]
    assert losses.features(student, teacher, {"down.0": 1.0, "mid": 0.5}).tolist() == [3.0, 4.5]


def test_relative_features_do_not_depend_on_their_scale():
    student, teacher = pictures(3.0, 2.0), pictures(2.0, 2.0)
    for scale in (1, 1000):
        value = losses.features({"mid": scale * student}, {"mid": scale * teacher}, {"mid": 2.0}, relative=True)
        torch.testing.assert_close(value, torch.tensor([0.5, 0.0]))  # 2 * (3 - 2)^2 / 2^2


def test_denoised_inverts_the_noising():
    x0 = torch.randn(2, 4, 2, 2)
    noise = torch.randn(2, 4, 2, 2)
    (a, s) = HALF
    x = a * x0 + s * noise
    for prediction in PREDICTIONS:
        wanted = losses.target(x0, noise, a, s, prediction)
        torch.testing.assert_close(losses.denoised(x, wanted, a, s, prediction), x0)


def test_latents_become_pictures_by_the_matrix():
    z = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 2.0]])[:, :, None, None]
    rgb = losses.latent_rgb(z, "sd15")[:, :, 0, 0]
    torch.testing.assert_close(rgb, torch.tensor([[0.6756, 0.61485, 0.66135], [0.288, 0.2384, -0.2177]]))
    torch.testing.assert_close(
        losses.latent_rgb(torch.zeros(1, 4, 1, 1), "sdxl").flatten(), torch.tensor([0.5542, 0.49125, 0.49945])
    )


def test_perceptual_compares_levels_in_proportion_to_the_teachers():
    def net(x):
        return [x, 10 * x.mean((2, 3))]

    student, teacher = torch.full((3, 3, 2, 2), 3.0), torch.full((3, 3, 2, 2), 2.0)
    student[1] = 2.0
    # Both levels: (3 - 2)^2 / 2^2, whatever their scale. The last sample does not count.
    value = losses.perceptual(student, teacher, net, torch.tensor([True, True, False]))
    torch.testing.assert_close(value, torch.tensor([0.25, 0.0, 0.0]))


def test_perceptual_has_a_gradient_for_the_student_only():
    student, teacher = torch.rand(1, 3, 4, 4, requires_grad=True), torch.rand(1, 3, 4, 4, requires_grad=True)
    losses.perceptual(student, teacher, lambda x: [x.square()], torch.tensor([True])).sum().backward()
    assert student.grad.abs().sum() > 0 and teacher.grad is None


def test_resized_keeps_constant_pictures():
    assert torch.equal(losses.resized(torch.full((1, 3, 4, 4), 0.5), 8), torch.full((1, 3, 8, 8), 0.5))
