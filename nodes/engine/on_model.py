"""Putting techniques on a MODEL and taking them off. The MODEL that comes in is never altered, only a clone of it."""

from __future__ import annotations

from comfy.patcher_extension import CallbacksMP

from . import notes
from .technique import KEY, Placed, Technique, placed_on, techniques_of
from .wrappers import INNER, OUTER, OUTER_KEY, check_in_place


def with_technique(model, technique: Technique):
    """A clone of MODEL with a technique, in place of one of the same key. Raises ValueError where it cannot be on it.

    What it says in a run is shown on the node that executes at the moment.
    """
    technique.check(model)
    others = [placed for placed in placed_on(model) if placed.technique.key != technique.key]
    return _place(model.clone(), (*others, Placed(technique, notes.executing())))


def without_technique(model, kind: type[Technique]):
    """A clone of MODEL without the technique of a kind's key, if it has one."""
    return _place(model.clone(), tuple(p for p in placed_on(model) if p.technique.key != kind.key))


def without_techniques(model):
    """A clone of MODEL without any: the checkpoint plays everything itself, in every step."""
    clone = _place(model.clone(), ())
    for technique in techniques_of(model):
        clone.remove_additional_models(models_key(technique))
    return clone


def models_key(technique: Technique | type[Technique]) -> str:
    """The key of the additional models that a technique keeps on a MODEL."""
    return f"{KEY}_{technique.key}"


def _place(clone, placed: tuple[Placed, ...]):
    """Make a clone carry these and no others."""
    for technique in techniques_of(clone):
        for kind, _ in technique.callbacks:
            clone.remove_callbacks_with_key(kind, models_key(technique))
    clone.remove_attachments(KEY)
    placed = tuple(sorted(placed, key=lambda p: (p.technique.order, p.technique.key)))
    if placed:
        clone.set_attachments(KEY, placed)
    for technique in techniques_of(clone):
        for kind, callback in technique.callbacks:
            clone.add_callback_with_key(kind, models_key(technique), callback)
    clone.remove_callbacks_with_key(CallbacksMP.ON_PRE_RUN, KEY)
    if placed:
        clone.add_callback_with_key(CallbacksMP.ON_PRE_RUN, KEY, check_in_place)
    for key, wrappers in ((KEY, INNER), (OUTER_KEY, OUTER)):
        wanted = any(p.technique.outermost == (wrappers is OUTER) for p in placed)
        for kind, wrapper in wrappers:
            clone.remove_wrappers_with_key(kind, key)
            if wanted and wrappers is OUTER:
                # Before all others: what wraps the first model's evaluations must not wrap those of the second.
                clone.wrappers[kind] = {key: [wrapper], **clone.wrappers.get(kind, {})}
            elif wanted:
                clone.add_wrapper_with_key(kind, key, wrapper)
    return clone
