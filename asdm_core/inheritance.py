"""Feature inheritance: which units keep an earlier step's features, and at which steps.

The tuning-free half of A-SDM II (arXiv 2406.00210; only its abstract names the idea: "skip the local
computation at the block, layer, or unit level", with several sampling modes over the time steps).
What lies beneath the abstract is defined here; relatives are DeepCache (2312.00858), Faster Diffusion
(2312.09608), T-GATE (2404.02747) and PAB (2408.12588).

A plan is plain, frozen data: rules (targets and what of them is reused) and a schedule (which steps
compute). The decision "who plays this unit at this step" is pure; `nodes/` only carries it out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from .addresses import NO_MID, Unit, UNetConfig, select, unit, walk
from .architecture import Architecture, first_resnet
from .measure import UnitCost, costs, sizes
from .text import read_json

FORMAT = 2
REUSE = ("output", "residual", "forecast")
_FORMAT_1 = {"branch": "residual"}  # values of `reuse` in plans of format 1
MODES = ("uniform", "early-dense", "late-dense", "quadratic", "windows", "explicit", "adaptive")
PARTS = ("attn1", "attn2", "ff")


# When -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Schedule:
    """Which steps compute in full. The first step always does; all others inherit from the last full one.

    mode:
      uniform       every `interval`-th step.
      early-dense   as many full steps as uniform, closer together early in the run: the k-th of m lies
                    at n (k/m)^power, or at the next step that is free.
      late-dense    the mirror image: n (1 - (1 - k/m)^power).
      quadratic     closest together around `centre` (0..1 of the run), thinning out to both sides with
                    distance^power; DeepCache's non-uniform schedule with the sign kept.
      windows       uniform inside each window (start, end, interval), in 0..1 of the run; full outside.
      explicit      exactly `steps`, counted from 0; in a run of another length than `of`, the steps at the same
                    place of the run (of = 0: the same numbers).
      adaptive      a step inherits while the relative change of the first computed layer since the last
                    full step stays below `threshold`, at most `max_run` times in a row.
    first, last: so many steps at the ends of the run always compute.
    repeats: samplers with several evaluations a step (heun, dpm_2, dpmpp_sde) come back to each step; whether these
             further evaluations inherit from the first. A full step then costs half, so once a sampler has come
             back, the interval is halved (rounded up). Not for explicit and adaptive, nor where a step must compute.
    """

    mode: str = "uniform"
    interval: int = 2
    power: float = 1.4
    centre: float = 0.3
    windows: tuple[tuple[float, float, int], ...] = ()
    steps: tuple[int, ...] = ()
    of: int = 0
    threshold: float = 0.1
    max_run: int = 4
    first: int = 1
    last: int = 0
    repeats: bool = True

    def __post_init__(self) -> None:
        def wrong(what: str) -> ValueError:
            return ValueError(f"inheritance schedule: {what}")

        if self.mode not in MODES:
            raise wrong(f"mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        for name, least in (("interval", 1), ("max_run", 1), ("first", 1), ("last", 0), ("of", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise wrong(f"{name} must be a whole number of at least {least}, got {value!r}")
        if not (math.isfinite(self.power) and self.power >= 1):
            raise wrong(f"power must be at least 1, got {self.power}")
        if not 0 <= self.centre <= 1:
            raise wrong(f"centre lies between 0 and 1, got {self.centre}")
        if not (math.isfinite(self.threshold) and self.threshold >= 0):
            raise wrong(f"threshold must not be negative, got {self.threshold}")
        if self.mode == "windows" and not self.windows:
            raise wrong("mode windows needs at least one window")
        for start, end, interval in self.windows:
            if not 0 <= start < end <= 1 or interval < 1:
                raise wrong(
                    f"a window is (start, end, interval) with 0 <= start < end <= 1, got {(start, end, interval)}"
                )
        if any(s < 0 for s in self.steps):
            raise wrong(f"steps count from 0, got {min(self.steps)}")

    def returning(self) -> Schedule:
        """The schedule in a run whose sampler comes back to each step."""
        if not self.repeats:
            return self
        return replace(
            self, interval=-(-self.interval // 2), windows=tuple((a, b, -(-n // 2)) for a, b, n in self.windows)
        )

    def repeating(self, n: int) -> tuple[bool, ...]:
        """For each of n steps, whether its further evaluations inherit from its first. A schedule that inherits nothing
        repeats nothing.
        """
        if not self.repeats or self.mode in ("explicit", "adaptive") or all(self.computed(n)):
            return (False,) * n
        within = (
            set(range(n))
            if self.mode != "windows"
            else {s for s in range(n) if any(a <= s / n < b for a, b, _ in self.windows)}
        )
        return tuple(s in within and self.first <= s < n - self.last for s in range(n))

    def computed(self, n: int) -> tuple[bool, ...]:
        """For each of n steps, whether it computes in full. Adaptive: the steps that must, whatever happens."""
        full = set(self._chosen(n)) | set(range(min(self.first, n))) | set(range(max(n - self.last, 0), n))
        return tuple(s in full for s in range(n))

    def _chosen(self, n: int) -> Iterable[int]:
        if self.mode == "uniform":
            return range(0, n, self.interval)
        if self.mode == "windows":
            return self._windowed(n)
        if self.mode == "explicit":
            return (min(round(s * n / self.of), n - 1) for s in self.steps) if self.of else self.steps
        return self._uneven(n) if self.mode != "adaptive" else ()

    def _uneven(self, n: int) -> list[int]:
        """As many different steps as uniform has, where the mode's formula puts them."""
        m = math.ceil(n / self.interval)
        found: list[int] = []
        for k in range(m):
            lowest = found[-1] + 1 if found else 0
            found.append(min(max(int(self._place(n, k / m) + 1e-9), lowest), n - m + k))
        return found

    def _place(self, n: int, share: float) -> float:
        if self.mode == "early-dense":
            return float(n * share**self.power)
        if self.mode == "late-dense":
            return float(n * (1 - (1 - share) ** self.power))
        centre = self.centre * n
        low, high = -(centre ** (1 / self.power)), (n - centre) ** (1 / self.power)
        x = low + (high - low) * share
        return centre + math.copysign(abs(x) ** self.power, x)

    def _windowed(self, n: int) -> Iterable[int]:
        inside: dict[int, int | None] = {s: None for s in range(n)}
        for start, end, interval in self.windows:
            steps = [s for s in range(n) if start <= s / n < end]
            inside.update({s: i % interval for i, s in enumerate(steps)})
        return (s for s, phase in inside.items() if not phase)

    def inherits(self, n: int, step: int, last_full: int, change: float) -> bool:
        """Adaptive mode: whether a step may inherit, given the change since the last full step."""
        return not self.computed(n)[step] and step - last_full <= self.max_run and change < self.threshold


