"""Everything of the host that nodes/ uses is there, in the form it is used in: what to run first on a new ComfyUI.

Names, types of wrappers and the arguments of calls are read off the sources, so none can be forgotten. Listed here is
what the host calls of ours, and attributes of its objects.
"""

import ast
import importlib
import inspect
import re

import pytest
from in_host import PACK

HOST = ("comfy", "comfy_api", "comfy_extras", "comfy_execution", "folder_paths", "latent_preview", "nodes", "server")


def is_host(module):
    return module.partition(".")[0] in HOST


def names_bound(tree):
    """name in a source -> (module of the host, attributes in it) that its imports bind it to."""
    bound = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in filter(lambda alias: is_host(alias.name), node.names):
                root = alias.name.partition(".")[0]
                bound[alias.asname or root] = (alias.name if alias.asname else root), ()
        elif isinstance(node, ast.ImportFrom) and not node.level and is_host(node.module):
            bound |= {alias.asname or alias.name: (node.module, (alias.name,)) for alias in node.names}
    return bound


def unwound(node):
    """(name, attributes) of an expression `name.a.b`; name "" where it is none."""
    chain = []
    while isinstance(node, ast.Attribute):
        chain.append(node.attr)
        node = node.value
    return (node.id if isinstance(node, ast.Name) else ""), tuple(reversed(chain))


def uses(path):
    """(module of the host, attribute path in it) for everything a source file takes from the host."""
    tree = ast.parse(path.read_text("utf-8"))
    bound = names_bound(tree)
    yield from bound.values()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, ()) for alias in node.names if is_host(alias.name))
        root, chain = unwound(node)
        if chain and root in bound:
            module, attributes = bound[root]
            yield module, (*attributes, *chain)


def missing(module, attributes):
    """What of a name is not there; nothing where all is. What lies in an object, not in a class or module, is
    skipped.
    """
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
    assert ("comfy.patcher_extension", ("WrappersMP", "OUTER_SAMPLE")) in found
    assert missing("comfy.patcher_extension", ("WrappersMP", "MOON")) == "comfy.patcher_extension.WrappersMP.MOON"


OPENAI = "comfy.ldm.modules.diffusionmodules.openaimodel"
PATCHER = "comfy.model_patcher:ModelPatcher"
GIVEN = {  # what is wrapped or overridden: module:function -> parameters that it is given in this order
    f"{OPENAI}:forward_timestep_embed": (
        "ts x emb context transformer_options output_shape time_context num_video_frames image_only_indicator"
    ),
    f"{OPENAI}:UNetModel._forward": "self x timesteps context y control transformer_options",
    "comfy.model_base:BaseModel._apply_model": "self x t c_concat c_crossattn control transformer_options",
    "comfy.model_base:BaseModel.load_model_weights": "self sd unet_prefix assign",
    "comfy.model_base:BaseModel.memory_required": "self input_shape",
    "comfy.sampler_helpers:_prepare_sampling": "model noise_shape conds model_options",
    "comfy.samplers:_calc_cond_batch": "model conds x_in timestep model_options",
    "comfy.samplers:CFGGuider.outer_sample": "self noise latent_image sampler sigmas",
    "comfy.samplers:CFGGuider.predict_noise": "self x timestep model_options seed",
    "comfy.samplers:KSAMPLER.sample": (
        "self model_wrap sigmas extra_args callback noise latent_image denoise_mask disable_pbar"
    ),
    "comfy.supported_models_base:BASE.get_model": "self state_dict prefix device",
    "comfy.supported_models_base:BASE.model_type": "self state_dict prefix",
    "comfy.supported_models_base:BASE.set_inference_dtype": "self dtype manual_cast_dtype device",
    "comfy.supported_models_base:BASE.process_unet_state_dict_for_saving": "self state_dict",
}
HELD = {  # attributes that the host gives its objects
    PATCHER: "model model_options patches object_patches weight_wrapper_patches additional_models hook_mode parent "
    "hook_patches injections is_injected wrappers load_device offload_device cached_patcher_init patches_uuid",
    "comfy.samplers:CFGGuider": "model_patcher model_options conds original_conds inner_model",
    "comfy.model_base:BaseModel": "diffusion_model model_config latent_format model_type current_patcher",
}


