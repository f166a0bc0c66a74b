"""Costs against the published tables, against an operation counter and by hand; picture quality against numpy."""

import math

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from asdm_core.addresses import UNetConfig, walk
from asdm_core.architecture import FAMILIES, Architecture
from asdm_core.measure import PARTS, costs, output_size, psnr, ratio, ssim, time_alternating, total

SD15, SDXL = Architecture.full(FAMILIES["sd15"]), Architecture.full(FAMILIES["sdxl"])


def printed(value, like, unit):
    """`value` in millions (M) or billions (G), with as many digits as `like` has."""
    digits = len(like.partition(".")[2])
    return f"{value / {'M': 1e6, 'G': 1e9}[unit]:.{digits}f}"


# The published numbers: thop counts convolutions and linear layers, "total" adds the attention products.
WHOLE = """
full  859.52   338.61  401.64
base  579.385  223.67  261.50
small 482.347  217.65  255.45
tiny  323.385  204.95  242.75
m1    848.79   302.04  343.19
m2    809.51   265.40  303.66
m3    659.69   228.60  266.43
"""


@pytest.mark.parametrize("row", WHOLE.split("\n")[1:-1])
def test_sd15_students_cost_what_the_papers_print(row):
    name, params, linear, whole = row.split()
    architecture = SD15 if name == "full" else Architecture.preset(name)
    cost = total(costs(architecture))
    assert printed(cost.params, params, "M") == params
    assert printed(cost.linear, linear, "G") == linear
    assert printed(cost.total, whole, "G") == whole
    assert cost.params == architecture.params


@pytest.mark.parametrize(
    ("name", "params", "whole"),
    [
        ("full", "2567.46", "3380.6"),
        ("ssd-1b", "1331.33", "2103.9"),
        ("vega", "745.23", "1411.2"),
        ("koala-1b", "1161.18", "1715.9"),
        ("koala-700m", "782.82", "1350.8"),
    ],
)
def test_sdxl_students_cost_what_their_authors_print(name, params, whole):
    cost = total(costs(SDXL if name == "full" else Architecture.preset(name), 128, 128))
    assert printed(cost.params, params, "M") == params
    assert printed(cost.total, whole, "G") == whole


@pytest.mark.parametrize(("name", "saved"), [("m1", "14.6"), ("m2", "24.4"), ("m3", "33.7")])
def test_combined_unets_save_what_the_paper_prints(name, saved):
    cost = total(costs(Architecture.preset(name)))
    whole = total(costs(SD15))
    assert f"{100 * (1 - cost.total / whole.total):.1f}" == saved


# block: params M, conv+lin G, attention G, total G, then resnet attn1 attn2 ff proj sampler G ("-": has none)
BLOCKS = """
down.0 10.52  32.90  21.88 54.78  15.10  24.83 2.16  10.07 1.68  0.94
down.1 36.82  31.30  2.89  34.18  13.42  6.04  2.03  10.07 1.68  0.94
down.2 139.99 31.45  0.44  31.89  13.43  3.69  2.08  10.07 1.68  0.94
down.3 62.28  3.78   0     3.78   3.78   -     -     -     -     -
mid    97.04  6.03   0.02  6.05   3.78   0.43  0.37  1.26  0.21  -
up.0   162.24 12.90  0     12.90  9.13   -     -     -     -     3.77
up.1   258.33 75.12  0.65  75.77  34.40  5.54  3.12  15.10 2.52  15.10
up.2   71.41  79.08  4.33  83.41  38.59  9.06  3.05  15.10 2.52  15.10
up.3   18.81  65.97  32.82 98.78  40.69  37.25 3.24  15.10 2.52  -
stem   2.07   0.10   0     0.10   -      -     -     -     -     -
total  859.52 338.61 63.03 401.64 172.31 86.83 16.05 76.76 12.79 36.81
"""


@pytest.mark.parametrize("row", BLOCKS.split("\n")[1:-1])
def test_sd15_blocks_cost_what_the_table_says(row):
    block, params, linear, products, whole, *parts = row.split()
    cost = total({a: c for a, c in costs(SD15).items() if block == "total" or a.startswith(f"{block}.")})
    assert printed(cost.params, params, "M") == params
    for value, wanted in ((cost.linear, linear), (cost.products, products), (cost.total, whole)):
        assert printed(value, wanted, "G") == wanted
    for part, wanted in zip(PARTS, parts, strict=False):
        if wanted == "-":
            assert cost.part(part) == 0
        else:
            assert printed(cost.part(part), wanted, "G") == wanted


