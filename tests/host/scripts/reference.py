"""What the techniques must compute, made of stock modules without asdm's dispatcher: for comparison."""

from contextlib import contextmanager
from functools import partial

import comfy.model_management
import comfy.ops
import small
import torch
from comfy.patcher_extension import WrappersMP
from in_host import module

units = module("nodes.engine.units")


class Inheriting:
    """Feature inheritance by forward hooks on the host's modules.

    A chunk of a batch is told from others by the step (from its sigma), its uuid, its kind of conditioning and how
    often these were seen in the step. full: steps that compute whatever the plan says. Forecasts are beyond it.
    """

    def __init__(self, model, config, plan, full=()):
        self.plan, self.full = plan, full
        layers = units.layers(model.model.diffusion_model, config)
        self.held = {}
        self.seen = []
        self.step = None
        self.chunks = []
        self.hooks = [model.model.diffusion_model.register_forward_pre_hook(self.begin, with_kwargs=True)]
        for address, what in plan.reuse(config, small.network.architecture_of(model).cut).items():
            layer = layers[address] if address in layers else self.part(layers, address)
            onto = what == "residual" and address in layers  # what a part makes is a residual already
            self.hooks.append(layer.register_forward_hook(partial(self.play, address, onto)))

    @staticmethod
    def part(layers, address):
        transformer, block, part = address.rsplit(".", 2)
        return getattr(layers[transformer].transformer_blocks[int(block)], part)

    def begin(self, unet, args, kwargs):
        options = kwargs["transformer_options"]
        nodes = options["sample_sigmas"][:-1]
        sigma = options["sigmas"][0]
        # The nearest level, and of two equal ones (restarts) the first that has not been passed.
        nearest = (nodes - sigma).abs()
        steps = (nearest == nearest.min()).nonzero().flatten().tolist()
        step = next((s for s in steps if s >= (self.step or 0)), steps[-1])
        if step != self.step:
            self.step = step
            self.seen = []
            self.source = self.plan.sources(len(nodes))[step]
        self.chunks = []
        for chunk in zip(options["uuids"], options["cond_or_uncond"], strict=True):
            self.seen.append(chunk)
            self.chunks.append((*chunk, self.seen.count(chunk)))

    def play(self, address, onto, layer, args, out):
        x = args[0]
        fresh = 0 if not onto else layer.skip_connection(x) if hasattr(layer, "skip_connection") else x
        held = [self.held.get((address, chunk), (None, None)) for chunk in self.chunks]
        if self.source < self.step and self.step not in self.full and all(step == self.source for step, _ in held):
            return fresh + torch.cat([value for _, value in held])
        if self.source == self.step:
            values = (out - fresh).chunk(len(self.chunks))
            self.held.update(
                {(address, chunk): (self.step, value) for chunk, value in zip(self.chunks, values, strict=True)}
            )
        return None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()


@contextmanager
def _other_forwards(forwards):
    """forwards: module -> what it computes meanwhile. Nothing stays loaded, so that others who wrap forwards come after
    us.
    """
    comfy.model_management.unload_all_models()
    for layer, forward in forwards.items():
        layer.forward = forward
    try:
        yield
    finally:
        comfy.model_management.unload_all_models()
        for layer in forwards:
            del layer.forward


def cut(model, architecture):
    """Within: the units that an architecture cuts pass their input on in a MODEL that has them all."""
    layers = units.layers(model.model.diffusion_model, architecture.config)

    def passing(unit):
        return lambda x, *args, **kwargs: small.surgery.pass_through(unit, x).clone()

    return _other_forwards(
        {layers[a]: passing(small.addresses.unit(architecture.config, a)) for a in architecture.cut_units}
    )


def mixed_convolution(layer, tensors, strength=1.0):
    """The forward of a convolution with further experts: the formula, sample by sample, on its own weights."""

    def forward(x):
        out = []
        kernel, offset, stream = comfy.ops.cast_bias_weight(layer, x, offloadable=True)
        for sample in x:
            r = torch.sigmoid(tensors["router.weight"] @ sample.mean((1, 2)) + tensors["router.bias"])
            weight, bias = kernel.clone(), offset.clone()
            for r_k, w, b in zip(
                r, tensors["experts.weight"].chunk(len(r)), tensors["experts.bias"].chunk(len(r)), strict=True
            ):
                weight, bias = weight + strength * r_k * w, bias + strength * r_k * b
            out.append(torch.nn.functional.conv2d(sample[None], weight, bias, layer.stride, layer.padding))
        comfy.ops.uncast_bias_weight(layer, kernel, offset, stream)
        return torch.cat(out)

    return forward


def experts(model, path, strength=1.0):
    """Within: the convolutions of a MODEL compute with the experts of a pack file."""
    pack = small.packs.open_pack(path)
    layers = {conv: model.model.diffusion_model.get_submodule(conv.path("ldm")) for conv in pack.description.convs}
    leaves = pack.description.condconv.shapes
    return _other_forwards(
        {
            layer: mixed_convolution(layer, {leaf: pack.tensors[conv.key(leaf)] for leaf in leaves(conv)}, strength)
            for conv, layer in layers.items()
        }
    )


def filtered(model, plan):
    """A MODEL whose results are forecast by a filter that knows the order of calls and nothing else: results at the
    steps a plan leaves out, in straight lines of v of the textbook. Nothing is drawn on from steps of features.
    """
    kept, seen = {}, []

    def filter_calls(executor, base, conds, x, timestep, options):
        sigma = float(timestep.flatten()[0])
        if not seen or seen[-1] != sigma:
            seen.append(sigma)
            kept["calls"] = 0
        kept["calls"] += 1
        s, n = len(seen) - 1, kept["calls"]
        alpha = 1 / (1 + sigma**2) ** 0.5
        if plan.actions[s].kind == "features":
            return executor(base, conds, x, timestep, options)
        if plan.actions[s].computes:
            out = executor(base, conds, x, timestep, options)
            v = [alpha * (x - o) / sigma - alpha * sigma * o for o in out]
            kept[n] = [*kept.get(n, [])[-1:], (s, v)]
            return out
        q, new = kept[n][-1]
        p, old = kept[n][0] if len(kept[n]) == 2 else (q - 1, new)  # a single one is held
        return [alpha**2 * x - alpha * sigma * (b + (b - a) * (s - q) / (q - p)) for a, b in zip(old, new, strict=True)]

    m = model.clone()
    m.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "filter", filter_calls)
    return m
