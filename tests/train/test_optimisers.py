"""Optimisers by name, moments on the CPU and compiled parts: the same run, and the same after it was resumed."""

import sys
import types

import pytest
import torch
from accelerate import Accelerator
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors.torch import load_file
from torch._dynamo import register_backend

from tests.train.recipes import NARROW
from train import loop, networks
from train.recipe import load
from train.dry_run import memory, meta_student
from train.loop import train
from train.taps import Tapped
from train.optimisation import KINDS, Average, Kind, OnCPU, make_optimiser, moments, prepared, restore_moments


class Halves(torch.Tensor):
    """A tensor made of two, as torchao keeps 8-bit moments."""

    @staticmethod
    def __new__(cls, high, low):
        return torch.Tensor._make_wrapper_subclass(cls, high.shape, dtype=torch.float32)

    def __init__(self, high, low):
        self.high, self.low = high, low

    def __tensor_flatten__(self):
        return ["high", "low"], []

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError("only its halves are ever used")


class Odd(torch.optim.Optimizer):
    """A state of all kinds: a count that is no tensor, codes of a byte, and a tensor made of two."""

    def __init__(self, parameters, lr, weight_decay, betas):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "betas": betas})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    zeros = torch.zeros_like(p)
                    state |= {"step": 0, "codes": zeros.to(torch.uint8), "mean": Halves(zeros.clone(), zeros.clone())}
                state["step"] += 1
                state["mean"].high.lerp_(p.grad, 0.1)
                state["mean"].low.add_(p.grad.abs())
                state["codes"].copy_(state["mean"].low.clamp(0, 1).mul(255).to(torch.uint8))
                size = state["mean"].low.sqrt() + state["codes"].float() / 255 + 1e-3
                p.sub_(group["lr"] * state["mean"].high / size / state["step"])


@pytest.fixture()
def odd(monkeypatch):
    library = types.ModuleType("odd_library")
    library.Odd = Odd
    monkeypatch.setitem(sys.modules, "odd_library", library)
    monkeypatch.setitem(KINDS, "odd", Kind("odd_library", "Odd", "odd-library", lambda shape: 3.0))


class Stop(Exception):
    pass


def run(folder, monkeypatch, *changes, stop=None):
    config = load(
        NARROW,
        ["run.steps=4", "run.save_every=2", "run.picture_every=0", "run.log_every=1", *changes, f"run.folder={folder}"],
    )
    with monkeypatch.context() as m:
        original = loop.learning_rate

        def until(config, step):
            if step == stop:
                raise Stop
            return original(config, step)

        m.setattr(loop, "learning_rate", until)
        try:
            train(config, Accelerator(cpu=True))
        except Stop:
            return None
    return load_file(max(folder.glob("checkpoint-*.safetensors")))


@pytest.mark.sweep(2)
@pytest.mark.parametrize(
    "changes",
    [["optimiser.kind=muon"], ["optimiser.kind=odd"], ["optimiser.kind=adafactor"], ["run.offload=true"]],
)
def test_a_resumed_run_equals_an_unbroken_one(changes, odd, tmp_path, monkeypatch):
    whole = run(tmp_path / "whole", monkeypatch, *changes)
    run(tmp_path / "broken", monkeypatch, *changes, stop=3)
    broken = run(tmp_path / "broken", monkeypatch, *changes)
    assert whole.keys() == broken.keys() and all(torch.equal(v, broken[k]) for k, v in whole.items())
    plain = run(tmp_path / "plain", monkeypatch)
    same = all(torch.equal(v, whole[k]) for k, v in plain.items() if k.startswith(("weights.", "average.")))
    assert same == (changes == ["run.offload=true"])
    if same:  # a run may go on on another machine
        run(tmp_path / "mixed", monkeypatch, stop=3)
        mixed = run(tmp_path / "mixed", monkeypatch, *changes)
        assert all(torch.equal(v, mixed[k]) for k, v in plain.items())