# units: params M, total G of each
UNITS = """
down.0.0.resnet|down.0.1.resnet             2.255  7.55
down.0.0.transformer|down.0.1.transformer   2.546  19.37
down.1.0.resnet                             6.558  5.87
down.1.1.resnet                             8.196  7.55
down.1.0.transformer|down.1.1.transformer   9.188  9.91
down.2.0.resnet                             24.585 5.87
down.2.1.resnet                             31.139 7.55
down.2.0.transformer|down.2.1.transformer   34.761 8.76
down.3.0.resnet|down.3.1.resnet             31.139 1.89
mid.0.resnet|mid.1.resnet                   31.139 1.89
mid.0.transformer                           34.761 2.27
up.0.0.resnet|up.0.1.resnet|up.0.2.resnet   49.165 3.04
up.0.sampler                                14.747 3.77
up.1.0.resnet|up.1.1.resnet                 49.165 12.17
up.1.2.resnet                               40.972 10.07
up.1.0.transformer|up.1.2.transformer       34.761 8.76
up.1.sampler                                14.747 15.10
up.2.0.resnet                               16.801 16.36
up.2.1.resnet                               12.704 12.16
up.2.2.resnet                               10.655 10.07
up.2.0.transformer|up.2.2.transformer       9.188  9.91
up.2.sampler                                3.687  15.10
up.3.0.resnet                               4.407  16.36
up.3.1.resnet|up.3.2.resnet                 3.382  12.16
up.3.0.transformer|up.3.2.transformer       2.546  19.37
down.0.sampler                              0.922  0.94
down.1.sampler                              3.687  0.94
down.2.sampler                              14.747 0.94
"""


@pytest.mark.parametrize("row", UNITS.split("\n")[1:-1])
def test_sd15_units_cost_what_the_table_says(row):
    addresses, params, whole = row.split()
    table = costs(SD15)
    for address in addresses.split("|"):
        assert printed(table[address].params, params, "M") == params
        assert printed(table[address].total, whole, "G") == whole


def test_parts_are_the_whole():
    for architecture in (SD15, SDXL, Architecture.preset("m2"), Architecture.preset("ssd-1b")):
        table = costs(architecture, 40, 24)
        assert list(table) == [u.address for u in architecture.kept]
        for address, cost in table.items():
            assert cost.address == address
            assert sum(cost.part(p) for p in PARTS) == cost.total == cost.linear + cost.products
        assert sum(c.total for c in table.values()) == total(table).total


SMALL = UNetConfig("small", 32, (1, 2), ((1,), (0,)), -2, ((0, 0), (1, 1)), context_dim=48, num_heads=4)


def test_odd_sizes_by_hand():
    # A latent of 5 x 3 is halved to 3 x 2 and comes back as 5 x 3: 15 and 6 positions.
    table = costs(Architecture.full(SMALL), 5, 3, tokens=7)
    macs = {a: c.linear for a, c in table.items()}
    conv = 9
    assert macs["stem.time_embed"] == 32 * 128 + 128 * 128
    assert macs["stem.conv_in"] == 4 * 32 * conv * 15
    assert macs["down.0.0.resnet"] == 2 * 32 * 32 * conv * 15 + 128 * 32
    assert macs["down.0.sampler"] == 32 * 32 * conv * 6
    assert macs["down.1.0.resnet"] == (32 * 64 + 64 * 64) * conv * 6 + 128 * 64 + 32 * 64 * 6
    assert macs["up.0.0.resnet"] == (128 * 64 + 64 * 64) * conv * 6 + 128 * 64 + 128 * 64 * 6
    assert macs["up.0.1.resnet"] == (96 * 64 + 64 * 64) * conv * 6 + 128 * 64 + 96 * 64 * 6
    assert macs["up.0.sampler"] == 64 * 64 * conv * 15
    assert macs["up.1.0.resnet"] == (96 * 32 + 32 * 32) * conv * 15 + 128 * 32 + 96 * 32 * 15
    assert macs["stem.norm_out"] == 0
    assert macs["stem.conv_out"] == 32 * 4 * conv * 15
    transformer = table["up.1.1.transformer"]
    assert transformer.macs == {
        "proj": 2 * 32 * 32 * 15,
        "attn1": 4 * 32 * 32 * 15,
        "attn2": 2 * 32 * 32 * 15 + 2 * 48 * 32 * 7,
        "ff": (32 * 256 + 128 * 32) * 15,
    }
    assert transformer.attention == {"attn1": 2 * 15 * 15 * 32, "attn2": 2 * 15 * 7 * 32}


def positions(cost, channels):
    """At how many places a transformer works, read off its projections of channels x channels."""
    return cost.macs["proj"] / (2 * channels**2)


