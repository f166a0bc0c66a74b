"""GRI attention: the limits in which it is exactly full attention, at any size."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asdm_core.gri import GRI, PAYS_FROM, gri_attention, sdpa

SIZES = ((16, 16), (13, 19), (1, 40), (33, 8), (24, 40))


def qkv(height, width, batch=2, heads=3, dim=8, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, height * width, heads, dim, generator=generator).to(dtype) for _ in range(3)]


def full(q, k, v):
    return (
        torch.softmax(torch.einsum("bnhd,bmhd->bhnm", q, k) * q.shape[-1] ** -0.5, -1)
        .matmul(v.transpose(1, 2))
        .transpose(1, 2)
    )


def by_definition(q, k, v, height, width, gri, log_gain=None):
    """Window by window and cell by cell, in loops; for each sample and head by itself."""
    log_gain = torch.zeros(q.shape[2], dtype=q.dtype) if log_gain is None else log_gain
    out = torch.empty_like(q)
    for b, h in itertools.product(range(q.shape[0]), range(q.shape[2])):
        out[b, :, h] = of_head(q[b, :, h], k[b, :, h], v[b, :, h], height, width, gri, log_gain[h])
    return out


def of_head(q, k, v, height, width, gri, log_gain):
    """q, k, v: (N, dim)"""
    scale = q.shape[1] ** -0.5
    grid = torch.arange(height * width).view(height, width)
    borders = [itertools.pairwise(sorted(cut(size, gri))) for size in (height, width)]
    windows = [grid[top:bottom, left:right] for (top, bottom), (left, right) in itertools.product(*map(list, borders))]
    cells = []
    for window in windows:
        found = []
        for tokens in cells_of(window, k, gri.pool):
            w = (k[tokens] @ q.mean(0) * scale).softmax(0)
            found.append((w @ k[tokens], w @ v[tokens], torch.special.entr(w).sum() + log_gain))
        cells.append(found)
    out = torch.empty_like(q)
    for i, window in enumerate(windows):
        own = window.flatten()
        keys, values, bias = (
            zip(*[cell for j, found in enumerate(cells) if j != i for cell in found], strict=True)
            if len(windows) > 1
            else ((),) * 3
        )
        keys, values = (torch.cat([x[own], *(row[None] for row in more)]) for x, more in ((k, keys), (v, values)))
        logits = q[own] @ keys.T * scale + torch.cat([q.new_zeros(len(own)), *(b[None] for b in bias)])
        out[own] = logits.softmax(-1) @ values
    return out


def cells_of(window, k, pool, steps=2):
    """The tokens of each cell of a window: k-means on the keys, which starts at squares."""
    squares = [part for row in window.split(pool) for part in row.split(pool, 1)]
    cells = [square.flatten() for square in squares]
    for _ in range(steps if pool > 1 else 0):
        centres = torch.stack([k[tokens].mean(0) for tokens in cells])
        nearest = torch.cdist(k[window.flatten()], centres).argmin(1)
        cells = [tokens for i in range(len(centres)) if len(tokens := window.flatten()[nearest == i])]
    return cells


def cut(size, gri):
    """Borders of windows: every `window` tokens from the shift on; less than half a window at the end is none of its
    own.
    """
    borders = {0, size, *range(gri.shift, size, gri.window)}
    last = max((b for b in borders if b < size), default=0)
    return borders - {last} if last > gri.shift and 2 * (size - last) < gri.window else borders


@pytest.mark.parametrize("size", SIZES)
def test_window_over_the_whole_map_is_full_attention(size):
    q, k, v = qkv(*size)
    for pool in (1, 4, 8):
        gri = GRI(40, pool)
        assert gri.covers(*size)
        assert torch.allclose(gri_attention(q, k, v, *size, gri), full(q, k, v), atol=1e-12)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shift", [0, 3])
def test_cells_of_one_token_are_full_attention(size, shift):
    q, k, v = qkv(*size)
    gri = GRI(5, 1, shift)
    assert not gri.covers(*size)
    assert torch.allclose(gri_attention(q, k, v, *size, gri), full(q, k, v), atol=1e-12)


@pytest.mark.parametrize("size", SIZES)
def test_constant_keys_and_values_are_full_attention(size):
    q, k, v = qkv(*size)
    k, v = k[:, :1].expand_as(k), v[:, :1].expand_as(v)
    assert torch.allclose(gri_attention(q, k, v, *size, GRI(8, 4)), full(q, k, v), atol=1e-12)


@pytest.mark.parametrize("size", SIZES)
def test_constant_keys_give_every_token_the_same_weight(size):
    # The values differ: an error in the count of a cell at the edge would show.
    q, k, v = qkv(*size)
    out = gri_attention(q, k[:, :1].expand_as(k), v, *size, GRI(8, 4))
    assert torch.allclose(out, v.mean(1, keepdim=True).expand_as(out), atol=1e-6)  # log(count) is a float32


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("strength", [1, 300])
def test_equal_queries_are_full_attention(size, strength):
    # Cells are exact for the mean query, however unequal their tokens are to it.
    q, k, v = qkv(*size)
    q = strength * q[:, :1].expand_as(q)
    assert torch.allclose(gri_attention(q, k, v, *size, GRI(8, 4)), full(q, k, v), atol=1e-4 if strength > 1 else 1e-6)


@given(
    st.integers(1, 16),
    st.integers(1, 16),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(0, 3),
    st.integers(0, 2**20),
)
def test_any_size_equals_the_definition(height, width, pool, cells, shift, seed):
    gri = GRI(pool * cells, pool, pool * min(shift, cells - 1))
    q, k, v = qkv(height, width, batch=1, heads=2, dim=4, seed=seed)
    log_gain = torch.randn(2, generator=torch.Generator().manual_seed(seed))
    out = gri_attention(q, k, v, height, width, gri, log_gain)
    assert torch.allclose(out, by_definition(q, k, v, height, width, gri, log_gain.double()), atol=1e-12)


def test_the_approximation_is_one_and_a_better_one_with_smaller_cells():
    q, k, v = qkv(32, 32, dtype=torch.float32)
    wanted = full(q, k, v)
    errors = [
        float((gri_attention(q, k, v, 32, 32, GRI(16, pool)) - wanted).norm() / wanted.norm()) for pool in (8, 4, 2, 1)
    ]
    assert errors == sorted(errors, reverse=True) and errors[0] > 0.05 and errors[-1] < 1e-5


@pytest.mark.parametrize("learns", [False, True], ids=["bias as mask", "bias as channels"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_half_precision_keeps_the_counts(dtype, tolerance, learns):
    q, k, v = qkv(24, 24, dtype=dtype)
    k = k[:, :1].expand_as(k)
    gri = GRI(8, 8)
    gain = torch.zeros(3, requires_grad=learns)
    out = gri_attention(q, k, v, 24, 24, gri, gain)
    wanted = gri_attention(q.double(), k.double(), v.double(), 24, 24, gri)
    assert out.dtype == dtype
    assert (out.double() - wanted).norm() / wanted.norm() < tolerance


def test_equal_keys_share_a_cell_wherever_they_are():
    # Four kinds of keys, strewn over windows of four cells: each cell takes one kind, so nothing is lost.
    q, _, v = qkv(24, 24)
    generator = torch.Generator().manual_seed(1)
    kinds = torch.randn(4, 3, 8, generator=generator).double()
    squares = torch.arange(4).view(2, 2).repeat_interleave(4, 0).repeat_interleave(4, 1).repeat(3, 3)
    strewn = torch.where(
        torch.rand(24, 24, generator=generator) < 0.3, torch.randint(4, (24, 24), generator=generator), squares
    )
    k = kinds[strewn.flatten()].expand(2, -1, -1, -1)
    assert torch.allclose(gri_attention(q, k, v, 24, 24, GRI(8, 4)), full(q, k, v), atol=1e-12)


def test_windows_are_gathered_in_as_many_turns_as_the_memory_asks_for(monkeypatch):
    q, k, v = qkv(13, 19)
    wanted = gri_attention(q, k, v, 13, 19, GRI(8, 4))
    monkeypatch.setattr("asdm_core.gri._MOST", 3 * 64 * 4 * 5)  # five windows of four cells
    assert torch.allclose(gri_attention(q, k, v, 13, 19, GRI(8, 4)), wanted, atol=1e-12)


def test_gain_of_zero_changes_nothing_and_learns():
    q, k, v = (t.requires_grad_() for t in qkv(13, 19))
    log_gain = torch.zeros(3, requires_grad=True)
    out = gri_attention(q, k, v, 13, 19, GRI(8, 4), log_gain)
    assert torch.allclose(
        out, gri_attention(q, k, v, 13, 19, GRI(8, 4)), atol=1e-12
    )  # torch picks another kernel to learn
    out.square().sum().backward()
    for t in (q, k, v, log_gain):
        assert t.grad.isfinite().all() and t.grad.abs().sum() > 0


def test_gradients_are_those_of_the_definition():
    grads = []
    for attention in (gri_attention, by_definition):
        inputs = [t.requires_grad_() for t in qkv(9, 14, batch=1)]
        grads.append(torch.autograd.grad(attention(*inputs, 9, 14, GRI(4, 2, 2)).square().sum(), inputs))
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_attentions_that_know_no_scale_but_their_own_do_as_well():
    """Off the CPU, of which an input with a gradient is treated as one, biases travel in further channels."""

    def scaled_by_itself(q, k, v, scale, bias):
        assert bias is None and scale == pytest.approx(q.shape[-1] ** -0.5)
        return sdpa(q, k, v, q.shape[-1] ** -0.5, None)

    inputs = [t.requires_grad_() for t in qkv(9, 14, batch=1)]
    found = gri_attention(*inputs, 9, 14, GRI(4, 2, 2), attend=scaled_by_itself)
    assert torch.allclose(found, by_definition(*inputs, 9, 14, GRI(4, 2, 2)), atol=1e-5)


def test_no_numbers_are_copied_to_where_a_map_lies(monkeypatch):
    """Each such copy waits for the graphics card, in every layer of every step."""
    inputs = [t.requires_grad_() for t in qkv(9, 14, batch=1)]
    for owner, name in ((torch.Tensor, "new_tensor"), (torch, "tensor"), (torch, "as_tensor")):
        monkeypatch.setattr(owner, name, lambda *_, **__: pytest.fail("numbers are copied"))
    gri_attention(*inputs, 9, 14, GRI(4, 2, 2))


def test_nothing_grows_with_the_square_of_the_tokens():
    sizes = []

    def attend(q, k, v, scale, bias):
        sizes.append(q.shape[0] * q.shape[2] * k.shape[2])
        assert bias.shape[2] == 1
        return sdpa(q, k, v, scale, bias)

    for side in (64, 128, 256):
        gri_attention(
            *qkv(side, side, batch=1, heads=1, dtype=torch.float32), side, side, GRI.choose(side, side), attend=attend
        )
    small, middle, large = sizes
    assert middle <= 5 * small and large <= 5 * middle  # products of q and k; full attention: 16 times each


@given(st.integers(1, 400), st.integers(1, 400), st.integers(0, 64), st.booleans())
def test_a_choice_fits_itself(height, width, window, shifted):
    gri = GRI.choose(height, width, window, 0, shifted)
    assert gri.window >= window and gri.pool >= 4
    assert (height / gri.pool) * (width / gri.pool) <= 16 * 16 + 1e-9


def test_the_choice_at_common_sizes():
    assert PAYS_FROM == 64 * 64
    assert GRI.choose(64, 64) == GRI(16, 4)
    assert GRI.choose(128, 128) == GRI(16, 8)
    assert GRI.choose(256, 256) == GRI(16, 16)
    assert GRI.choose(128, 128, 24, 8, True) == GRI(24, 8, 8)


@pytest.mark.parametrize("settings", [(0, 1), (4, 0), (8, 3), (8, 4, 2), (8, 4, 8), (8, 4, -4)])
def test_settings_that_do_not_fit_are_refused(settings):
    with pytest.raises(ValueError, match="window"):
        GRI(*settings)


def test_a_map_of_another_size_is_refused():
    q, k, v = qkv(4, 6)
    with pytest.raises(ValueError, match=r"4 \* 5"):
        gri_attention(q, k, v, 4, 5, GRI(2, 1))
    with pytest.raises(ValueError, match="alike"):
        gri_attention(q, k[:, :12], v, 4, 6, GRI(2, 1))
