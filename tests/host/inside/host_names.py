"""Everything of the host that nodes/ uses is there, in the form it is used in: what to run first on a new ComfyUI.

Names are read off the sources, so none can be forgotten; signatures and members that are reached through objects
are listed here.
"""

import ast
import importlib
import inspect

import comfy.hooks
import comfy.lora
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import comfy.samplers
import comfy.sd
import comfy.utils
import folder_paths
import pytest
from comfy.ldm.modules.diffusionmodules import openaimodel
from in_host import PACK

HOST = ("comfy", "comfy_api", "comfy_extras", "comfy_execution", "folder_paths", "latent_preview", "nodes", "server")


def is_host(module):
    return module.partition(".")[0] in HOST


def uses(path):
    """(module of the host, attribute path in it) for everything a source file takes from the host."""
    tree = ast.parse(path.read_text("utf-8"))
    bound = {}  # name in the file -> (module, attributes)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if is_host(alias.name):
                    yield alias.name, ()
                    bound[alias.asname or alias.name.partition(".")[0]] = (
                        alias.name if alias.asname else alias.name.partition(".")[0],
                        (),
                    )
        elif isinstance(node, ast.ImportFrom) and not node.level and is_host(node.module):
            for alias in node.names:
                yield node.module, (alias.name,)
                bound[alias.asname or alias.name] = node.module, (alias.name,)
    for node in ast.walk(tree):
        chain = []
        while isinstance(node, ast.Attribute):
            chain.append(node.attr)
            node = node.value
        if chain and isinstance(node, ast.Name) and node.id in bound:
            module, attributes = bound[node.id]
            yield module, (*attributes, *reversed(chain))


def missing(module, attributes):
    """What of a name is not there; nothing where all is. What lies in an object, not in a class or "
    "module, is skipped."""
    try:
        found = importlib.import_module(module)
    except ImportError:
        return module
    name = module
    for attribute in attributes:
        if not (inspect.ismodule(found) or inspect.isclass(found)):
            return None
        name = f"{name}.{attribute}"
        if not hasattr(found, attribute):
            try:
                importlib.import_module(name)
            except ImportError:
                return name
        found = getattr(found, attribute)
    return None


FILES = sorted((PACK / "nodes").rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=[p.relative_to(PACK).as_posix() for p in FILES])
def test_every_name_is_there(path):
    gone = {name for module, attributes in uses(path) if (name := missing(module, attributes))}
    assert not gone, f"this host has no {', '.join(sorted(gone))}"


def test_the_names_are_found_at_all():
    found = {(m, a) for path in FILES for m, a in uses(path)}
    assert len(found) > 50 and ("comfy", ("model_patcher", "CoreModelPatcher")) in found
    assert missing("comfy.patcher_extension", ("WrappersMP", "MOON")) == "comfy.patcher_extension.WrappersMP.MOON"


Patcher = comfy.model_patcher.ModelPatcher
SIGNATURES = [  # function, names of parameters that are given to it, in this order
    (
        openaimodel.forward_timestep_embed,
        "ts x emb context transformer_options output_shape time_context num_video_frames image_only_indicator",
    ),
    (comfy.lora.load_lora, "lora to_load"),
    (comfy.lora.model_lora_keys_unet, "model key_map"),
    (comfy.model_base.BaseModel.load_model_weights, "self sd unet_prefix assign"),
    (comfy.model_base.BaseModel.memory_required, "self input_shape"),
    (comfy.model_management.unet_dtype, "model_params supported_dtypes weight_dtype"),
    (comfy.model_management.unet_manual_cast, "weight_dtype inference_device supported_dtypes"),
    (comfy.model_management.load_models_gpu, "models"),
    (comfy.samplers.CFGGuider.predict_noise, "self x timestep model_options seed"),
    (comfy.supported_models_base.BASE.get_model, "self state_dict prefix device"),
    (comfy.supported_models_base.BASE.model_type, "self state_dict prefix"),
    (comfy.supported_models_base.BASE.set_inference_dtype, "self dtype manual_cast_dtype device"),
    (folder_paths.add_model_folder_path, "folder_name full_folder_path"),
    (folder_paths.get_full_path, "folder_name filename"),
    (Patcher.__init__, "self model load_device offload_device"),
    (Patcher.clone, "self disable_dynamic model_override force_deepcopy"),
    (Patcher.add_patches, "self patches strength_patch strength_model"),
    (Patcher.set_additional_models, "self key models"),
    (Patcher.get_additional_models_with_key, "self key"),
    (Patcher.add_wrapper_with_key, "self wrapper_type key wrapper"),
    (Patcher.remove_wrappers_with_key, "self wrapper_type key"),
    (Patcher.add_callback_with_key, "self call_type key callback"),
    (Patcher.set_attachments, "self key attachment"),
    (Patcher.get_model_object, "self name"),
    (Patcher.model_state_dict_for_saving, "self"),
    (Patcher.patch_hooks, "self hooks"),
    (Patcher.clean_hooks, "self"),
    (Patcher.is_dynamic, "self"),
    (Patcher.match_multigpu_clones, "self"),
]
WRAPPERS = "OUTER_SAMPLE PREPARE_SAMPLING PREDICT_NOISE APPLY_MODEL DIFFUSION_MODEL SAMPLER_SAMPLE"
CALLBACKS = "ON_CLONE ON_CLEANUP ON_REGISTER_ALL_HOOK_PATCHES ON_APPLY_HOOKS"


@pytest.mark.parametrize("function, names", SIGNATURES, ids=[f.__qualname__ for f, _ in SIGNATURES])
def test_signatures_are_as_they_are_used(function, names):
    has, names = list(inspect.signature(function).parameters), names.split()
    gone = [name for name in names if name not in has]
    assert not gone, f"{function.__qualname__} has no {', '.join(gone)}; it has {', '.join(has)}"
    assert sorted(names, key=has.index) == names, f"{function.__qualname__} takes {', '.join(has)}, in this order"


def test_wrapper_and_callback_types_are_there():
    for group, names in (
        (comfy.patcher_extension.WrappersMP, WRAPPERS),
        (comfy.patcher_extension.CallbacksMP, CALLBACKS),
    ):
        gone = [name for name in names.split() if not hasattr(group, name)]
        assert not gone, f"{group.__name__} lacks {', '.join(gone)}"


@pytest.mark.parametrize(
    "name", ["ResBlock", "TimestepBlock", "SpatialTransformer", "Downsample", "Upsample", "UNetModel"]
)
def test_the_layers_are_there(name):
    assert isinstance(getattr(openaimodel, name, None), type), f"openaimodel has no class {name}"
