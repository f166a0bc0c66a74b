"""What others put on the checkpoint's layers acts on the pack that plays them, as on one file with the same weights."""

import copy
import functools
import types

import in_host
import pytest
import small
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.patcher_extension import WrappersMP
from comfy_extras import nodes_attention_multiply, nodes_model_merging

SD = small.SD
carried, units = in_host.module("nodes.engine.carried"), in_host.module("nodes.engine.units")
switch = in_host.module("nodes.engine.switch")
BLOCKS = [f"diffusion_model.output_blocks.{n}.1.transformer_blocks.0" for n in (3, 6, 9)]
CONVS = [f"diffusion_model.{side}_blocks.{n}.0.in_layers.2" for side, n in (("input", 1), ("input", 4), ("output", 9))]


@pytest.fixture(scope="module")
def base(folder):
    return small.write_pack(folder / "base-pack.safetensors", preset="base", seed=1)


@pytest.fixture(scope="module")
def one_file(folder):
    return small.combined(folder, preset="base")


def patched(paths, make, leaf="forward"):
    """A node that puts an object patch on modules; make: module -> what goes there."""

    def node(model):
        clone = model.clone()
        for path in paths:
            clone.add_object_patch(f"{path}.{leaf}", make(model.get_model_object(path)))
        return clone

    return node


def closure(module):
    own = module.forward
    return lambda *args, **more: 1.3 * own(*args, **more)


def default(module):
    return lambda *args, own=module.forward, **more: 1.3 * own(*args, **more)


def _scaled(own, factor, *args, **more):
    return factor * own(*args, **more)


def partial(module):
    return functools.partial(_scaled, module.forward, 1.3)


def method(module):
    def forward(self, *args, **more):
        return 1.3 * type(self).forward(self, *args, **more)

    return types.MethodType(forward, module)


def twice(module):
    module = types.SimpleNamespace(forward=closure(module))
    return closure(module)


class Object:
    def __init__(self, module):
        self.module, self.own, self.calls = module, module.forward, []

    def __call__(self, *args, **more):
        self.calls.append(tuple(self.module.state_dict()))
        return 1.3 * self.own(*args, **more)


def object_method(module):
    return Object(module).__call__


class Chosen:
    """Holds one of its own methods, and a function that knows it."""

    def __init__(self, module):
        self.module, self.own, self.factor = module, module.forward, 1.3
        self.forward, self.scaled = self.multiplied, lambda x: self.factor * x

    def __call__(self, *args, **more):
        return self.forward(*args, **more)

    def multiplied(self, *args, **more):
        assert self.module.forward is self
        return self.scaled(self.own(*args, **more))


def by_name(module):
    """Two functions that know each other."""

    def one(*args, again=True, **more):
        return other(*args, **more) if again else own(*args, **more)

    def other(*args, **more):
        return 1.3 * one(*args, again=False, **more)

    own = module.forward
    return one


def wrapping(module):
    """The convolution goes round at the borders, as in nodes for tiles."""

    def _conv_forward(self, x, weight, bias):
        x = torch.nn.functional.pad(x, (1, 1, 1, 1), mode="circular")
        return torch.nn.functional.conv2d(x, weight, bias, self.stride)

    return types.MethodType(_conv_forward, module)


def reference(model):
    """Sets forwards for a run, with what they need beside them on the modules, as Reference ControlNets do."""

    def forward(self, x, context=None, transformer_options={}):
        self.their_bank.append(x.mean())
        n = self.norm1(x)
        x = x + 0.5 * self.attn1(torch.cat([n, n.flip(1)], 1))[:, : n.shape[1]] + self.their_bank[-1]
        return type(self).forward(self, x, context, transformer_options)

    def run(executor, *args, **more):
        modules = [clone.get_model_object(path) for path in BLOCKS]
        for module in modules:
            module.their_bank, module.forward = bank, types.MethodType(forward, module)
        try:
            return executor(*args, **more)
        finally:
            for module in modules:
                del module.forward, module.their_bank

    bank = []
    clone = model.clone()
    clone.wrappers[WrappersMP.OUTER_SAMPLE] = {"theirs": [run], **clone.wrappers.get(WrappersMP.OUTER_SAMPLE, {})}
    return clone


