"""UNet files of every form load to the same MODEL, and what is saved loads again, in stock ComfyUI too."""

import json
import os
import re
from dataclasses import replace

import comfy.lora
import comfy.model_base
import comfy.model_detection
import comfy.sd
import comfy.utils
import folder_paths
import pytest
import small
import torch
from comfy_extras import nodes_model_advanced, nodes_model_merging
from in_host import execute, node_classes
from in_host import module as in_pack
from safetensors.torch import load_file, save_file

SD, SD2, SDXL = small.SD, small.SD2, small.SDXL
Architecture = small.Architecture
Form = small.surgery.Form
surgery = small.surgery
packs, tensor_file = small.packs, in_pack("asdm_core.tensor_file")
models = small.models
Type = comfy.model_base.ModelType
files, switch = in_pack("nodes.engine.files"), in_pack("nodes.engine.switch")


def chosen_for(preset, config=SD):
    return Architecture.preset(preset, config) if preset else Architecture.full(config)


def tensors(preset, config=SD, layout="ldm", numbering="renumbered", prefix=""):
    chosen = chosen_for(preset, config)
    weights, _ = surgery.cut(small.weights(config), chosen)
    converted = surgery.convert(weights, chosen, surgery.ADDRESSED, Form(layout, numbering))
    return {prefix + k: v.clone() for k, v in converted.items()}


def same(model, wanted, config=SD):
    return torch.equal(small.sample(model, config), small.sample(wanted, config))


# The list ---------------------------------------------------------------------------------------------


def test_a_list_without_unets_says_so_and_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusion_models", ([str(tmp_path)], {".safetensors"}))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    assert files.unets() == [files.NO_UNET]
    with pytest.raises(
        ValueError,
        match=f"Put a .safetensors file or a diffusers folder into one of {re.escape(str(tmp_path))}, press R",
    ):
        execute("ASDMLoadPrunedUNet", unet_name=files.NO_UNET, prediction="auto", weight_dtype="default")
    (tmp_path / "some.safetensors").touch()
    assert files.unets() == ["some.safetensors"]