@pytest.mark.parametrize("height, width", [(16, 16), (15, 16), (9, 7), (1, 1)])
def test_the_size_that_units_make_is_that_of_the_layers_themselves(height, width):
    x = torch.zeros(1, 2, height, width)
    wanted = 2 * height - 1, 2 * width
    made = {
        "downsampler": torch.nn.Conv2d(2, 2, 3, stride=2, padding=1)(x),
        "upsampler": torch.nn.functional.interpolate(x, wanted),
    }
    for u in walk(FAMILIES["sd15"]):
        size = output_size(u, False, (height, width), wanted if u.kind == "upsampler" else None)
        assert size == (tuple(made[u.kind].shape[2:]) if u.kind in made else (height, width))
        assert output_size(u, True, (height, width), wanted) == (height, width)  # the input is passed on
        if u.kind == "upsampler":
            assert output_size(u, False, (height, width)) == tuple(
                torch.nn.functional.interpolate(x, scale_factor=2).shape[2:]
            )


def test_tiny_keeps_the_size_where_its_samplers_are_cut():
    # 65 x 63 is halved twice, 33 x 32 and 17 x 16, and no third time.
    table = costs(Architecture.preset("tiny"), 65, 63)
    assert positions(table["down.2.0.transformer"], 1280) == 17 * 16
    assert positions(table["up.1.0.transformer"], 1280) == positions(table["up.1.2.transformer"], 1280) == 17 * 16
    assert table["up.1.sampler"].linear == 1280 * 1280 * 9 * 33 * 32
    assert table["up.2.sampler"].linear == 640 * 640 * 9 * 65 * 63
    assert positions(table["up.3.2.transformer"], 320) == 65 * 63
    assert "down.2.sampler" not in table and "up.0.sampler" not in table


NARROW = {
    name: UNetConfig.from_dict(FAMILIES[name].to_dict() | {"model_channels": 64, "context_dim": 40})
    for name in ("sd15", "sd21", "sdxl")
}


@pytest.mark.parametrize(
    ("family", "preset", "height", "width", "tokens"),
    [
        ("sd15", None, 33, 31, 5),
        ("sd15", "tiny", 19, 9, 77),
        ("sd21", "base", 13, 21, 154),
        ("sdxl", "vega", 17, 9, 9),
    ],
)
def test_an_operation_counter_finds_the_same_numbers(family, preset, height, width, tokens):
    config = NARROW[family]
    architecture = Architecture.preset(preset, config) if preset else Architecture.full(config)
    with torch.device("meta"):
        unet = UNet2DConditionModel(**architecture.renumbered.config.to_diffusers())
        extra = None
        if config.adm_channels:
            extra = {"text_embeds": torch.zeros(1, config.adm_channels - 6 * 256), "time_ids": torch.zeros(1, 6)}
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            unet(torch.zeros(1, 4, height, width), torch.zeros(1), torch.zeros(1, tokens, 40), added_cond_kwargs=extra)
    cost = total(costs(architecture, height, width, tokens))
    assert cost.params == sum(p.numel() for p in unet.parameters())
    assert counter.get_total_flops() == 2 * cost.total


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from(["sd15", "sdxl", "emoji"]))
def test_width_and_height_are_interchangeable(height, width, family):
    architecture = Architecture.full(FAMILIES[family])
    assert costs(architecture, height, width) == costs(architecture, width, height)


def test_a_cut_block_costs_nothing_and_leaves_its_transformer():
    cut = Architecture(SDXL.config, frozenset({"mid.0.transformer.3"}))
    whole, less = costs(SDXL, 32, 32)["mid.0.transformer"], costs(cut, 32, 32)["mid.0.transformer"]
    assert less.macs["ff"] * 10 == whole.macs["ff"] * 9
    assert less.attention["attn1"] * 10 == whole.attention["attn1"] * 9
    assert less.macs["proj"] == whole.macs["proj"]


def test_every_unit_of_every_family_has_a_cost():
    for config in FAMILIES.values():
        assert set(costs(Architecture.full(config), 8, 8)) == {u.address for u in walk(config)}


# Time -----------------------------------------------------------------------------------------------


def test_things_are_timed_in_turn():
    calls = []
    times = time_alternating({n: lambda n=n: calls.append(n) for n in "abc"}, rounds=3, warmup=2)
    assert calls == list("abc" * 5)
    assert {n: len(t) for n, t in times.items()} == {"a": 3, "b": 3, "c": 3}
    assert all(t >= 0 for n in times for t in times[n])


def test_the_device_is_waited_for_before_and_after_each_call():
    calls = []
    time_alternating(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")},
        rounds=1,
        warmup=1,
        sync=lambda: calls.append("|"),
    )
    assert calls == list("|a||b||a||b|")


def test_warm_up_rounds_are_not_in_the_times():
    for warmup in (0, 3):
        assert len(time_alternating({"a": int}, rounds=4, warmup=warmup)["a"]) == 4


def test_any_clock_can_be_read():
    now = iter(range(0, 100, 7))
    assert time_alternating({"a": int, "b": int}, rounds=2, warmup=0, clock=lambda: next(now)) == {
        "a": [7, 7],
        "b": [7, 7],
    }