def comes_late(model):
    """Sets forwards for single calls of the network."""

    def wrapper(apply_model, given):
        modules = [model.get_model_object(path) for path in BLOCKS]
        for module in modules:
            module.forward = closure(module)
        try:
            return apply_model(given["input"], given["timestep"], **given["c"])
        finally:
            for module in modules:
                del module.forward

    clone = model.clone()
    clone.set_model_unet_function_wrapper(wrapper)
    return clone


def kept_on_modules(model):
    """Keeps the module's own forward on the module, and beside it numbers that are new for each call of the network, as
    BrushNet does.
    """

    def forward(self, *args, **more):
        return self.their_factor * self.original_forward(*args, **more)

    def run(executor, *args, **more):
        modules = [clone.get_model_object(path) for path in BLOCKS]
        for module in modules:
            module.original_forward, module.forward = module.forward, types.MethodType(forward, module)
        try:
            return executor(*args, **more)
        finally:
            for module in modules:
                del module.forward, module.original_forward, module.their_factor

    def wrapper(apply_model, given):
        for path in BLOCKS:
            clone.get_model_object(path).their_factor = torch.tensor(1.2 + float(given["timestep"][0]) / 100)
        return apply_model(given["input"], given["timestep"], **given["c"])

    clone = model.clone()
    clone.wrappers[WrappersMP.OUTER_SAMPLE] = {"theirs": [run], **clone.wrappers.get(WrappersMP.OUTER_SAMPLE, {})}
    clone.set_model_unet_function_wrapper(wrapper)
    return clone


class State:
    """What a node's forward asks for its factor; it knows the layers, too."""

    def __init__(self, layers):
        self.layers, self.factor = layers, 1.0


def shared_state(model):
    """Keeps one object on all modules, which is told the factor of each step."""

    def forward(self, *args, **more):
        return self.theirs.factor * type(self).forward(self, *args, **more)

    def run(executor, *args, **more):
        modules = [clone.get_model_object(path) for path in BLOCKS]
        for module in modules:
            module.theirs, module.forward = state, types.MethodType(forward, module)
        try:
            return executor(*args, **more)
        finally:
            for module in modules:
                del module.forward, module.theirs

    def wrapper(apply_model, given):
        state.factor = 1.2 + float(given["timestep"][0]) / 100
        return apply_model(given["input"], given["timestep"], **given["c"])

    clone = model.clone()
    state = State([clone.get_model_object(path) for path in BLOCKS])
    clone.wrappers[WrappersMP.OUTER_SAMPLE] = {"theirs": [run], **clone.wrappers.get(WrappersMP.OUTER_SAMPLE, {})}
    clone.set_model_unet_function_wrapper(wrapper)
    return clone


def used_up(model):
    """Puts the same thing on modules before each step, which their forwards use and take away."""

    def forward(self, *args, **more):
        factor, self.their_factor = self.their_factor, 1.0
        return factor * type(self).forward(self, *args, **more)

    def wrapper(apply_model, given):
        modules = [clone.get_model_object(path) for path in BLOCKS]
        for module in modules:
            module.their_factor = 1.3
        return apply_model(given["input"], given["timestep"], **given["c"])

    def run(executor, *args, **more):
        modules = [clone.get_model_object(path) for path in BLOCKS]
        for module in modules:
            module.their_factor, module.forward = 1.3, types.MethodType(forward, module)
        try:
            return executor(*args, **more)
        finally:
            for module in modules:
                del module.forward, module.their_factor

    clone = model.clone()
    clone.wrappers[WrappersMP.OUTER_SAMPLE] = {"theirs": [run], **clone.wrappers.get(WrappersMP.OUTER_SAMPLE, {})}
    clone.set_model_unet_function_wrapper(wrapper)
    return clone


def knows_the_whole(model):
    """Holds the network beside the forward of a layer."""

    def make(module):
        own = module.forward
        return lambda *args, **more: (1.3 if whole and unet.dtype and base.model_type else 0) * own(*args, **more)

    base, unet, whole = model.model, model.model.diffusion_model, model
    return patched(BLOCKS, make)(model)