def test_what_is_listed_of_diffusers_folders_is_what_loads(monkeypatch, tmp_path):
    roots = {kind: tmp_path / kind for kind in ("diffusion_models", "diffusers")}
    for kind, root in roots.items():
        root.mkdir()
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, ([str(root)], {".safetensors", ".bin"}))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    sd = tensors("base", layout="diffusers")
    write_folder(roots["diffusers"] / "author" / "pipeline", sd)
    write_folder(roots["diffusers"] / "author" / "averaged", sd, unet="unet_ema")
    write_folder(roots["diffusers"] / "hub" / "models--author--model" / "snapshots" / "0123abc", sd)
    both = write_folder(roots["diffusion_models"] / "both", sd)
    write_folder(both, sd, unet="unet_ema")
    (both / "vae").mkdir()
    save_file({"x": torch.zeros(1)}, both / "vae" / "diffusion_pytorch_model.safetensors")
    (both / "vae" / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    plain = write_folder(roots["diffusion_models"] / "bf16", sd, unet="")
    (plain / "diffusion_pytorch_model.safetensors").rename(plain / "diffusion_pytorch_model.bf16.safetensors")
    for name in ("pickled", "encoder"):
        (roots["diffusion_models"] / name).mkdir()
    (roots["diffusion_models"] / "pickled" / "diffusion_pytorch_model.bin").touch()
    (roots["diffusion_models"] / "encoder" / "config.json").write_text('{"architectures": ["CLIPTextModel"]}')
    (roots["diffusion_models"] / "encoder" / "model-00001-of-00002.safetensors").touch()
    listed = files.unets()
    assert {name for name in listed if name.endswith("/")} == {
        "author/pipeline/",
        "author/averaged/",
        "hub/models--author--model/snapshots/0123abc/",
        "both/",
        "both/unet_ema/",
        "bf16/",
    }
    assert not any("vae" in name or "-of-" in name or name.endswith(".bin") for name in listed)
    for name in listed:
        models.load_unet(str(files.unet_path(name)))
    # One that is there and not listed says why.
    with pytest.raises(tensor_file.BadFile, match="a pickle file.* convert it"):
        models.load_unet(str(files.unet_path("pickled/")))
    for name in ("absent/", "../pickled/", f"{tmp_path}/"):
        with pytest.raises(ValueError, match="is not there any more"):
            files.unet_path(name)


# The host's cache ---------------------------------------------------------------------------------------


def test_a_replaced_file_has_another_fingerprint(monkeypatch, tmp_path):
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusion_models", ([str(tmp_path)], {".safetensors"}))
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "checkpoints", ([str(tmp_path)], {".safetensors"}))
    monkeypatch.setitem(folder_paths.folder_names_and_paths, files.PACK_FOLDER, ([str(tmp_path)], {".safetensors"}))
    write_folder(tmp_path / "folder", {"a": torch.zeros(1)}, "epsilon")
    for name in ("file", "vae"):
        save_file({"a": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    chosen = small.Architecture.full(SD)
    description = packs.Description("unet", chosen, companions={"vae": "vae.safetensors"})
    tensor_file.write_file(tmp_path / "whole.safetensors", {"a": torch.zeros(1)}, {"asdm": description.to_json()})
    nodes = node_classes()
    cases = [
        ("ASDMLoadPrunedUNet", "unet_name", "folder/", "folder/unet/diffusion_pytorch_model.safetensors"),
        ("ASDMLoadPrunedUNet", "unet_name", "folder/", "folder/scheduler/scheduler_config.json"),
        ("ASDMLoadPrunedUNet", "unet_name", "file.safetensors", "file.safetensors"),
        ("ASDMCheckpointLoader", "ckpt_name", "file.safetensors", "file.safetensors"),
        ("ASDMCheckpointLoader", "ckpt_name", "whole.safetensors", "vae.safetensors"),
        ("ASDMApplyPack", "pack_name", "file.safetensors", "file.safetensors"),
    ]
    for node, name, value, replaced in cases:
        before = nodes[node].fingerprint_inputs(**{name: value})
        assert nodes[node].fingerprint_inputs(**{name: value}) == before
        path = tmp_path / replaced
        stat = path.stat()
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
        later = nodes[node].fingerprint_inputs(**{name: value})
        assert later != before
        path.write_bytes(path.read_bytes() + b" ")
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
        assert nodes[node].fingerprint_inputs(**{name: value}) != later
        assert nodes[node].fingerprint_inputs(**{name: "gone.safetensors"}) == ["gone.safetensors"]
    plot = nodes["ASDMXYPlot"].fingerprint_inputs
    for axis in ({"x": "pack", "values": "off, file"}, {"x": "pack strength", "pack_name": "file.safetensors"}):
        before = plot(x=axis, y={"y": "nothing"}, seed=1)
        assert before and plot(x=axis, y={"y": "nothing"}, seed=1) == before
        path = tmp_path / "file.safetensors"
        path.write_bytes(path.read_bytes() + b" ")
        assert plot(x=axis, y={"y": "nothing"}, seed=1) != before
    assert plot(x={"x": "inheritance", "values": "off, fast"}, y={"y": "nothing"}) == []


# Loading --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference(folder):
    """reference(preset): the MODEL of a file of ours with everything in its description."""
    made = {}

    def reference(preset, config=SD, dtype=None):
        key = preset, config.family, dtype
        if key not in made:
            chosen = chosen_for(preset, config)
            weights, _ = surgery.cut(small.weights(config), chosen)
            path = folder / f"reference-{preset}-{config.family}-{dtype}.safetensors"
            packs.write_unet(path, weights, packs.Description("unet", chosen, prediction="eps"), dtype)
            made[key] = models.load_unet(str(path))
        return made[key]

    return reference


def other_parts():
    return {
        "first_stage_model.encoder.conv_in.weight": torch.zeros(1),
        "cond_stage_model.transformer.text_model.x": torch.zeros(1),
    }


def write_folder(root, sd, prediction=None, unet="unet"):
    """A diffusers pipeline folder, or only its unet folder; with a scheduler if there is a prediction."""
    unet_folder = root / unet
    unet_folder.mkdir(parents=True)
    save_file(sd, unet_folder / "diffusion_pytorch_model.safetensors")
    (unet_folder / "config.json").write_text("{}")
    if prediction:
        (root / "scheduler").mkdir()
        (root / "scheduler" / "scheduler_config.json").write_text(json.dumps({"prediction_type": prediction}))
    return root


def write_form(root, form, preset):
    path = root / f"{form}.safetensors"
    diffusers = tensors(preset, layout="diffusers")
    match form:
        case "ldm":
            save_file(tensors(preset), path)
        case "ldm-prefixed":
            save_file(tensors(preset, prefix="diffusion_model."), path)
        case "checkpoint":
            save_file(tensors(preset, prefix="model.diffusion_model.") | other_parts(), path)
        case "diffusers":
            save_file(diffusers, path)
        case "diffusers-pipeline":
            save_file({f"unet.{k}": v for k, v in diffusers.items()}, path)
        case "addressed":
            save_file(tensors(preset, numbering="addressed"), path)
        case "folder":
            return write_folder(root / form, diffusers, "epsilon")
        case "unet-folder":
            return write_folder(root / form, diffusers, "epsilon") / "unet"
        case "folder-without-scheduler":
            return write_folder(root / form, diffusers)
    return path


FORMS = [
    "ldm",
    "ldm-prefixed",
    "checkpoint",
    "diffusers",
    "diffusers-pipeline",
    "addressed",
    "folder",
    "unet-folder",
    "folder-without-scheduler",
]


@pytest.mark.sweep(4)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("preset", ["base", "tiny"])
def test_every_form_gives_the_same_model(tmp_path, reference, form, preset):
    model = models.load_unet(str(write_form(tmp_path, form, preset)))
    assert model.model.model_type == Type.EPS
    assert small.network.architecture_of(model).cut == chosen_for(preset).cut
    assert same(model, reference(preset))


@pytest.mark.parametrize("preset", ["ssd-1b"])
def test_sdxl_in_diffusers_form(tmp_path, reference, preset):
    path = tmp_path / "file.safetensors"
    save_file(tensors(preset, SDXL, layout="diffusers"), path)
    assert same(models.load_unet(str(path)), reference(preset, SDXL), SDXL)


def test_unpruned_files_load_as_in_stock(tmp_path):
    path = tmp_path / "file.safetensors"
    save_file(tensors(""), path)
    assert same(models.load_unet(str(path)), comfy.sd.load_diffusion_model(str(path)))


def test_tensors_of_no_layer_are_ignored_as_in_stock(tmp_path, caplog):
    path = tmp_path / "lcm.safetensors"
    unknown = "time_embed.cond_proj.weight"
    save_file(tensors("") | {unknown: torch.ones(32, 16)}, path)
    ours = models.load_unet(str(path))
    stock = comfy.sd.load_diffusion_model(str(path))
    assert caplog.messages == [
        f"asdm: lcm.safetensors: no layer of this UNet has {unknown}, which is ignored.",
        f"unet unexpected: ['{unknown}']",
    ]
    assert same(ours, stock)


@pytest.mark.sweep(1)
@pytest.mark.parametrize("preset", ["base", "small", "m1"])
def test_pruned_files_load_as_in_stock(tmp_path, preset):
    path = tmp_path / "file.safetensors"
    save_file(tensors(preset), path)
    assert same(models.load_unet(str(path)), comfy.sd.load_diffusion_model(str(path)))


def test_fp16_file_loads_as_in_stock(tmp_path):
    path = tmp_path / "file.safetensors"
    save_file({k: v.half() for k, v in tensors("base").items()}, path)
    assert same(models.load_unet(str(path)), comfy.sd.load_diffusion_model(str(path)))


def test_weight_dtypes_of_the_node(tmp_path):
    path = tmp_path / "file.safetensors"
    save_file(tensors("base"), path)
    for name in ("fp8_e4m3fn", "fp8_e5m2"):
        dtype = getattr(torch, {"fp8_e4m3fn": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}[name])
        ours = models.load_unet(str(path), name)
        stock = comfy.sd.load_diffusion_model(str(path), {"dtype": dtype})
        assert ours.model.diffusion_model.out[2].weight.dtype == dtype
        assert same(ours, stock)


def test_int8_file_is_close(tmp_path, reference):
    weights, _ = surgery.cut(small.weights(SD), chosen_for("base"))
    path = tmp_path / "file.safetensors"
    packs.write_unet(path, weights, packs.Description("unet", chosen_for("base"), prediction="eps"), "int8")
    assert small.difference(small.sample(models.load_unet(str(path))), small.sample(reference("base"))) < 0.2


def test_inpainting_unet(tmp_path):
    config = replace(SD, in_channels=9)
    path = tmp_path / "file.safetensors"
    save_file(tensors("base", config), path)
    model = models.load_unet(str(path))
    assert model.model.concat_keys == ("mask", "masked_image")
    assert same(model, comfy.sd.load_diffusion_model(str(path)))


# Prediction -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction, kind", [("epsilon", Type.EPS), ("v_prediction", Type.V_PREDICTION)])
@pytest.mark.parametrize("config", [SD, SD2], ids=lambda c: c.family)
def test_folder_says_what_is_predicted(tmp_path, config, prediction, kind):
    root = write_folder(tmp_path / "pipeline", tensors("base", config, layout="diffusers"), prediction)
    assert models.load_unet(str(root)).model.model_type == kind
    assert models.load_unet(str(root / "unet")).model.model_type == kind


@pytest.mark.sweep(1)
@pytest.mark.parametrize("prediction, kind", [("eps", Type.EPS), ("v", Type.V_PREDICTION)])
@pytest.mark.parametrize("config", [SD, SD2, SDXL], ids=lambda c: c.family)
def test_description_and_choice_say_what_is_predicted(tmp_path, config, prediction, kind):
    path = small.write_unet(tmp_path / "file.safetensors", config, prediction=prediction)
    assert models.load_unet(path).model.model_type == kind
    other = "v" if prediction == "eps" else "eps"
    assert models.load_unet(path, prediction=other).model.model_type == models.PREDICTIONS[other]


def test_rule_of_sd2_is_asked_with_unpruned_names(tmp_path):
    # The host looks at a norm of the last transformer, whose renumbered name is another one.
    for spread, kind in ((0.2, Type.V_PREDICTION), (0.02, Type.EPS)):
        sd = tensors("base", SD2)
        key = next(
            k
            for k in reversed(sorted(sd, key=lambda k: int(k.split(".")[1]) if k.startswith("output") else -1))
            if k.endswith("norm1.bias")
        )
        sd[key] = torch.randn(sd[key].shape, generator=torch.Generator().manual_seed(0)) * spread
        save_file(sd, tmp_path / "file.safetensors")
        assert models.load_unet(str(tmp_path / "file.safetensors")).model.model_type == kind


@pytest.mark.sweep(1)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_markers_of_sdxl_checkpoints(tmp_path, prefix):
    path = tmp_path / "file.safetensors"
    sd = tensors("vega", SDXL, prefix=prefix)
    for markers, kind, zero_snr in (
        ((), Type.EPS, False),
        (("v_pred",), Type.V_PREDICTION, False),
        (("v_pred", "ztsnr"), Type.V_PREDICTION, True),
    ):
        save_file(sd | {name: torch.zeros(0) for name in markers}, path)
        model = models.load_unet(str(path))
        assert model.model.model_type == kind
        assert model.model.model_sampling.zsnr == zero_snr


# Saving ---------------------------------------------------------------------------------------------


@pytest.fixture
def output(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    return tmp_path


def stock_save(model, output):
    node = nodes_model_merging.ModelSave()
    node.save(model, "stock/file")
    (path,) = (output / "stock").glob("*.safetensors")
    return path


def save(model, output, dtype="as loaded", **given):
    return execute("ASDMSaveUNet", model=model, filename_prefix="ours/file", dtype=dtype, **given)[0]


def test_a_patch_that_widens_a_layer_is_no_part_of_others(output, reference):
    """As IC-Light's: the first convolution takes more channels. Another clone's patches may lie in the live weights."""
    model, key = reference("base"), "diffusion_model.input_blocks.0.0.weight"
    wide = model.clone()
    width = model.get_model_object(key).shape[0]
    wide.add_patches({key: ("diff", (torch.zeros(width, 8, 3, 3), {"pad_weight": True}))})
    comfy.model_management.load_models_gpu([wide])
    assert tuple(wide.get_model_object(key).shape) == (width, 8, 3, 3)
    with pytest.raises(ValueError, match=r"gives input_blocks.0.0.weight the shape .*, 8, 3, 3.*Save the MODEL before"):
        save(wide, output)
    comfy.model_management.load_models_gpu([wide])
    assert same(models.load_unet(str(save(model, output))), model)


def test_configs_are_named_as_the_hosts(reference):
    """Other nodes tell families by the name of the class."""
    assert type(reference("base").model.model_config).__name__ == "SD15"


@pytest.mark.sweep(1)
@pytest.mark.parametrize("preset", ["base", "m1", "m2", "m3"])
def test_saved_unet_loads_in_stock(output, reference, preset):
    model = reference(preset)
    for path in (save(model, output), stock_save(model, output)):
        for loaded in (comfy.sd.load_diffusion_model(str(path)), models.load_unet(str(path))):
            assert same(loaded, model)


@pytest.mark.parametrize("preset", ["koala-1b"])
def test_saved_sdxl_unet_loads_in_our_loader(output, reference, preset):
    # Stock ComfyUI knows these by their published widths, which the small ones do not have.
    model = reference(preset, SDXL)
    for path in (save(model, output), stock_save(model, output)):
        assert same(models.load_unet(str(path)), model, SDXL)


@pytest.mark.parametrize("preset", ["base", "m1", "m2", "m3", "ssd-1b", "vega", "koala-1b", "koala-700m"])
def test_stock_knows_the_class_of_saved_presets(preset):
    chosen = Architecture.preset(preset)
    saved = models._standalone_names({k: torch.empty(s.shape, device="meta") for k, s in chosen.keys().items()}, chosen)
    found = comfy.model_detection.model_config_from_unet(
        {f"model.diffusion_model.{k}": v for k, v in saved.items()}, "model.diffusion_model."
    )
    wanted = {"ssd-1b": "SSD1B", "vega": "Segmind_Vega", "koala-1b": "KOALA_1B", "koala-700m": "KOALA_700M"}.get(
        preset, "SD15"
    )
    assert type(found).__name__ == wanted


@pytest.mark.sweep(1)
@pytest.mark.parametrize("config", [SD, SDXL], ids=lambda c: c.family)
def test_saved_v_prediction_is_found_again(output, config):
    model = models.load_unet(small.write_unet(output / "v.safetensors", config, prediction="v"))
    for path in (save(model, output), stock_save(model, output)):
        assert models.load_unet(str(path)).model.model_type == Type.V_PREDICTION
    if config is SDXL:  # the only family whose stock class asks the file
        assert comfy.sd.load_diffusion_model(save(model, output)).model.model_type == Type.V_PREDICTION


SAMPLED = nodes_model_advanced.ModelSamplingDiscrete().patch
CONTINUOUS = nodes_model_advanced.ModelSamplingContinuousEDM().patch


def test_saved_is_the_prediction_that_the_model_plays(output):
    """Not the loader's, where a node has set another; the file is found again with its schedule."""
    loaded = models.load_unet(small.write_unet(output / "eps.safetensors", prediction="eps"))
    for zero_snr in (False, True):
        (played,) = SAMPLED(loaded, "v_prediction", zero_snr)
        result = node_classes()["ASDMSaveUNet"].execute(played, "ours/file", "as loaded")
        saved = models.load_unet(result.args[0])
        assert saved.model.model_type == Type.V_PREDICTION and saved.model.model_sampling.zsnr == zero_snr
        assert same(saved, played)
        wanted = "(v_prediction and zsnr)" if zero_snr else "(v_prediction)"
        assert f"put ModelSamplingDiscrete {wanted} behind its loader" in result.ui["text"][0]
    result = node_classes()["ASDMSaveUNet"].execute(*SAMPLED(loaded, "lcm", False), "ours/file", "as loaded")
    assert models.load_unet(result.args[0]).model.model_type == Type.EPS and "sampled as LCM" in result.ui["text"][0]


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda model: SAMPLED(model, "x0", False), "is sampled as X0"),
        (lambda model: SAMPLED(model, "eps", True), "zero terminal SNR beside a prediction of the noise"),
        (lambda model: CONTINUOUS(model, "edm", 120.0, 0.002), "is sampled as EDM"),
        (lambda model: CONTINUOUS(model, "v_prediction", 120.0, 0.002), "has noise levels of its own"),
        (lambda model: nodes_model_advanced.ModelSamplingSD3().patch(model, 3.0), "is sampled as CONST"),
    ],
)
def test_a_sampling_that_no_file_can_say_is_not_saved(output, reference, change, said):
    with pytest.raises(ValueError, match=f"this MODEL .*{said}.*save the MODEL before the node"):
        save(*change(reference("base")), output)