def test_ratio_compares_within_a_round():
    # The machine slows down threefold in the last two rounds; within each round `new` takes half or a quarter.
    times = {"old": [1.0, 1.0, 3.0, 3.0, 3.0], "new": [0.5, 0.25, 1.5, 1.5, 0.75]}
    assert ratio(times, "new", "old") == 0.5
    assert ratio(times, "old", "new") == 2.0
    assert ratio(times, "old", "old") == 1.0


def test_ratio_wants_as_many_rounds_of_both():
    with pytest.raises(ValueError):
        ratio({"a": [1.0], "b": [1.0, 2.0]}, "a", "b")


# Pictures -------------------------------------------------------------------------------------------


def pictures(n, height, width, seed):
    return torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(seed))


def plain_ssim(a, b):
    """SSIM of two pictures (C, H, W), window by window."""
    place = np.arange(11) - 5
    window = np.exp(-(place[:, None] ** 2 + place[None, :] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    values = []
    for x, y in zip(a.double().numpy(), b.double().numpy(), strict=True):
        for i in range(x.shape[0] - 10):
            for j in range(x.shape[1] - 10):
                p, q = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
                mp, mq = (window * p).sum(), (window * q).sum()
                vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
                cov = (window * (p - mp) * (q - mq)).sum()
                values.append((2 * mp * mq + 1e-4) * (2 * cov + 9e-4) / ((mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4)))
    return np.mean(values)


def test_equal_pictures():
    a = pictures(2, 16, 12, 0)
    assert psnr(a, a).tolist() == [math.inf, math.inf]
    assert ssim(a, a.clone()).tolist() == pytest.approx([1, 1], abs=1e-12)


def test_psnr_of_known_differences():
    a = torch.zeros(3, 3, 4, 4)
    b = torch.stack([torch.full((3, 4, 4), v) for v in (0.1, 1.0, 0.5)])
    assert psnr(a, b).tolist() == pytest.approx([20.0, 0.0, 20 * math.log10(2)], abs=1e-5)


def test_psnr_equals_numpy():
    a, b = pictures(3, 9, 7, 1), pictures(3, 9, 7, 2)
    wanted = [
        10 * math.log10(1 / np.mean((x - y) ** 2)) for x, y in zip(a.double().numpy(), b.double().numpy(), strict=True)
    ]
    assert psnr(a, b).tolist() == pytest.approx(wanted, rel=1e-12)


def test_ssim_equals_a_window_by_window_count():
    a = pictures(3, 15, 12, 3)
    b = torch.stack([a[0] * 0.9 + 0.05, (a[1] + 0.1 * pictures(1, 15, 12, 4)[0]).clamp(0, 1), 1 - a[2]])
    wanted = [plain_ssim(x, y) for x, y in zip(a, b, strict=True)]
    assert ssim(a, b).tolist() == pytest.approx(wanted, rel=1e-9)
    assert wanted[2] < 0 < wanted[1] < wanted[0] < 1


def test_ssim_of_flat_pictures_is_the_luminance_term():
    a, b = torch.full((1, 3, 11, 11), 0.25), torch.full((1, 3, 11, 11), 0.75)
    assert ssim(a, b).item() == pytest.approx((2 * 0.25 * 0.75 + 1e-4) / (0.25**2 + 0.75**2 + 1e-4), rel=1e-9)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(11, 20), st.integers(11, 20))
def test_quality_does_not_depend_on_the_order(seed, height, width):
    a = pictures(2, height, width, seed)
    b = pictures(2, height, width, seed + 1)
    assert torch.equal(psnr(a, b), psnr(b, a))
    assert torch.allclose(ssim(a, b), ssim(b, a), rtol=1e-12)
    assert (ssim(a, b) < 1).all()


@pytest.mark.parametrize("measure", [psnr, ssim])
@pytest.mark.parametrize(
    ("a", "b"), [((1, 3, 12, 12), (1, 3, 12, 13)), ((2, 3, 12, 12), (1, 3, 12, 12)), ((3, 12, 12), (3, 12, 12))]
)
def test_pictures_of_other_shapes_are_refused(measure, a, b):
    with pytest.raises(ValueError, match=r"two batches of pictures \(N, C, H, W\) of one shape"):
        measure(torch.zeros(a), torch.zeros(b))


def test_ssim_refuses_pictures_smaller_than_its_window():
    with pytest.raises(ValueError, match="at least 11 x 11 pixels, got 10 x 30"):
        ssim(torch.zeros(1, 3, 30, 10), torch.zeros(1, 3, 30, 10))
    assert ssim(torch.zeros(1, 3, 11, 11), torch.zeros(1, 3, 11, 11)).item() == 1