def a_setting_for_single_calls(model):
    """Spreads convolutions in every other call of the network, as nodes for large pictures do in early steps."""

    def wrapper(apply_model, given):
        calls.append(1)
        spread = len(calls) % 2 == 1
        modules = [model.get_model_object(path) for path in CONVS]
        for module in modules:
            module.dilation, module.padding = ((2, 2), (2, 2)) if spread else ((1, 1), (1, 1))
        try:
            return apply_model(given["input"], given["timestep"], **given["c"])
        finally:
            for module in modules:
                module.dilation, module.padding = (1, 1), (1, 1)

    calls: list[int] = []
    clone = model.clone()
    clone.set_model_unet_function_wrapper(wrapper)
    return clone


def hooks(model):
    def run(executor, *args, **more):
        handles = [
            model.get_model_object(path).register_forward_hook(lambda module, inputs, out: 1.3 * out) for path in BLOCKS
        ]
        try:
            return executor(*args, **more)
        finally:
            for handle in handles:
                handle.remove()

    clone = model.clone()
    clone.wrappers[WrappersMP.OUTER_SAMPLE] = {"theirs": [run], **clone.wrappers.get(WrappersMP.OUTER_SAMPLE, {})}
    return clone


NODES = {
    **{
        make.__name__: patched(BLOCKS, make)
        for make in (closure, default, partial, method, twice, object_method, by_name)
    },
    "object": patched(BLOCKS, Object),
    "object with a chosen method": patched(BLOCKS, Chosen),
    "on parts": patched([f"{path}.attn1.to_q" for path in BLOCKS] + [f"{path}.ff" for path in BLOCKS], closure),
    "on a block and its part": lambda m: patched([f"{path}.attn2" for path in BLOCKS], method)(
        patched(BLOCKS, closure)(m)
    ),
    "convolutions": patched(CONVS, wrapping, "_conv_forward"),
    "a setting": patched(CONVS, lambda module: "circular", "padding_mode"),
    "reference": reference,
    "for single calls": comes_late,
    "kept on modules": kept_on_modules,
    "shared state": shared_state,
    "used up": used_up,
    "knows the whole": knows_the_whole,
    "a setting for single calls": a_setting_for_single_calls,
    "hooks": hooks,
    "self-attention multiplied": lambda m: nodes_attention_multiply.UNetSelfAttentionMultiply.execute(
        m, 1.5, 0.8, 1.2, 0.7
    )[0],
    "cross-attention multiplied": lambda m: nodes_attention_multiply.UNetCrossAttentionMultiply.execute(
        m, 1.5, 0.8, 1.2, 0.7
    )[0],
}


# Functions in the options of a run that compute with layers of the network.


def attends(attn, q, options, factor=1.0):
    """Attention to words of its own, with the keys and values of a layer (as Attention Couple)."""
    words = torch.randn(1, 5, attn.to_k.in_features, generator=torch.Generator().manual_seed(9)).expand(len(q), -1, -1)
    return factor * optimized_attention(q, attn.to_k(words), attn.to_v(words), options["n_heads"])


def in_place_of_attention(make):
    """A node that replaces cross-attentions; make: attn2 -> patch."""

    def node(model):
        clone = model.clone()
        for path, n in zip(BLOCKS, (3, 6, 9), strict=True):
            clone.set_model_attn2_replace(make(model.get_model_object(f"{path}.attn2")), "output", n)
        return clone

    return node


def couples(attn):
    return lambda q, k, v, options: attends(attn, q, options)


class Couples:
    def __init__(self, attn):
        self.attn, self.calls = attn, 0

    def __call__(self, q, k, v, options):
        self.calls += 1
        return attends(self.attn, q, options, 1 + self.calls / 4)


def told_by_a_wrapper(model):
    """Its patches count their calls, and are set back before each call of the network."""

    def wrapper(apply_model, given):
        for patch in patches:
            patch.calls = float(given["timestep"][0]) / 10
        return apply_model(given["input"], given["timestep"], **given["c"])

    def make(attn):
        patches.append(Couples(attn))
        return patches[-1]

    patches = []
    clone = in_place_of_attention(make)(model)
    clone.set_model_unet_function_wrapper(wrapper)
    return clone


