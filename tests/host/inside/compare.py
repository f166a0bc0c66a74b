"""Comparing and measuring: what is sampled and timed is what KSampler makes, and nothing is left behind."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import comfy.model_management
import comfy.samplers
import folder_paths
import nodes
import pytest
import small
import torch
from comfy_extras import nodes_easycache
from in_host import execute, module, node_classes
from PIL import Image

SD, assignment = small.SD, small.assignment
compare, timing, switch, regional, on_model = (
    module(f"nodes.engine.{name}") for name in ("comparison", "timing", "switch", "regional", "on_model")
)
xy_plot, speed = module("nodes.xy_plot"), module("nodes.speed_readout")
inheritance, measure, switching = (module(f"asdm_core.{name}") for name in ("inheritance", "measure", "switching"))


class VAE:
    """Draws a latent as it is, eight times as large; what is compared here is the sampling."""

    def decode(self, samples):
        rgb = samples[:, :3].movedim(1, -1) / 8 + 0.5
        return rgb.clamp(0, 1).repeat_interleave(8, 1).repeat_interleave(8, 2)

    def vae_encode_crop_pixels(self, pixels):
        return pixels


@pytest.fixture
def model(loaded):
    """A stock MODEL, which must be the same after the test as before."""
    before = state(loaded)
    yield loaded
    assert state(loaded) == before


def state(model):
    return {
        "options": repr(model.model_options),
        "patches": len(model.patches),
        "uuid": model.patches_uuid,
        "wrappers": repr(model.wrappers),
        "callbacks": repr(model.callbacks),
        "attachments": dict(model.attachments),
        "additional": repr(model.additional_models),
    }


INPUTS = {"seed": 5, "steps": 3, "cfg": 3.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}


def inputs(batch=1, latent=None, **changes):
    given = {
        "positive": small.cond(SD, 1),
        "negative": small.cond(SD, 2),
        "latent_image": {"samples": torch.zeros(batch, 4, 16, 16) if latent is None else latent},
    }
    return given | INPUTS | changes


def ksampler(model, **given):
    order = ("seed", "steps", "cfg", "sampler_name", "scheduler", "positive", "negative", "latent_image", "denoise")
    return nodes.KSampler().sample(model, *(given[name] for name in order))[0]["samples"]


def ab(model, original=None, rounds=1, **given):
    outputs = execute("ASDMABCompare", model=model, original=original, vae=VAE(), rounds=rounds, **given)
    return dict(zip(("comparison", "images_a", "images_b", "latent_a", "latent_b"), outputs, strict=False)) | {
        "report": json.loads(outputs[5])
    }


# What is sampled --------------------------------------------------------------------------------------


@pytest.mark.sweep(1)
@pytest.mark.parametrize(
    "run",
    [
        {},
        {"batch": 2},
        {"sampler_name": "heun"},
        {"sampler_name": "euler_ancestral"},
        {"cfg": 1.0},
        {"denoise": 0.5, "latent": torch.ones(1, 4, 16, 16)},
    ],
    ids=str,
)
def test_both_sides_are_what_ksampler_gives(model, m2, run):
    given = inputs(**run)
    packed = small.with_pack(model, m2)
    out = ab(packed, **given)
    assert torch.equal(out["latent_a"]["samples"], ksampler(model, **given))
    assert torch.equal(out["latent_b"]["samples"], ksampler(packed, **given))
    assert torch.equal(out["images_b"], VAE().decode(out["latent_b"]["samples"]))


def test_latents_keep_what_came_with_them(model, m2):
    mask = torch.zeros(1, 1, 128, 128)
    mask[..., 64:] = 1
    given = inputs(latent=torch.randn(1, 4, 16, 16))
    given["latent_image"] |= {"noise_mask": mask}
    out = ab(small.with_pack(model, m2), **given)
    assert out["latent_a"]["noise_mask"] is mask
    assert torch.equal(out["latent_b"]["samples"], ksampler(small.with_pack(model, m2), **given))


def with_everything(model, folder, m2):
    played = small.with_pack(model, m2)
    played = small.with_plan(played, inheritance.dial(SD, "balanced"))
    played = small.with_technique(played, regional.Regional(window=8, pool=4))
    return switch.with_switch(played, small.model(folder, seed=3), switching.SwitchPoint(0.5, "percent"))


def test_original_is_the_model_without_anything_of_asdm(model, folder, m2):
    full = with_everything(model, folder, m2)
    before = state(full)
    plain = compare.original_of(full)
    given = inputs()
    assert torch.equal(ksampler(plain, **given), ksampler(model, **given))
    assert not torch.equal(ksampler(full, **given), ksampler(model, **given))
    assert not any(
        key.startswith("asdm") for kinds in (plain.wrappers, plain.callbacks) for keys in kinds.values() for key in keys
    )
    assert not any(key.startswith("asdm") for things in (plain.attachments, plain.additional_models) for key in things)
    assert state(full) == before


def test_original_keeps_what_others_put_on_the_model(model, m2):
    lora = small.lora()
    with_lora = small.add_lora(model, lora)
    given = inputs()
    plain = compare.original_of(small.add_lora(small.with_pack(model, m2), lora))
    assert torch.equal(ksampler(plain, **given), ksampler(with_lora, **given))


def test_models_with_different_loras_on_one_unet_do_not_mix(model):
    a, b = (small.add_lora(model, small.lora(seed=i)) for i in range(2))
    given = inputs()
    out = ab(b, a, rounds=2, **given)
    assert torch.equal(out["latent_a"]["samples"], ksampler(a, **given))
    assert torch.equal(out["latent_b"]["samples"], ksampler(b, **given))
    assert out["report"]["a"]["every_run_alike"] and out["report"]["b"]["every_run_alike"]


def test_inheritance_is_measured_as_it_runs_alone(model):
    inheriting = small.with_plan(model, inheritance.dial(SD, "fast"))
    given = inputs(steps=9)
    out = ab(inheriting, **given)
    assert torch.equal(out["latent_b"]["samples"], ksampler(inheriting, **given))
    assert not torch.equal(out["latent_a"]["samples"], out["latent_b"]["samples"])


def test_techniques_are_named(model, folder, m2):
    assert compare.techniques(model) == "original"
    assert (
        compare.techniques(with_everything(model, folder, m2)) == "m2 + GRI attention + balanced inheritance + switched"
    )


# What is reported -------------------------------------------------------------------------------------


def test_a_model_against_itself_is_identical(model):
    out = ab(model, model, rounds=2, **inputs())
    report = out["report"]
    assert torch.equal(out["images_a"], out["images_b"])
    assert report["identical"] and report["psnr"] == [None] and report["ssim"] == [pytest.approx(1.0)]
    assert report["a"]["every_run_alike"] and report["b"]["every_run_alike"]
    assert len(report["a"]["seconds"]) == len(report["b"]["seconds"]) == 2
    heat = out["comparison"][0, -40:, -(compare.CELL + 32) : -40]  # bottom right: the difference
    assert float(heat[:-32].max()) == 0


def test_a_model_that_asdm_does_nothing_on_needs_an_original(model):
    for plain in (model, small.add_lora(model, small.lora())):
        with pytest.raises(
            ValueError, match="A and B would be the same. Put Feature Inheritance.* or connect .* to `original`"
        ):
            ab(plain, **inputs())


def test_report_is_about_what_was_made(model, m2):
    out = ab(small.with_pack(model, m2), **inputs(batch=2))
    report = out["report"]
    a, b = (out[name].movedim(-1, 1) for name in ("images_a", "images_b"))
    assert report["psnr"] == pytest.approx(measure.psnr(a, b).tolist())
    assert report["ssim"] == pytest.approx(measure.ssim(a, b).tolist())
    assert report["speedup"] == pytest.approx(report["a"]["median_seconds"] / report["b"]["median_seconds"], rel=0.05)
    assert (report["width"], report["height"], report["batch_size"]) == (128, 128, 2)
    assert report["a"]["label"] == "original" and report["b"]["label"] == "m2"
    assert report["a"]["peak_memory_mb"] is None  # on a CPU nobody can tell the two models' memory apart


@pytest.fixture
def clock(monkeypatch):
    """A clock on which a load takes 100 seconds, one evaluation of the network 1 second, and all else nothing."""
    now = [0.0]
    load = comfy.model_management.load_models_gpu
    evaluate = comfy.samplers.sampling_function

    def taking(seconds, call):
        def slow(*args, **kwargs):
            now[0] += seconds
            return call(*args, **kwargs)

        return slow

    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(comfy.model_management, "load_models_gpu", taking(100, load))
    monkeypatch.setattr(comfy.samplers, "sampling_function", taking(1, evaluate))


def test_time_is_the_samplers_alone(model, m2, clock):
    report = ab(small.with_pack(model, m2), rounds=3, **inputs(steps=4))["report"]
    for side in (report["a"], report["b"]):
        assert side["seconds"] == [4, 4, 4] and side["seconds_per_step"] == 1
        assert side["load_and_compile_seconds"] == 100 + 1 + 100  # a load before each of the two runs of the warm-up
    assert report["speedup"] == 1


def test_sides_take_turns(model):
    order = []

    def sample(name):
        def run(m):
            order.append(name)
            return {"samples": ksampler(m, **inputs(steps=1))}

        return run

    timing.alternate([timing.TimedModel(name, model, sample(name)) for name in "ab"], 2, 3)
    assert "".join(order) == "aabb" + "aabb" * 2  # a look before each run, to load; the first pair is the warm-up


# What is left behind ------------------------------------------------------------------------------------


@pytest.mark.sweep(1)
@pytest.mark.parametrize("after", [1, 2, 5])
def test_an_interrupt_leaves_nothing_behind(model, m2, monkeypatch, after):
    packed = small.with_pack(model, m2)
    before = state(packed)
    plain = small.sample(packed)
    calls = []
    run = comfy.samplers.sampling_function

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) > after:
            raise comfy.model_management.InterruptProcessingException
        return run(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(comfy.samplers, "sampling_function", interrupted)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            ab(packed, **inputs())
    assert state(packed) == before
    assert torch.equal(small.sample(packed), plain)


# Compare Images -----------------------------------------------------------------------------------------


def pictures(count, value, size=(64, 48)):
    return torch.full((count, *size, 3), value)


def shown(**given):
    output = node_classes()["ASDMCompareImages"].execute(**({"labels": "", "title": ""} | given))
    return output.args[0], output.ui["asdm_compare"][0]


def test_batches_are_paired_and_the_last_stands_for_what_is_missing():
    a = torch.cat([pictures(1, v) for v in (0.1, 0.2, 0.3)])
    _, payload = shown(images={"a": a, "b": pictures(1, 0.2)})
    assert [len(batch) for batch in payload["batches"]] == [3, 1]
    assert payload["likeness"]["01"][1] == "identical"
    assert all(payload["likeness"]["01"][i].startswith("PSNR 20.0 dB") for i in (0, 2))


def test_pictures_are_shown_bit_by_bit():
    torch.manual_seed(0)
    a, b = torch.rand(1, 64, 48, 3), torch.rand(1, 64, 48, 3)
    _, payload = shown(images={"a": a, "b": b})
    for batch, image in zip(payload["batches"], (a, b), strict=True):
        entry = batch[0]
        file = Image.open(f"{folder_paths.get_temp_directory()}/{entry['filename']}")
        assert file.tobytes() == compare.from_image(image[0]).tobytes()


@pytest.mark.parametrize("count", [2, 3, 8])
def test_any_number_is_drawn_with_labels(count):
    images = {name.lower(): pictures(2, i / 10) for i, name in enumerate(compare.NAMES[:count])}
    drawn, payload = shown(images=images, labels="first, second", title="A title")
    assert len(payload["batches"]) == count and payload["labels"] == ["first", "second", *[""] * (count - 2)]
    assert set(payload["likeness"]) == {f"{i}{j}" for i in range(count) for j in range(i + 1, count)}
    columns = 3 if count == 2 else count
    assert drawn.shape[2] == columns * (192 + 8) - 8 + 64  # cells of 192 x 256: pictures keep their proportions


def test_pictures_of_other_sizes_are_shown_without_a_difference():
    drawn, payload = shown(images={"a": pictures(1, 0.5), "b": pictures(1, 0.5, (32, 96))})
    assert payload["likeness"]["01"] == ["sizes differ"]
    assert drawn.shape[2] == 2 * (192 + 8) - 8 + 64


def test_a_later_result_has_addresses_of_its_own(monkeypatch):
    """The host counts from 1 again after a restart, and browsers keep what a page has shown under an address."""
    seen = []
    for _ in range(2):
        for file in Path(folder_paths.get_temp_directory()).glob("asdm.compare.*"):
            file.unlink()
        _, payload = shown(images={"a": pictures(1, 0.5), "b": pictures(1, 0.6)})
        seen += [entry["filename"] for batch in payload["batches"] for entry in batch]
    assert len(set(seen)) == 4


def test_a_film_takes_the_memory_of_a_pair_at_a_time(monkeypatch):
    sizes = []
    psnr = compare.measure.psnr
    monkeypatch.setattr(compare.measure, "psnr", lambda a, b: sizes.append(len(a)) or psnr(a, b))
    a, b = torch.rand(9, 32, 32, 3), torch.rand(4, 32, 32, 3)
    found = compare.alike(a, b)
    assert sizes == [1] * 9
    for i, (mine, ssim) in enumerate(found):
        one, other = (t[None, ..., :3].movedim(-1, 1) for t in (a[i], b[min(i, 3)]))
        assert mine == pytest.approx(float(psnr(one, other))) and ssim == pytest.approx(
            float(compare.measure.ssim(one, other))
        )


@pytest.mark.parametrize("shape", [(1, 8, 9, 3), (1, 32, 32, 1)])
def test_tiny_and_grey_pictures_are_shown(shape):
    a = torch.full(shape, 0.5)
    drawn, payload = shown(images={"a": a, "b": a + 0.1})
    assert payload["likeness"]["01"][0].startswith("PSNR 20.0 dB") and drawn.shape[-1] == 3
    assert ("SSIM" in payload["likeness"]["01"][0]) == (shape[1] > 10)


def test_likeness_is_infinite_only_for_equal_pictures():
    a = torch.rand(1, 32, 32, 3)
    ((psnr, ssim),) = compare.alike(a, a)
    assert math.isinf(psnr) and ssim == pytest.approx(1.0)
    ((psnr, _),) = compare.alike(a, (a + 1e-3).clamp(0, 1))
    assert not math.isinf(psnr)


# XY Plot --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def known_pack():
    """A pack where the host looks for packs."""
    node_classes()  # registers the folder
    path = Path(folder_paths.models_dir) / "asdm_packs" / "known.safetensors"
    path.parent.mkdir(exist_ok=True)
    return small.write_pack(path, seed=1)


def xy(model, x, y, **given):
    given = inputs(**given)
    plot, images, report = execute(
        "ASDMXYPlot", model=model, vae=VAE(), rounds=1, x={"x": x[0], **x[1]}, y={"y": y[0], **y[1]}, **given
    )
    return plot, images, json.loads(report), given


NOTHING: tuple[str, dict] = ("nothing", {})


def test_cells_are_what_the_nodes_give(model, known_pack):
    packs = ("pack", {"values": "off, known"})
    plans = ("inheritance", {"values": "off\n1/2\n" + inheritance.dial(SD, "fast").to_json()})
    _, images, report, given = xy(model, plans, packs, steps=4)
    expected = []
    for base in (model, small.with_pack(model, known_pack)):
        branch = inheritance.deepcache(SD, 1, inheritance.Schedule(interval=2)).reusing("forecast")
        for changed in (base, small.with_plan(base, branch), small.with_plan(base, inheritance.dial(SD, "fast"))):
            expected.append(VAE().decode(ksampler(changed, **given)))
    assert torch.equal(images, torch.cat(expected))
    labels = [cell["label"] for cell in report["cells"]]
    assert (
        labels[:2] == ["inheritance: off, pack: off", "inheritance: 1/2, pack: off"]
        and labels[5] == "inheritance: fast, pack: known"
    )
    # What changes nothing is the reference, at 1.00.
    assert report["cells"][0]["speedup"] == 1 and report["cells"][0]["seconds"] == report["plain"]["seconds"]
    assert report["cells"][0]["psnr"] == [None] and report["cells"][4]["psnr"] != [None]
    for cell in report["cells"]:
        assert cell["speedup"] == pytest.approx(report["plain"]["median_seconds"] / cell["median_seconds"], rel=0.05)


@pytest.mark.parametrize(
    "axis, value",
    [
        *(("pack strength", v) for v in ("nan", "inf", "-0.1", "2.1", "1e999", "two", "9" * 5000)),
        *(("pack window", v) for v in ("nan-1", "0-inf", "-0.5-1", "0.5-0.5", "0-1.5", "0.5")),
        *(("GRI window", v) for v in ("nan", "8.5", "-8", "1025", "inf", "\u00b2")),
        *(("switch at", v) for v in ("nan", "inf", "-1", "1.5", "1e9")),
        *(("inheritance", v) for v in ("0/0", "-1/2", "99/2", "\u00b2/3", "0/1.5", "0/" + "9" * 5000, '{"format": 1}')),
    ],
)
def test_values_are_checked_as_the_nodes_would_before_the_first_cell(
    model, folder, known_pack, monkeypatch, axis, value
):
    monkeypatch.setattr(xy_plot, "alternate", lambda *args: pytest.fail("a cell was sampled"))
    settings = {"values": f"{value}\n{value}"}
    if axis.startswith("pack "):
        settings["pack_name"] = "known.safetensors"
    if axis == "switch at":
        settings |= {"model_second": model, "unit": "percent"}
    with pytest.raises(ValueError) as e:
        xy(model, (axis, settings), NOTHING)
    assert len(str(e.value)) < 1000


def test_strength_and_window_of_one_pack_are_played_together(model, folder, monkeypatch):
    experts = small.write_experts(
        Path(folder_paths.models_dir) / "asdm_packs" / "experts.safetensors",
        small.condconv.CondConv(dict.fromkeys(list(small.condconv.convolutions(SD))[:4], 2)),
        scale=0.2,
    )
    strengths = ("pack strength", {"values": "0, 0.5, 1", "pack_name": experts.name})
    windows = ("pack window", {"values": "0-1, 0-0.5", "pack_name": experts.name})
    _, images, _, given = xy(model, strengths, windows, steps=4)
    expected = [
        VAE().decode(ksampler(small.with_pack(model, experts, 0.0, end, strength), **given))
        for end in (1.0, 0.5)
        for strength in (0.0, 0.5, 1.0)
    ]
    assert torch.equal(images, torch.cat(expected))
    assert torch.equal(expected[0], expected[3]) and len({e.sum().item() for e in expected}) == 5
    monkeypatch.setattr(xy_plot, "alternate", lambda *args: pytest.fail("a cell was sampled"))
    with pytest.raises(ValueError, match="experts.safetensors plays on this MODEL already.*before Apply Pack"):
        xy(small.with_pack(model, experts), windows, NOTHING)


def test_too_many_cells_are_refused_before_the_first(model, monkeypatch):
    monkeypatch.setattr(xy_plot, "alternate", lambda *args: pytest.fail("a cell was sampled"))
    many = ("GRI window", {"values": ",".join(["8"] * 21)})
    with pytest.raises(ValueError, match="21 by 20 values make 420 cells.*at most 400"):
        xy(model, many, ("inheritance", {"values": ",".join(["0/3"] * 20)}))


@pytest.mark.sweep(0)
@pytest.mark.parametrize("swapped", [False, True])
def test_speed_up_is_that_of_the_node_beside_any_other_axis(model, swapped):
    """GRI as its own axis says, also where Speed Up would add it; off is the model as it came in."""
    axes = [("speed up", {"values": "off, close"}), ("GRI window", {"values": "off, 2"})]
    _, images, report, given = xy(model, *(axes[::-1] if swapped else axes), steps=12)
    sped = on_model.without_technique(*execute("ASDMSpeedUp", model=model, likeness="close"), regional.Regional)
    regions = [on_model.with_technique(m, regional.Regional(2)) for m in (model, sped)]
    cells = [model, sped, *regions] if not swapped else [model, regions[0], sped, regions[1]]
    pictures = [VAE().decode(ksampler(m, **given)) for m in cells]
    assert torch.equal(images, torch.cat(pictures))
    assert not torch.equal(pictures[0], pictures[2 if swapped else 1])  # steps were left out
    assert report["cells"][0]["speedup"] == 1 and report["cells"][0]["psnr"] == [None]


@pytest.mark.sweep(1)
@pytest.mark.parametrize("swapped", [False, True])
def test_a_switch_comes_after_everything_else(model, folder, swapped):
    second = small.model(folder, seed=3)
    axes = [
        ("inheritance", {"values": "balanced"}),
        ("switch at", {"values": "0.5", "model_second": second, "unit": "percent"}),
    ]
    _, images, _, given = xy(model, *(axes[::-1] if swapped else axes), steps=4)
    played = switch.with_switch(
        small.with_plan(model, inheritance.dial(SD, "balanced")), second, switching.SwitchPoint(0.5, "percent")
    )
    assert torch.equal(images, VAE().decode(ksampler(played, **given)))


def test_each_cell_is_timed_as_a_side_of_ab_compare(model, known_pack, clock):
    _, _, report, _ = xy(model, ("pack", {"values": "off, known.safetensors"}), NOTHING, steps=2)
    for side in (report["plain"], *report["cells"]):
        assert side["seconds"] == [2] and side["load_and_compile_seconds"] == 100 + 1 + 100


def test_cells_that_switch_share_one_copy_of_the_second_model(model):
    second = small.add_lora(model, small.lora())
    copies = []
    load, arguments = second.cached_patcher_init
    second.cached_patcher_init = (lambda *args, **kwargs: copies.append(1) or load(*args, **kwargs), arguments)
    _, images, _, given = xy(model, ("switch at", {"values": "1, 2", "model_second": second, "unit": "step"}), NOTHING)
    assert len(copies) == 1
    played = (switch.with_switch(model, second, switching.SwitchPoint(at, "step")) for at in (1, 2))
    assert torch.equal(images, torch.cat([VAE().decode(ksampler(m, **given)) for m in played]))


def test_windows_and_strengths_of_packs(model, known_pack):
    window = ("pack window", {"pack_name": "known.safetensors", "values": "0-1, 0.5-1"})
    _, images, _, given = xy(model, window, NOTHING, steps=2)
    expected = [VAE().decode(ksampler(small.with_pack(model, known_pack, *w), **given)) for w in ((0, 1), (0.5, 1))]
    assert torch.equal(images, torch.cat(expected))
    with pytest.raises(ValueError, match="nothing that could be played in part"):
        xy(model, ("pack strength", {"pack_name": "known.safetensors", "values": "0.5"}), NOTHING)


@pytest.mark.parametrize(
    "kind, values, said",
    [
        ("inheritance", "slow", "wanted off, faithful, balanced, fast, a skip branch and an interval"),
        ("pack", "no-such.safetensors", "there is no pack 'no-such.safetensors'. There are .*known"),
        ("speed up", "very close", "speed up: wanted off, same to the eye, close, same motif, .*got 'very close'"),
        ("GRI window", "large", "GRI window: wanted a whole number from 0 to 1024, got 'large'"),
        ("inheritance", " , ", "needs at least one value"),
    ],
)
def test_a_wrong_value_is_one_clear_error(model, kind, values, said):
    with pytest.raises(ValueError, match=said):
        xy(model, (kind, {"values": values}), NOTHING)


# Measure Speed and Speed Readout ----------------------------------------------------------------------------


def measured(model, **given):
    timed = small.with_speed(model)
    result = ksampler(timed, **inputs(**given))
    return result, timed


@pytest.mark.sweep(1)
@pytest.mark.parametrize("plan", [None, "fast"])
@pytest.mark.parametrize("packed", [False, True])
def test_measuring_changes_no_bit(model, m2, plan, packed):
    played = small.with_pack(model, m2) if packed else model
    played = small.with_plan(played, inheritance.dial(SD, plan)) if plan else played
    result, timed = measured(played, steps=8)
    assert torch.equal(result, ksampler(played, **inputs(steps=8)))
    facts = speed.describe(timed)
    assert facts["steps"] == 8 and len(facts["step_seconds"]) == 8
    assert facts["inherited_steps"] == ([6] if plan else [])
    units = [u for u in small.addresses.walk(SD) if u.side in ("down", "mid", "up")]
    assert {a for a, _ in small.last_times(timed).layers} == {u.address for u in units}
    inside = sum(sum(kinds.values()) for kinds in facts["groups"].values())
    assert inside + facts["outside_layers"] == pytest.approx(facts["seconds"], rel=0.01)


def test_nothing_is_measured_when_off(model, monkeypatch):
    made = []
    monkeypatch.setattr(small.layer_times, "Recorder", lambda *_: made.append(1))
    small.sample(small.with_plan(model, inheritance.dial(SD, "balanced")))
    assert not made and small.last_times(model) is None


def times(inherited=(), layers=None):
    """Ten evaluations of a second each, a tenth where inherited; layers: see Times."""
    marks = inherited or [False] * 10
    evaluations = [(i, 0.1 if mark else 1.0, frozenset(["inherited"] * mark)) for i, mark in enumerate(marks)]
    return small.layer_times.LayerTimes((1, 4, 64, 64), evaluations, layers or {})


def test_inheritance_saves_what_its_steps_are_shorter(model):
    model = small.with_plan(model, inheritance.dial(SD, "balanced"))
    saved = speed.savings(model, times([i % 2 == 1 for i in range(10)]))
    assert saved == [("feature inheritance", pytest.approx(5 * 0.9), "measured")]
    assert speed.savings(model, times()) == []


def test_speed_up_saves_what_is_not_computed_and_leaves_inheritance_its_own(model):
    both = small.with_plan(execute("ASDMSpeedUp", model=model, likeness="close")[0], inheritance.dial(SD, "balanced"))
    seconds = {"": 1.0, "inherited": 0.4, "forecast": 0.1}
    roles = ["", "", "inherited", "forecast", "", "inherited forecast", "forecast"]
    evaluations = [(i, seconds[r.split(" ")[-1]], frozenset(r.split())) for i, r in enumerate(roles)]
    found = speed.savings(both, small.layer_times.LayerTimes((1, 4, 64, 64), evaluations, {}))
    expected = {"Speed Up": pytest.approx(2 * 0.9), "feature inheritance": pytest.approx(0.6)}
    assert {name: saved for name, saved, how in found if how == "measured"} == expected


def test_the_readout_of_a_run_with_speed_up_names_the_steps_that_it_left_out(model):
    (sped,) = execute("ASDMSpeedUp", model=model, likeness="same motif")
    result, timed = measured(sped, steps=12)
    assert torch.equal(result, ksampler(sped, **inputs(steps=12)))
    facts = speed.describe(timed)
    assert facts["steps"] == 12 and facts["forecast_steps"] and not facts["inherited_steps"]
    assert [entry["technique"] for entry in facts["saved"]] == ["Speed Up"]
    picture, _ = execute("ASDMSpeedReadout", model=timed)
    assert picture.shape[2] == 540


@pytest.mark.parametrize("first", [True, False])
def test_steps_that_another_node_left_out_are_no_measure_of_a_full_one(model, first):
    def beside(m):
        return nodes_easycache.EasyCacheNode.execute(m, 0.5, 0.1, 1.0, False)[0]

    plan = inheritance.deepcache(SD, 1, inheritance.Schedule(interval=3))
    _, timed = measured(
        small.with_plan(beside(model), plan) if first else beside(small.with_plan(model, plan)), steps=12
    )
    facts, run = speed.describe(timed), small.last_times(timed)
    left, inherited = facts["left_out_steps"], facts["inherited_steps"]
    assert left and inherited and not set(left) & set(inherited)
    evaluations = [
        (i, 0.001 if i in left else 0.4 if i in inherited else 1.0, roles) for i, _, roles in run.evaluations
    ]
    found = speed.savings(timed, small.layer_times.LayerTimes(run.shape, evaluations, {}))
    assert found == [("feature inheritance", pytest.approx(len(inherited) * 0.6), "measured")]
    assert execute("ASDMSpeedReadout", model=timed)[0].shape[2] == 540


def test_cut_layers_save_what_their_kind_would_have_taken(model, m2):
    macs = {a: c.total for a, c in measure.costs(small.Architecture.full(SD), 64, 64).items()}
    resnets = [u.address for u in small.addresses.walk(SD) if u.kind == "resnet"]
    cut = resnets[0]
    played = resnets[1:]
    layers = {(a, "played"): (macs[a] * 1e-9 * 10, 10) for a in played} | {(cut, "cut"): (0.0, 10)}
    found = speed.savings(small.with_pack(model, m2), times(layers=layers))
    assert found == [("layers cut (m2)", pytest.approx(macs[cut] * 1e-8), "estimated")]


def test_gri_leaves_out_what_lies_outside_windows_and_cells():
    whole = small.Architecture.full(SD)
    shares = {
        window: sum(regional.Regional(window=window, pool=4).left_out(whole, 64, 64).values()) for window in (8, 16, 64)
    }
    assert shares[8] > shares[16] > 0
    left = regional.Regional(window=16, pool=4, stages=1).left_out(whole, 64, 64)
    m2 = small.Architecture.preset("m2", SD)
    kept = regional.Regional(window=16, pool=4, stages=1).left_out(m2, 64, 64)
    assert kept == {address: left[address] for address in left.keys() - m2.cut} and len(kept) < len(left)
    product = measure.costs(whole, 64, 64)["down.0.0.transformer"].attention["attn1"]
    assert left["down.0.0.transformer"] == pytest.approx(product * (1 - (256 + (4096 - 256) / 16) / 4096))


def test_gri_saves_time_only_in_the_part_of_the_run_where_it_plays(model):
    settings = regional.Regional(window=8, pool=4, stages=1, when=assignment.Window(0.5, 1))
    half = small.with_technique(model, settings)
    _, timed = measured(half, steps=4)
    address = "down.0.0.transformer"
    layers = small.last_times(timed).layers
    assert layers[address, "regional"][1] + layers[address, "played"][1] == 4
    whole = small.Architecture.full(SD)
    macs = measure.costs(whole, 64, 64)[address].total
    left = settings.left_out(whole, 64, 64)[address]
    layers = {(address, "played"): (3 * macs, 3), (address, "regional"): (macs - left, 1)}
    found = speed.savings(half, times(layers=layers))
    assert found == [("GRI attention", pytest.approx(left), "estimated")]


def test_a_readout_is_drawn_and_says_what_is_missing(model, m2):
    with pytest.raises(ValueError, match="Put Measure Speed between it and the sampler"):
        execute("ASDMSpeedReadout", model=model)
    with pytest.raises(ValueError, match="Connect the sampler's LATENT to `after`"):
        execute("ASDMSpeedReadout", model=small.with_speed(model))
    _, timed = measured(small.with_plan(small.with_pack(model, m2), inheritance.dial(SD, "balanced")), steps=8)
    picture, text = execute("ASDMSpeedReadout", model=timed)
    assert picture.shape[2] == 540 and float(picture.min()) < 0.3
    assert [entry["technique"] for entry in json.loads(text)["saved"]] == ["feature inheritance", "layers cut (m2)"]


def test_both_models_of_a_switched_run_are_measured(model, m2):
    second = small.with_plan(small.with_pack(model, m2), inheritance.dial(SD, "balanced"))
    switched = switch.with_switch(model, second, switch.SwitchPoint(4, "step"))
    (timed,) = execute("ASDMMeasureSpeed", model=switched)
    assert torch.equal(ksampler(timed, **inputs(steps=12)), ksampler(switched, **inputs(steps=12)))
    facts = speed.describe(timed)
    assert facts["played"] == [1] * 4 + [2] * 8 and facts["steps"] == facts["evaluations"] == 12
    assert facts["inherited_steps"] and min(facts["inherited_steps"]) > 4
    assert [entry["technique"] for entry in facts["saved"]] == [
        "model 2: feature inheritance",
        "model 2: layers cut (m2)",
    ]
    assert execute("ASDMSpeedReadout", model=timed)[0].shape[2] == 540
    assert small.last_times(second) is None


def test_a_run_that_was_interrupted_leaves_no_half_record(model, monkeypatch):
    timed = small.with_speed(model)

    def stop(*_, **__):
        raise comfy.model_management.InterruptProcessingException

    with monkeypatch.context() as patch:
        patch.setattr(comfy.samplers, "sampling_function", stop)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            small.sample(timed)
    with pytest.raises(ValueError, match="no finished run"):
        speed.describe(timed)