def test_compiled_parts_compute_the_same_and_are_caught_between():
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    register_backend(counting, name="asdm_counting")
    torch.manual_seed(0)
    small = {
        "block_out_channels": (8,),
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
        "mid_block_type": None,
        "layers_per_block": 1,
        "cross_attention_dim": 8,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
    }
    unet = UNet2DConditionModel(**small)
    names = {name for name, _ in unet.named_parameters()}
    given = torch.randn(1, 4, 8, 8), torch.tensor([7]), torch.randn(1, 3, 8)
    tapped = Tapped(unet, ["down_blocks.0.resnets.0"])
    found = []
    for compiled in (False, True):
        if compiled:
            assert not graphs
            networks.compile_parts(unet, "asdm_counting")
        predicted, features = tapped(*given)
        (predicted.square().mean() + features["down_blocks.0.resnets.0"].mean()).backward()
        found.append([predicted.detach(), *features.values(), *(p.grad.clone() for p in unet.parameters())])
        unet.zero_grad()
    assert graphs and names == {name for name, _ in unet.named_parameters()}
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "package"), [("adamw-8bit", "bitsandbytes"), ("adamw-8bit-torchao", "torchao")])
def test_a_library_that_is_missing_is_named(kind, package, monkeypatch):
    monkeypatch.setitem(sys.modules, f"{package}.optim", None)
    with pytest.raises(
        ValueError, match=f"needs the library {package}: pip install {package}; or take another of adamw"
    ):
        make_optimiser(kind, [torch.nn.Parameter(torch.zeros(2))], 1e-3, (0.9, 0.99), 0.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["optimiser.kind=adam"], "optimiser.kind: 'adam' is none of adamw"),
        (["run.offload=true", "run.shard=true"], "run.offload goes with optimiser.kind = adamw and without run.shard"),
        (["run.offload=true", "optimiser.kind=adafactor"], "run.offload goes with .* got 'adafactor'"),
        (["run.shard=true", "optimiser.kind=adafactor"], "run.shard goes with optimiser.kind = adamw"),
        (["run.compile=fast"], "run.compile: 'fast' is none of torch's backends: .*inductor"),
    ],
)
def test_what_does_not_go_together_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        load(NARROW, changes)


def test_moments_on_the_cpu_are_those_of_the_plain_optimiser():
    g = torch.Generator().manual_seed(0)
    ends = []
    for offloaded in (False, True):
        p = torch.nn.Parameter(torch.arange(6.0))

        def make(parameters):
            return make_optimiser("adamw", parameters, 0.1, (0.9, 0.99), 0.01)

        optimiser = OnCPU([p], make) if offloaded else make([p])
        for step in range(3):
            for group in optimiser.param_groups:
                group["lr"] = 0.1 / (step + 1)
            p.grad = torch.randn(6, generator=g.manual_seed(step))
            optimiser.step()
            optimiser.zero_grad()
        ends.append((p.detach().clone(), moments(optimiser, p)))
    assert torch.equal(ends[0][0], ends[1][0])
    assert ends[0][1].keys() == ends[1][1].keys() and all(torch.equal(v, ends[1][1][k]) for k, v in ends[0][1].items())


def test_moments_on_the_cpu_stay_there_where_a_run_goes_on():
    """accelerate puts an optimiser's state beside its weights. "meta" stands for the card."""

    def make(parameters):
        return make_optimiser("adamw", parameters, 0.1, (0.9, 0.99), 0.01)

    optimiser = OnCPU([torch.nn.Parameter(torch.zeros(4, 4, device="meta"))], make)
    ((p, mine),) = optimiser.pairs
    mine.grad = torch.ones(4, 4)
    optimiser.inner.step()
    optimiser.state[p] = optimiser.inner.state[mine]  # as a checkpoint leaves it
    prepared(Accelerator(cpu=True), optimiser)
    assert {value.device.type for value in optimiser.state[p].values()} == {"cpu"}