def of_one_number(model):
    """Two patches with one variable."""

    def before(q, k, v, options):
        nonlocal calls
        calls += 1
        return attn.to_q.bias if q is None else q, k, v

    def instead(q, k, v, options):
        return attends(attn, q, options, 1 + calls / 20)

    calls = 0
    attn = model.get_model_object(f"{BLOCKS[0]}.attn2")
    clone = model.clone()
    clone.set_model_attn2_patch(before)
    clone.set_model_attn2_replace(instead, "output", 3)
    return clone


def mean(linear, x):
    return 1 + 20 * linear.weight.mean().abs().to(x)


def round_the_network(model):
    def wrapper(executor, x, *args, **more):
        return executor(x * mean(linear, x), *args, **more)

    linear = model.get_model_object(f"{BLOCKS[0]}.attn2.to_k")
    clone = model.clone()
    clone.add_wrapper(WrappersMP.DIFFUSION_MODEL, wrapper)
    return clone


def an_attention_of_its_own(model):
    def attention(function, q, *args, **more):
        return function(q * mean(linear, q), *args, **more)

    linear = model.get_model_object(f"{BLOCKS[0]}.attn2.to_k")
    clone = model.clone()
    clone.model_options["transformer_options"]["optimized_attention_override"] = attention
    return clone


PATCHES = {
    "closure": in_place_of_attention(couples),
    "object": in_place_of_attention(Couples),
    "method": in_place_of_attention(lambda attn: Couples(attn).__call__),
    "partial": in_place_of_attention(lambda attn: functools.partial(lambda to, q, k, v, o: attends(to, q, o), attn)),
    **{node.__name__: node for node in (told_by_a_wrapper, of_one_number, round_the_network, an_attention_of_its_own)},
}


@pytest.mark.sweep(2)
@pytest.mark.parametrize("name", PATCHES)
def test_functions_in_the_options_compute_with_the_layers_of_the_pack(model, base, one_file, caplog, name):
    node, packed = PATCHES[name], small.with_pack(model, base)
    wanted, bare = small.sample(node(one_file)), small.sample(packed)
    assert small.difference(wanted, bare) > 1e-3
    for m in (node(packed), small.with_pack(node(model), base)):
        assert small.difference(small.sample(m), wanted) < 1e-5
    assert torch.equal(small.sample(packed), bare)
    assert "another node" not in caplog.text


@pytest.mark.sweep(2)
@pytest.mark.parametrize("name", ["closure", "told_by_a_wrapper", "round_the_network"])
@pytest.mark.parametrize("start", [0.0, 0.5])
def test_they_compute_with_the_checkpoint_where_the_pack_does_not_play(model, base, one_file, name, start):
    node = PATCHES[name]
    point = switch.SwitchPoint(0.5, "percent")
    first, second = (model, one_file) if start else (one_file, model)
    wanted = small.sample(switch.with_switch(node(first), node(second), point), steps=4)
    packed = small.with_pack(node(model), base, start=start, end=start + 0.5)
    assert small.difference(small.sample(packed, steps=4), wanted) < 1e-5


def test_what_they_count_they_count_in_all_steps(model, base):
    """Whoever plays: as without a pack."""
    patch = Couples(model.get_model_object(f"{BLOCKS[0]}.attn2"))
    clone = small.with_pack(model, base, start=0.5).clone()
    clone.set_model_attn2_replace(patch, "output", 3)
    small.sample(clone, steps=4)
    assert patch.calls == 4 and isinstance(patch.attn, torch.nn.Module)


def test_functions_that_cannot_be_given_the_layers_of_the_pack_are_told_once(model, base, caplog):
    def make(attn):
        table = {"attn": attn}
        holder = types.SimpleNamespace(table=table)
        return lambda q, k, v, options: attends(holder.table["attn"], q, options)

    small.sample(in_place_of_attention(make)(small.with_pack(model, base)), steps=3)
    assert caplog.text.count("another node computes with layers of the checkpoint") == 1
    assert "up.1.0.transformer (patches_replace.attn2)" in caplog.text