def test_stock_save_of_a_model_with_a_pack_is_the_model_without(output, folder):
    model = small.model(folder)
    played = small.with_pack(model, small.write_pack(output / "m2.safetensors", seed=1))
    assert same(comfy.sd.load_diffusion_model(str(stock_save(played, output))), model)


@pytest.mark.sweep(1)
@pytest.mark.parametrize("preset", ["m2", "tiny"])
def test_pack_is_saved_as_the_network_it_plays(output, folder, preset):
    model = small.model(folder)
    played = small.with_pack(model, small.write_pack(output / "pack.safetensors", preset=preset, seed=1))
    path = save(played, output)
    weights = load_file(path)
    wanted = load_file_of(small.combined(folder, preset=preset))
    assert weights.keys() == wanted.keys()
    assert all(torch.equal(weights[k], wanted[k]) for k in wanted)
    assert same(models.load_unet(path), played)


def load_file_of(model):
    return load_file(model.cached_patcher_init[1][0])


def test_loras_are_baked_into_what_is_saved(output, folder):
    model = small.model(folder)
    lora = small.lora()
    pack = small.write_pack(output / "m2.safetensors", seed=1)
    for played in (
        small.add_lora(small.with_pack(model, pack), lora, 0.7),
        small.with_pack(small.add_lora(model, lora, 0.7), pack),
    ):
        path = save(played, output)
        saved = load_file(path)
        before = load_file_of(small.combined(folder))
        changed = [k for k in saved if not torch.equal(saved[k], before[k])]
        assert len(changed) == sum(len(t.shape) > 1 for t in saved.values())
        wanted = small.sample(small.add_lora(small.combined(folder), lora, 0.7))
        for loaded in (models.load_unet(path), comfy.sd.load_diffusion_model(path)):
            assert small.difference(small.sample(loaded), wanted) < 1e-4