def looked_up(name):
    """What `module:attributes` means; fails with the name where this host has no such thing."""
    module, _, path = name.partition(":")
    if gone := missing(module, tuple(path.split("."))):
        pytest.fail(f"this host has no {gone}", pytrace=False)
    thing = importlib.import_module(module)
    for attribute in path.split("."):
        thing = getattr(thing, attribute)
    return thing


@pytest.mark.parametrize("function, names", GIVEN.items(), ids=list(GIVEN))
def test_signatures_are_as_the_host_calls_ours(function, names):
    has, names = list(inspect.signature(looked_up(function)).parameters), names.split()
    gone = [name for name in names if name not in has]
    assert not gone, f"{function} has no {', '.join(gone)}; it has {', '.join(has)}"
    assert sorted(names, key=has.index) == names, f"{function} takes {', '.join(has)}, in this order"


@pytest.mark.parametrize("name, attributes", HELD.items(), ids=list(HELD))
def test_objects_hold_what_is_read_of_them(name, attributes):
    source = "".join(inspect.getsource(c) for c in looked_up(name).__mro__ if c is not object)
    gone = [one for one in attributes.split() if not re.search(rf"\bself\.{one}\b", source)]
    assert not gone, f"{name} has no attribute {', '.join(gone)}"


def calls(path):
    """(what is called, the call) for every call in a source file of a function, class or patcher method of the host.

    A method is told by its name alone, where no class of the pack has one of that name.
    """
    tree = ast.parse(path.read_text("utf-8"))
    bound = names_bound(tree)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        root, chain = unwound(node.func)
        if root in bound:
            module, attributes = bound[root]
            if attributes or chain:
                yield f"{module}:{'.'.join((*attributes, *chain))}", node
        elif chain and chain[-1] in METHODS - OWN:
            yield f"{PATCHER}.{chain[-1]}", node


OWN = {
    node.name
    for path in FILES
    for node in ast.walk(ast.parse(path.read_text("utf-8")))
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
}
# Names so common that a call of them says nothing of whose method it is.
COMMON = {"load", "detach", "get", "items", "to", "__init__", "__del__"}


def patcher_methods():
    try:
        return {name for name, thing in vars(looked_up(PATCHER)).items() if inspect.isfunction(thing)} - COMMON
    except pytest.fail.Exception:
        return set()  # the tests above have said what is gone


METHODS = patcher_methods()


def does_not_fit(name, call):
    """What is wrong with a call's arguments, in a sentence; "" if nothing, or if they cannot be known."""
    module, _, path = name.partition(":")
    if missing(module, tuple(path.split("."))):
        return ""  # told by test_every_name_is_there
    try:
        signature = inspect.signature(looked_up(name))
    except (AttributeError, TypeError, ValueError):  # what lies in an object, and functions written in C
        return ""
    if any(isinstance(a, ast.Starred) for a in call.args) or any(k.arg is None for k in call.keywords):
        return ""
    args: list[object] = [None] * (len(call.args) + name.startswith(f"{PATCHER}."))
    try:
        signature.bind(*args, **{k.arg: None for k in call.keywords})
    except TypeError as error:
        return f"{name}{signature} as called in line {call.lineno}: {error}"
    return ""


@pytest.mark.parametrize("path", FILES, ids=[p.relative_to(PACK).as_posix() for p in FILES])
def test_every_call_fits_its_function(path):
    wrong = [told for name, call in calls(path) if (told := does_not_fit(name, call))]
    assert not wrong, "\n".join(wrong)


def test_calls_are_found_and_judged():
    found = {name for path in FILES for name, _ in calls(path)}
    assert {f"{PATCHER}.set_additional_models", "comfy:model_management.load_models_gpu"} <= found and len(found) > 40
    call = ast.parse("f(1, 2, moon=4)").body[0]
    assert isinstance(call, ast.Expr) and isinstance(call.value, ast.Call)
    assert "moon" in does_not_fit(f"{PATCHER}.set_additional_models", call.value)