@pytest.mark.sweep(1)
@pytest.mark.parametrize("config", [SD, small.SDXL], ids=["sd", "sdxl"])
def test_layers_that_nobody_changed_are_played_as_they_are(folder, config):
    model = small.model(folder, config)
    pack = small.write_pack(folder / f"{config.family}.safetensors", config, "base" if config is SD else "ssd-1b")
    packed = small.with_pack(model, pack)
    small.sample(packed, config)
    (patcher,) = small.assigned.packs_of(packed).values()
    layers = units.layers(model.model.diffusion_model, config)
    for address in patcher.model._paths:
        found = carried.Carried(patcher.model.layer(address), layers[address])
        assert found.player is patcher.model.layer(address) and not found.name and not found.lost


@pytest.mark.sweep(3)
@pytest.mark.parametrize("name", NODES)
def test_what_others_change_acts_on_the_pack(model, base, one_file, caplog, name):
    node = NODES[name]
    bare, wanted = small.sample(one_file), small.sample(node(one_file))
    assert small.difference(wanted, bare) > 1e-3
    packed = small.with_pack(model, base)
    assert torch.equal(small.sample(packed), bare)
    for m in (node(packed), small.with_pack(node(model), base)):
        assert small.difference(small.sample(m), wanted) < 1e-5
    assert torch.equal(small.sample(packed), bare)
    assert "another node has changed layers" not in caplog.text


def test_it_acts_under_a_bypass_lora_and_in_a_part_of_the_run(model, base, one_file):
    lora = small.lora(seed=2)

    def both(m):
        loaded = small.comfy.sd.load_bypass_lora_for_models(NODES["closure"](m), None, lora, 0.8, 0)
        return loaded[0]

    assert small.difference(small.sample(both(small.with_pack(model, base))), small.sample(both(one_file))) < 1e-5
    window = small.with_pack(model, base, start=0.5)
    samples = small.sample(both(window), steps=4)
    assert small.difference(samples, small.sample(both(model), steps=4)) > 1e-3
    assert small.difference(samples, small.sample(window, steps=4)) > 1e-3


def test_weights_are_pinned_and_brought_to_the_card_once_for_all_runs(model, base):
    """With dynamic VRAM the host keeps on a module what it has pinned of it and what of it lies on the card."""
    done = []

    def forward(self, *args, **more):  # as comfy/pinned_memory.py and comfy/ops.py do it
        pins = vars(self).setdefault("_pins", {})
        if "weights" not in pins:
            done.append("pinned")
            pins["weights"] = {"pin": self.weight}
        if self._v_signature is None:
            done.append("loaded")
            self._v_signature, self._v_weight = 1, self.weight
        return type(self).forward(self, *args, **more)

    path = f"{BLOCKS[0]}.attn1.to_q"
    node = patched([path], lambda module: types.MethodType(forward, module))
    played = node(small.with_pack(model, base))
    (pack,) = in_host.module("nodes.engine.assigned").pack_patchers(played)
    leaf = pack.model.get_submodule(path)
    leaf._pin_state, leaf._v_signature = {}, None
    try:
        for _ in range(2):
            small.sample(played, steps=2)
        assert done == ["pinned", "loaded"]
        leaf._v_signature = None  # as the host does where patches have changed
        small.sample(played, steps=2)
        assert done == ["pinned", "loaded", "loaded"]
    finally:
        for name in ("_pin_state", "_v_signature", "_v_weight", "_pins"):
            vars(leaf).pop(name, None)


def test_a_difference_of_models_acts_on_the_pack(model, base, one_file, folder):
    second, third = small.model(folder, seed=3), small.model(folder, seed=4)
    (change,) = nodes_model_merging.ModelSubtract().merge(second, third, 1.0)

    def added(m):
        return nodes_model_merging.ModelAdd().merge(m, change)[0]

    wanted = small.sample(added(one_file))
    assert small.difference(wanted, small.sample(one_file)) > 1e-3
    # one_file lacks units, and Merge Add leaves alone what it lacks.
    assert small.difference(small.sample(added(small.with_pack(model, base))), wanted) < 1e-4