# What -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """Targets that inherit, and what of them is reused.

    targets: a range expression of `addresses.select`; whole units, or parts of transformer blocks as
             `TRANSFORMERS.attn1` (`up.3.*.transformer.*.attn2`).
    reuse:   "output": the tensor itself. "residual": what is added to the unit's input, so fresh input flows
             on. "forecast": the output, extrapolated linearly over steps from the last two computed.
             Parts always reuse their residual ("output" and "residual" mean the same there).
    """

    targets: str
    reuse: str = "output"

    def __post_init__(self) -> None:
        if self.reuse not in REUSE:
            raise ValueError(f"inheritance: reuse must be one of {', '.join(REUSE)}, got {self.reuse!r}")
        if not isinstance(self.targets, str) or not self.targets.strip():
            raise ValueError("inheritance: a rule must name at least one target")


def targets(config: UNetConfig, expression: str) -> frozenset[str]:
    """Unit addresses and part addresses (`down.0.0.transformer.0.attn1`) of a range expression.

    A term that starts with `!` takes units and parts out again, also parts of a unit that was chosen whole.
    """
    chosen: set[str] = set()
    units = {u.address: u for u in walk(config)}
    for term in expression.replace(",", " ").split():
        bare = term.removeprefix("!")
        head, _, part = bare.rpartition(".")
        parts = set(part.split("|"))
        if head and parts <= set(PARTS):
            found = _parts(_blocks(config, head), parts)
        else:
            found = {a for a in select(config, bare) if not a.startswith("stem.")}
            found = {a for a in found if a in units} | _parts(found - set(units))
        chosen = _without(units, chosen, found) if term.startswith("!") else chosen | found
    return frozenset(chosen)


def _parts(blocks: Iterable[str], parts: Iterable[str] = PARTS) -> set[str]:
    return {f"{b}.{p}" for b in blocks for p in parts}


def _without(units: Mapping[str, Unit], chosen: set[str], out: set[str]) -> set[str]:
    """A choice of units and parts without some others. A unit that loses a part is left with its other parts."""
    left = set()
    for address in chosen - out:
        if address not in units:
            left |= {address} if _owner(address) not in out else set()
        elif out.isdisjoint(parts := _parts(units[address].blocks)):
            left.add(address)
        else:
            left |= parts - out
    return left


def _owner(part: str) -> str:
    return part.rsplit(".", 2)[0]


def _blocks(config: UNetConfig, expression: str) -> set[str]:
    units = {u.address: u for u in walk(config)}
    found: set[str] = set()
    for address in select(config, expression):
        found.update(units[address].blocks if address in units else (address,))
    if not found:
        raise ValueError(f"inheritance: {expression!r} holds no transformer")
    return found


@dataclass(frozen=True)
class Plan:
    """Feature inheritance for one UNet family: rules, schedule. JSON both ways. Raises ValueError."""

    rules: tuple[Rule, ...]
    schedule: Schedule = Schedule()
    name: str = ""

    def __post_init__(self) -> None:
        if not self.rules:
            raise ValueError("inheritance: a plan needs at least one rule")

    def reuse(self, config: UNetConfig, cut: frozenset[str] = frozenset()) -> dict[str, str]:
        """Target address -> what is reused there, for the units and parts this plan reaches and nobody cut.

        A unit that inherits as a whole leaves nothing for its parts to inherit.
        """
        chosen: dict[str, str] = {}
        units = {u.address: u for u in walk(config)}
        for rule in self.rules:
            for address in targets(config, rule.targets):
                whole = address in units
                owner = address if whole else _owner(address)
                if owner in cut or not whole and address.rpartition(".")[0] in cut:
                    continue
                if rule.reuse == "residual" and whole and units[address].kind not in ("resnet", "transformer"):
                    raise ValueError(f"inheritance: {address} has no residual: it replaces its input; use output")
                chosen[address] = "residual" if rule.reuse == "output" and not whole else rule.reuse
        return {a: r for a, r in chosen.items() if a in units or _owner(a) not in chosen}

    def reusing(self, what: str) -> Plan:
        """The same plan with all rules reusing "output", "residual" or "forecast"."""
        name = self.name if what == "output" or not self.name else f"{self.name}, {what}"
        return replace(self, rules=tuple(replace(r, reuse=what) for r in self.rules), name=name)

    def sources(self, n: int, returns: bool = False) -> tuple[int, ...]:
        """For each step, the step its inherited features come from; its own number where it computes.

        returns: for a sampler that comes back to each step.
        """
        result, last = [], 0
        schedule = self.schedule.returning() if returns else self.schedule
        for step, full in enumerate(schedule.computed(n)):
            last = step if full else last
            result.append(last)
        return tuple(result)

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "name": self.name,
            "rules": [asdict(r) for r in self.rules],
            "schedule": asdict(self.schedule),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        version = data.get("format") if isinstance(data, Mapping) else None
        if isinstance(data, Mapping) and data.get("technique") == "profile":  # see `profile`
            raise ValueError(
                "inheritance plan: this is a profile of Calibrate and no plan; connect the MODEL output of Calibrate "
                "in place of Feature Inheritance, or choose the profile by its name in Speed Up."
            )
        if isinstance(version, bool) or version not in range(1, FORMAT + 1):
            raise ValueError(f"inheritance plan: wanted a JSON object of format 1 to {FORMAT}, got {str(data)[:80]}")
        renamed = _FORMAT_1 if version == 1 else {}
        try:
            schedule = dict(data.get("schedule", {}))
            schedule["windows"] = tuple((float(a), float(b), int(n)) for a, b, n in schedule.get("windows", ()))
            schedule["steps"] = tuple(int(s) for s in schedule.get("steps", ()))
            rules = tuple(
                Rule(**{name: renamed.get(value, value) if name == "reuse" else value for name, value in r.items()})
                for r in data["rules"]
            )
            return cls(rules, Schedule(**schedule), str(data.get("name", "")))
        except (AttributeError, KeyError, TypeError, OverflowError) as e:
            raise ValueError(f"inheritance plan: {e}") from None

    def to_json(self) -> str:
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> Plan:
        try:
            data = read_json(text)
        except ValueError:
            raise ValueError("inheritance plan: this is not valid JSON") from None
        return cls.from_dict(data)


# Presets --------------------------------------------------------------------------------------------


def _all(config: UNetConfig) -> str:
    return "down, mid, up" if config.mid > NO_MID else "down, up"


def deepcache(config: UNetConfig, branch: int, schedule: Schedule = Schedule()) -> Plan:
    """DeepCache at skip branch b, counted from the shallowest (0 = conv_in), by the LDM index rule.

    A retrieve step runs input_blocks[0..b] and output_blocks[n_out-1-b..]; everything between is
    inherited. The rule holds for every number of layers, unlike layer = b % 3, block = b // 3.
    """
    index = {
        u.address: (u.ldm.split(".")[0], int(u.ldm.split(".")[1]))
        for u in walk(config)
        if u.ldm.startswith(("input_blocks.", "output_blocks."))
    }
    last = max(n for _, n in index.values())
    if not 0 <= branch < last:
        raise ValueError(f"inheritance: branch must lie between 0 and {last - 1}, got {branch}")
    runs = [
        a
        for a, (name, n) in index.items()
        if not a.startswith("stem.") and (n <= branch if name == "input_blocks" else n >= last - branch)
    ]
    return Plan((Rule(", ".join([_all(config), *(f"!{a}" for a in runs)])),), schedule, f"deepcache-{branch}")


def shallow_only(config: UNetConfig, schedule: Schedule = Schedule()) -> Plan:
    """Only the first encoder layer and the last decoder layer compute; everything beneath is inherited."""
    last = config.levels - 1
    inner = f"{_all(config)}, !down.0.0, !up.{last}.{len(config.up[last]) - 1}"
    return Plan((Rule(inner),), schedule, "shallow-only")


def encoder(config: UNetConfig, schedule: Schedule = Schedule()) -> Plan:
    """Encoder and mid block are inherited, the decoder computes (Faster Diffusion)."""
    return Plan((Rule("down, mid" if config.mid > NO_MID else "down"),), schedule, "encoder")


def attention(config: UNetConfig, parts: str = "attn1|attn2", schedule: Schedule = Schedule()) -> Plan:
    """The attention outputs of every transformer are inherited: "attn1", "attn2" or both."""
    sides = [
        f"{side}.*.*.transformer.*.{parts}"
        for side, depths in (("down", config.down), ("up", config.up))
        if any(d for level in depths for d in level)
    ]
    if config.mid > 0:
        sides.append(f"mid.0.transformer.*.{parts}")
    return Plan((Rule(", ".join(sides)),), schedule, parts.replace("|", "+"))


# The dial of the node: where a DeepCache plan with forecasts at the shallowest branch begins; from there on every other
# step inherits. What early steps inherit makes another picture, so each position leaves them alone: chosen on the emoji
# family over CFG 3 and 7, euler and dpmpp_2m karras, 20 and 30 steps, so that none is behind the same sampler in fewer
# steps (bench/inheritance.py).
DIALS = {"faithful": 0.8, "balanced": 0.66, "fast": 0.6}


def dial(config: UNetConfig, name: str) -> Plan:
    """The plan of a dial position: "faithful", "balanced" or "fast"."""
    schedule = Schedule("windows", windows=((DIALS[name], 1.0, 2),))
    return replace(deepcache(config, 0, schedule).reusing("forecast"), name=name)


# What happens on an inherited step ----------------------------------------------------------------------


@dataclass(frozen=True)
class Flow:
    """The data flow of an inherited step. Units in neither set do nothing: nobody reads what they would make.

    computes: units that run. recalls: units whose remembered output somebody reads; only these are kept.
    """

    computes: frozenset[str]
    recalls: frozenset[str]


def flow(config: UNetConfig, inherited: Iterable[str]) -> Flow:
    """Data flow of a step on which the outputs of the units `inherited` are not computed."""
    gone = set(inherited)
    units = [u for u in walk(config) if u.kind not in ("time_embed", "label_embed")]
    last_of_layer = {"stem.conv_in" if u.kind == "conv_in" else u.layer: u.address for u in units}
    before = dict(zip((u.address for u in units), [None, *(u.address for u in units)], strict=False))
    computes = set()
    recalls = set()
    read = {units[-1].address}
    for u in reversed(units):
        if u.address not in read:
            continue
        if u.address in gone:
            recalls.add(u.address)
            continue
        computes.add(u.address)
        read.update(a for a in (before[u.address], last_of_layer.get(u.skip or "")) if a)
    return Flow(frozenset(computes), frozenset(recalls))


# What a unit does on an inherited step: computes, computes in part (its shortcut, or all but some parts of its blocks),
# is played from memory, or does nothing, because nobody reads what it would make.
COMPUTED, PARTLY, INHERITED, IDLE = "computed", "partly", "inherited", "idle"


@dataclass(frozen=True)
class InheritedStep:
    """What every unit does on a step that inherits, and what a run remembers for it: the one reading of a plan.

    reuse: unit or part address -> what is reused there (`Plan.reuse`).
    computes, recalls: see `Flow`. residuals: units of which only the shortcut runs. in_parts: transformers of whose
    blocks some parts are not computed.
    """

    config: UNetConfig
    reuse: Mapping[str, str]
    computes: frozenset[str]
    recalls: frozenset[str]
    residuals: frozenset[str]
    in_parts: frozenset[str]

    @classmethod
    def of(cls, plan: Plan, config: UNetConfig, cut: frozenset[str] = frozenset()) -> InheritedStep:
        """The inherited steps of a plan in a network of which some units and blocks are cut. Raises ValueError."""
        reuse = plan.reuse(config, cut)
        whole = {u.address for u in walk(config)} & set(reuse)
        residuals = frozenset(a for a in whole if reuse[a] == "residual")
        found = flow(config, whole - residuals)
        in_parts = frozenset(_owner(a) for a in set(reuse) - whole)
        return cls(config, reuse, found.computes, found.recalls, residuals, in_parts)

    @property
    def kept(self) -> frozenset[str]:
        """Units of which something is remembered, apart from those that inherit parts."""
        return self.recalls | self.residuals

    def does(self, address: str) -> str:
        """COMPUTED, PARTLY, INHERITED or IDLE."""
        if address in self.recalls:
            return INHERITED
        if address not in self.computes:
            return IDLE
        return PARTLY if address in self.residuals | self.in_parts else COMPUTED


def step_macs(
    plan: Plan, architecture: Architecture, height: int = 64, width: int = 64, tokens: int = 77
) -> tuple[int, int]:
    """MACs of a full and of an inherited step, for a latent of height x width, batch 1 (see `measure.costs`)."""
    step = InheritedStep.of(plan, architecture.config, architecture.cut)
    unit_costs = costs(architecture, height, width, tokens)
    inherited = 0
    for address, cost in unit_costs.items():
        if address in step.residuals and address in step.computes:
            inherited += _shortcut_macs(unit(architecture.config, address), cost)
        elif address.startswith("stem.") or address in step.computes:
            inherited += cost.total - _parts_saved(architecture, address, cost, step.reuse)
    return sum(c.total for c in unit_costs.values()), inherited


def _shortcut_macs(u: Unit, cost: UnitCost) -> int:
    """MACs of a unit's shortcut: the 1 x 1 convolution of a resnet that changes the number of channels."""
    weights = {
        part: sum(t.numel for t in u.tensors if t.part == part and len(t.shape) > 1)
        for part in ("conv", "skip", "time")
    }
    if not weights["skip"]:
        return 0
    return (cost.linear - weights["time"]) * weights["skip"] // (weights["conv"] + weights["skip"])