def test_muon_turns_gradients_of_matrices_and_leaves_the_rest_to_adamw():
    g = torch.Generator().manual_seed(0)
    weights = {"conv": (48, 16, 3, 3), "linear": (32, 64), "norm": (48,)}
    start = {name: torch.randn(shape, generator=g) for name, shape in weights.items()}
    gradients = {name: torch.randn(shape, generator=g) for name, shape in weights.items()}
    ends = {}
    for kind in ("muon", "adamw"):
        parameters = {name: torch.nn.Parameter(value.clone()) for name, value in start.items()}
        optimiser = make_optimiser(kind, parameters.values(), 1e-3, (0.9, 0.99), 0.0)
        optimiser.param_groups[0]["lr"] = 0.1  # as the loop sets it
        for name, p in parameters.items():
            p.grad = gradients[name].clone()
        optimiser.step()
        ends[kind] = {name: start[name] - p.detach() for name, p in parameters.items()}
    torch.testing.assert_close(ends["muon"]["norm"], ends["adamw"]["norm"])
    for name in ("conv", "linear"):
        step, gradient = ends["muon"][name].flatten(1).double(), gradients[name].flatten(1).double()
        u, s, v = torch.linalg.svd(gradient, full_matrices=False)
        along = torch.einsum("ij,jk,ki->i", u.T, step, v.T)  # the step in the gradient's own directions
        # All of them alike: torch's iteration brings each to between .7 and 1.2. The length is AdamW's.
        assert along.min() > 0.5 * along.mean() and along.max() < 1.5 * along.mean() and s.max() > 2 * s.min()
        size = step.square().mean().sqrt()
        assert size == pytest.approx(float(ends["adamw"][name].square().mean().sqrt()) * 0.2, rel=0.2)


def test_restoring_moments_moves_nothing_and_leaves_no_gradient(odd):
    p = torch.nn.Parameter(torch.arange(6.0))
    optimiser = make_optimiser("odd", [p], 0.1, (0.9, 0.99), 0.0)
    p.grad = torch.ones(6)
    optimiser.step()
    kept = {k: v.clone() for k, v in moments(optimiser, p).items()}
    assert kept.keys() == {"step", "codes", "mean/high", "mean/low"}
    again = make_optimiser("odd", [q := torch.nn.Parameter(p.detach().clone())], 0.1, (0.9, 0.99), 0.0)
    restore_moments(again, [(q, kept)])
    assert torch.equal(p, q) and q.grad is None and again.state[q]["step"] == 1 and again.param_groups[0]["lr"] == 0.1
    assert all(torch.equal(v, moments(again, q)[k]) for k, v in kept.items())


@pytest.mark.parametrize("shape", [(64, 48, 3, 3), (70, 80), (5,)])
@pytest.mark.parametrize("kind", ["adamw", "adafactor", "muon"])
def test_the_plan_counts_what_an_optimiser_keeps(kind, shape):
    p = torch.nn.Parameter(torch.zeros(shape))
    optimiser = make_optimiser(kind, [p], 1e-3, (0.9, 0.99), 0.0)
    p.grad = torch.ones(shape)
    optimiser.step()
    real = sum(v.nbytes for v in moments(optimiser, p).values() if v.dim())
    assert KINDS[kind].moments(shape) * p.numel() == pytest.approx(real)


def test_the_plan_knows_where_everything_is():
    needs = {}
    for change in ("optimiser.kind=adamw", "optimiser.kind=adamw-8bit", "optimiser.kind=adafactor", "run.offload=true"):
        config = load(NARROW, [change])
        needs[change.split("=")[1]] = memory(meta_student(config), config, 1)
    plain, eight, factored, offloaded = needs.values()
    trained = plain.average // 4
    # Small tensors stay whole, and this network is narrow.
    assert plain.optimiser == 8 * trained and 2 * trained < eight.optimiser < plain.optimiser
    assert factored.optimiser < 4 * trained and plain.cpu == 0
    assert (offloaded.optimiser, offloaded.average, offloaded.cpu) == (0, 0, 20 * trained)
    assert plain.total - offloaded.total == 12 * trained


def test_an_average_may_lie_elsewhere():
    weights = {"a": torch.ones(3)}
    average = Average(weights, 0.5, torch.device("cpu"))
    weights["a"].mul_(3)
    average.update(weights, 100)
    assert torch.equal(average.weights["a"], torch.full((3,), 2.0))
