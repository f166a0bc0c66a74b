"""LoRAs in bypass mode: the host hangs them on the modules of one UNet, beside its weights."""

from __future__ import annotations

import inspect

from comfy.weight_adapter import BypassInjectionManager


def _manager_of(injection) -> BypassInjectionManager | None:
    """Who made an injection, if it is a bypass LoRA's."""
    manager = inspect.getclosurevars(injection.inject).nonlocals.get("self")
    return manager if isinstance(manager, BypassInjectionManager) else None


def bind_to_copy(copy) -> None:
    """Have the bypass LoRAs of a deep copy act on its own UNet; they hold the modules of the original."""
    copy.is_injected = False  # as the original may be at the moment
    copy.injections = {k: [_bound_to(copy, injection) for injection in v] for k, v in copy.injections.items()}


def _bound_to(model, injection):
    manager = _manager_of(injection)
    if manager is None:
        return injection
    anew = BypassInjectionManager()
    anew.adapters = manager.adapters
    return anew.create_injections(model.model)[0]


def apart(model) -> tuple[dict[str, list[tuple]], list]:
    """The patches of a MODEL's weights, with its bypass LoRAs among them as `in_weights` puts them there; and the
    injections that are none of those. Changes nothing, so that it may be asked in a run.
    """
    patches, others = {key: list(given) for key, given in model.patches.items()}, []
    for injection in (injection for injections in model.injections.values() for injection in injections):
        manager = _manager_of(injection)
        if manager is None:
            others.append(injection)
            continue
        for module, (adapter, strength) in manager.adapters.items():
            patches.setdefault(f"{module}.weight", []).append((strength, adapter, 1.0))
    return patches, others


def in_weights(model):
    """MODEL, or where it has bypass LoRAs a clone in which they act on the weights, as others do: it is the same."""
    made_by = {key: [_manager_of(i) for i in injections] for key, injections in model.injections.items()}
    if not any(any(managers) for managers in made_by.values()):
        return model
    model = model.clone()
    for key, managers in made_by.items():
        injections = model.injections[key]
        for manager in filter(None, managers):
            for module, (adapter, strength) in manager.adapters.items():
                model.add_patches({f"{module}.weight": adapter}, strength)
        rest = [injection for injection, manager in zip(injections, managers, strict=True) if manager is None]
        if rest:
            model.set_injections(key, rest)
        else:
            model.remove_injections(key)
    return model