def test_saving_does_not_change_the_model(output, folder):
    played = small.add_lora(
        small.with_pack(small.model(folder), small.write_pack(output / "m2.safetensors", seed=1)), small.lora()
    )
    before = small.sample(played)
    save(played, output)
    assert torch.equal(small.sample(played), before)


def test_saved_as_fp16(output, reference):
    path = save(reference("base"), output, "fp16")
    assert {v.dtype for v in load_file(path).values()} == {torch.float16}


@pytest.mark.parametrize(
    "cut",
    [
        "down.1.1",  # the up side keeps all its layers
        "down.3.0-1, up.0.1-2",  # stock detection would miscount the levels
    ],
)
def test_free_choice_of_units_without_a_renumbered_form(output, cut):
    chosen = Architecture.choose(SD, cut)
    path = output / "free.safetensors"
    packs.write_unet(
        path, surgery.cut(small.weights(SD), chosen)[0], packs.Description("unet", chosen, prediction="eps")
    )
    model = models.load_unet(str(path))
    saved = save(model, output)
    assert same(models.load_unet(saved), model)
    with pytest.raises(ValueError, match=r"use Save UNet \(asdm\)"):
        stock_save(model, output)
    assert not list((output / "stock").glob("*.safetensors"))


def test_pack_in_a_window_is_not_saved(output, folder):
    played = small.with_pack(small.model(folder), small.write_pack(output / "m2.safetensors", seed=1), 0.2, 1.0)
    with pytest.raises(ValueError, match="20% to 100%"):
        save(played, output)
    assert not list(output.glob("ours/*"))