def test_a_merge_that_leaves_the_pack_alone_is_told(model, base, folder, caplog):
    caplog.set_level("INFO")
    (merged,) = nodes_model_merging.ModelMergeSimple().merge(
        small.with_pack(model, base), small.model(folder, seed=3), 0.5
    )
    small.sample(merged)
    assert caplog.text.count("merged with another one, also in layers that a pack plays") == 1


def test_what_comes_later_and_cannot_be_carried_over_is_told_once(model, base, caplog):
    """A function that holds a table of layers, put beside a forward from the second call of the network on."""

    def wrapper(apply_model, given):
        calls.append(1)
        if len(calls) > 1:
            layer.theirs = table.__call__
        return apply_model(given["input"], given["timestep"], **given["c"])

    calls: list[int] = []
    layer = model.get_model_object(BLOCKS[0])
    layer.theirs, table = None, Table(layer)
    table.table["layer"] = layer
    try:
        packed = NODES["closure"](small.with_pack(model, base))
        packed.set_model_unet_function_wrapper(wrapper)
        small.sample(packed, steps=3)
    finally:
        del layer.theirs
    assert len(calls) == 3
    assert caplog.text.count("there that node has no effect: up.1.0.transformer (transformer_blocks.0.theirs)") == 1


def test_what_others_put_on_a_cut_unit_is_told(model, base, caplog):
    cut = f"diffusion_model.{small.addresses.unit(SD, 'down.0.1.resnet').ldm}"
    small.sample(small.with_pack(patched([cut], closure)(model), base))
    assert caplog.text.count("there that node has no effect: down.0.1.resnet (forward)") == 1


class Table:
    """Holds the modules it changes in a table, by name."""

    def __init__(self, module):
        self.table = {"own": module.forward}

    def __call__(self, *args, **more):
        return 1.3 * self.table["own"](*args, **more)


def replaced_whole(model):
    clone = model.clone()
    twin = copy.deepcopy(model.get_model_object("diffusion_model.input_blocks.4.0"))
    clone.add_object_patch("diffusion_model.input_blocks.4.0", twin)
    return clone


def another_class(model):
    class Doubled(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, *args):
            return 2 * self.layer(*args)

    clone = model.clone()
    clone.add_object_patch(CONVS[0], Doubled(model.get_model_object(CONVS[0])))
    return clone


LOST = {
    "a table": (patched(BLOCKS[:1], Table), "up.1.0.transformer (transformer_blocks.0.forward)"),
    "a layer": (replaced_whole, "down.1.0.resnet (the whole layer)"),
    "a part": (another_class, "down.0.0.resnet (in_layers.2"),
}


@pytest.mark.parametrize("name", LOST)
def test_what_cannot_be_carried_over_is_said_once(model, base, caplog, name):
    node, where = LOST[name]
    packed = small.with_pack(model, base)
    bare = small.sample(packed)
    caplog.clear()
    assert torch.equal(small.sample(node(packed)), bare)
    assert caplog.text.count("another node has changed layers") == 1 and where in caplog.text
    caplog.clear()
    assert torch.equal(small.sample(packed), bare) and "another node" not in caplog.text


def test_a_bypass_lora_acts_on_the_first_expert(model, folder):
    settings = small.condconv.CondConv(dict.fromkeys(list(small.condconv.convolutions(SD))[:4], 3))
    experts = small.write_experts(folder / "experts.safetensors", settings, seed=3)
    lora = small.lora(seed=2)
    packed = small.with_pack(model, experts)

    def bypassed(m):
        return small.comfy.sd.load_bypass_lora_for_models(m, None, lora, 0.8, 0)[0]

    # What a LoRA adds in bypass is what it adds to the weights, which the first expert has in common with the layer.
    wanted = small.sample(small.add_lora(packed, lora, 0.8))
    assert small.difference(small.sample(bypassed(packed)), wanted) < 1e-3
    assert small.difference(wanted, small.sample(packed)) > 0.01