def _parts_saved(architecture: Architecture, address: str, cost: UnitCost, reuse: Mapping[str, str]) -> int:
    """MACs of the parts of one transformer that are inherited. Its blocks are alike, so each saves its share."""
    blocks = architecture.kept_blocks(unit(architecture.config, address))
    return sum(
        cost.part(part) * sum(f"{address}.{i}.{part}" in reuse for i in blocks) // len(blocks)
        for part in PARTS
        if blocks
    )


def saving(
    plan: Plan, architecture: Architecture, steps: int, height: int = 64, width: int = 64, tokens: int = 77
) -> float:
    """Predicted share of the UNet's MACs that a run of so many steps saves, 0..1. Not for adaptive plans."""
    full, inherited = step_macs(plan, architecture, height, width, tokens)
    computed = plan.schedule.computed(steps)
    return computed.count(False) / steps * (1 - inherited / full)


def cache_elements(plan: Plan, architecture: Architecture, height: int = 64, width: int = 64) -> int:
    """Numbers a run remembers for one latent of height x width and one conditioning.

    Times the batch, the conditionings (2 with classifier-free guidance) and the bytes of the compute
    dtype, it is the size of the cache.
    """
    step = InheritedStep.of(plan, architecture.config, architecture.cut)
    shapes = sizes(architecture, height, width)
    kept = [a for a in step.kept if a in shapes] + [_owner(a) for a in step.reuse if _owner(a) in step.in_parts]
    if plan.schedule.mode == "adaptive":
        kept.append(first_resnet(architecture.config, architecture.cut).address)
    total = sum(unit(architecture.config, a).channels_out * math.prod(shapes[a]) for a in kept)
    return total * (2 if "forecast" in step.reuse.values() else 1)