def test_a_switch_and_gains_are_not_saved(output, folder):
    model = small.model(folder)
    for other, said in (
        (
            switch.with_switch(model, small.model(folder, seed=1), switch.SwitchPoint(0.5)),
            "Save each MODEL before Switch UNet",
        ),
        (
            small.with_pack(model, small.write_gains(output / "gains.safetensors", ("down.0.0.transformer",))),
            "has gains for GRI attention",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            save(other, output)
    assert not list(output.glob("ours/*"))


def test_a_bypass_lora_is_saved_as_any_other(output, model, m2):
    lora = small.lora()
    for plain in (model, small.with_pack(model, m2)):
        wanted = load_file(save(small.add_lora(plain, lora, 0.7), output))
        found = load_file(save(comfy.sd.load_bypass_lora_for_models(plain, None, lora, 0.7, 0)[0], output))
        assert found.keys() == wanted.keys() and all(torch.equal(found[k], wanted[k]) for k in found)


def test_quantised_weights_are_not_saved_as_if_they_were_plain(output):
    weights = dict(small.weights(SD))
    layer = "input_blocks.1.1.transformer_blocks.0.attn1.to_q"
    weights[f"{layer}.weight"] = (weights[f"{layer}.weight"] * 64).to(torch.float8_e4m3fn)
    weights |= {f"{layer}.scale_weight": torch.tensor(1 / 64), "scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}
    model = comfy.sd.load_diffusion_model_state_dict(weights)
    assert (
        small.difference(
            small.sample(model), small.sample(models.load_unet(small.write_unet(output / "plain.safetensors")))
        )
        < 0.1
    )
    with pytest.raises(ValueError, match="quantised.* Load the same checkpoint in fp16 or bf16"):
        save(model, output)
    assert not list(output.glob("ours/*"))


class Blocks(torch.Tensor):
    """As GGUF's nodes hold weights: bytes, of which their layers make numbers."""


@pytest.mark.parametrize("held", ["bytes", "own class", "packed"])
def test_weights_that_are_no_plain_numbers_are_not_saved(folder, output, held):
    model = models.load_unet(small.write_unet(folder / f"{held}.safetensors"))
    layer = model.model.diffusion_model.input_blocks[1][1].transformer_blocks[0].attn1.to_q
    weight = {
        "bytes": layer.weight.detach().to(torch.uint8),
        "own class": layer.weight.detach().as_subclass(Blocks),
        "packed": layer.weight.detach()[:, ::2],
    }[held]
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    key = "input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
    with pytest.raises(ValueError, match=f"no plain numbers: {re.escape(key)} is .*in fp16 or bf16 and save that"):
        save(model, output)
    assert not list(output.glob("ours/*"))


class Halves(torch.nn.Module):
    """Layers as other packs make them: the numbers lie in blocks of bytes, and only the layer can read them."""

    def __init__(self, layer, scale=8):
        super().__init__()
        self.layer = [layer]
        self.in_features, self.weight_scale = layer.weight.shape[1], layer.weight.detach().abs().max() / 127
        numbers = (layer.weight.detach() / self.weight_scale).round().to(torch.int8)
        self.weight = torch.nn.Parameter(numbers.view(torch.uint8).flatten(1)[:, None], requires_grad=False)
        self.bias, self.patches = layer.bias, []

    def numbers(self):
        return self.weight[:, 0].view(torch.int8).view(self.layer[0].weight.shape) * self.weight_scale

    def forward(self, x):
        layer = self.layer[0]
        if layer.weight.dim() == 2:
            return torch.nn.functional.linear(x, self.numbers(), self.bias)
        return torch.nn.functional.conv2d(x, self.numbers(), self.bias, layer.stride, layer.padding)


def test_dequantised_are_the_numbers_that_layers_compute_with(folder, output):
    model = models.load_unet(small.write_unet(folder / "halves.safetensors"))
    unet = model.model.diffusion_model
    wanted = {}
    for path in (
        "input_blocks.1.1.transformer_blocks.0.attn1.to_q",
        "input_blocks.1.1.transformer_blocks.0.ff.net.0.proj",
        "input_blocks.1.1.proj_in",
        "input_blocks.1.0.in_layers.2",
        "input_blocks.3.0.op",
    ):
        layer = Halves(comfy.utils.get_attr(unet, path))
        comfy.utils.set_attr(unet, path, layer)
        wanted[f"{path}.weight"] = layer.numbers()
    with pytest.raises(ValueError, match="switch on dequantise"):
        save(model, output)
    path = save(model, output, dequantise=True)
    saved = load_file(path)
    plain = load_file(str(folder / "halves.safetensors"))
    assert saved.keys() == plain.keys()
    for key, tensor in saved.items():
        assert torch.allclose(tensor, wanted.get(key, plain[key]), rtol=0, atol=1e-6), key
    assert all(not torch.equal(saved[key], plain[key]) for key in wanted)
    assert small.difference(small.sample(models.load_unet(path)), small.sample(model)) < 1e-4


def test_scaled_fp8_is_dequantised_with_its_loras(output):
    """The reference are the numbers themselves: fp8 times its scale, in a file of plain ones."""
    weights, plain = dict(small.weights(SD)), dict(small.weights(SD))
    layer = "input_blocks.1.1.transformer_blocks.0.attn1.to_q"
    weights[f"{layer}.weight"] = (weights[f"{layer}.weight"] * 64).to(torch.float8_e4m3fn)
    plain[f"{layer}.weight"] = weights[f"{layer}.weight"].float() / 64
    weights |= {f"{layer}.scale_weight": torch.tensor(1 / 64), "scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}
    model = comfy.sd.load_diffusion_model_state_dict(weights)
    saved = load_file(save(model, output, dequantise=True))
    assert saved.keys() == plain.keys()
    assert all(torch.allclose(saved[key], plain[key], rtol=0, atol=1e-6) for key in plain)
    lora = small.lora()
    patched = load_file(save(small.add_lora(model, lora), output, dequantise=True))
    other = load_file(save(small.add_lora(comfy.sd.load_diffusion_model_state_dict(dict(plain)), lora), output))
    quantised = [key for key in other if not torch.allclose(patched[key], other[key], atol=1e-5)]
    assert quantised in ([], [f"{layer}.weight"])  # the host rounds a patched weight to fp8 again
    assert small.difference(patched[f"{layer}.weight"], other[f"{layer}.weight"]) < 0.1


def test_the_node_says_where_stock_does_not_load_its_file(output, folder, reference):
    def text(model):
        result = node_classes()["ASDMSaveUNet"].execute(model, "ours/unet", "fp16")
        return result.ui["text"][0], result.args[0]

    said, path = text(reference("base"))
    assert comfy.sd.load_diffusion_model(path) is not None and "Stock ComfyUI" not in said
    free, _ = surgery.cut(small.weights(SD), chosen := Architecture.choose(SD, "down.1.1"))
    packs.write_unet(output / "free.safetensors", free, packs.Description("unet", chosen, prediction="eps"))
    other = replace(SD, family="other", context_dim=40)
    for file in (str(output / "free.safetensors"), small.write_unet(output / "other.safetensors", other)):
        said, path = text(models.load_unet(file))
        assert "Stock ComfyUI does not know this UNet" in said
        assert models.load_unet(path) is not None
    with pytest.raises(RuntimeError):
        comfy.sd.load_diffusion_model(path)


def test_saved_files_are_never_overwritten(output, reference):
    first, second = save(reference("base"), output), save(reference("base"), output)
    assert first != second


# LoRA names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl"])
def test_lora_names_are_those_the_host_knows(family):
    config = small.architecture.FAMILIES[family]
    chosen = Architecture.full(config)
    with torch.device("meta"):
        model = models.model_config(chosen, "eps").get_model({}, "")
    known = comfy.lora.model_lora_keys_unet(model, {})
    ours = small.addresses.lora_names(config)
    matrices = {f"diffusion_model.{module}.weight" for module in ours.values()}
    theirs = {
        name: key for name, key in known.items() if key in matrices and "class_embedding" not in name
    }  # unCLIP's name of label_emb
    assert {name: f"diffusion_model.{module}.weight" for name, module in ours.items()} == theirs
    assert known.keys().isdisjoint(small.addresses.peft_names(config))
