"""Captions from names, keywords, background colours and styles; and which pairs are held out.

Style and background are left out of 40% of the captions, so that one prompt has many right answers
and the initial noise decides between them.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Iterable, Sequence

from .render import BACKGROUNDS
from .sources import STYLES, Concept

TEMPLATES = ("{}", "a {}", "{} emoji", "an emoji of a {}", "a picture of a {}", "{} icon", "the {}")
BACKGROUND_TEMPLATES = ("on {}", "{} background", "on a {} background")
STYLE_TEMPLATES = ("{} style", "in {} style", "{}")
MENTION = 0.6  # how often style and background are named, each
DROP = 0.1  # how often the caption is empty, for classifier-free guidance
HELD_OUT = 0.1


def own_tags(concepts: Sequence[Concept]) -> dict[str, tuple[str, ...]]:
    """Keywords that point at one concept only, by code: these may stand for its name."""
    counts = Counter(tag for c in concepts for tag in set(c.tags) | {c.name})
    return {c.code: tuple(t for t in c.tags if counts[t] == 1) for c in concepts}


def caption(concept: Concept, style: str, background: str, tags: Sequence[str], rng: random.Random) -> str:
    """One caption for a picture. tags: `own_tags` of the concept. The same rng state gives the same caption."""
    if rng.random() < DROP:
        return ""
    subject = rng.choice(tags) if tags and rng.random() < 0.15 else concept.name
    text = subject if rng.random() < 0.4 else rng.choice(TEMPLATES).format(subject)
    extra = rng.choice(concept.tags) if concept.tags and rng.random() < 0.15 else ""
    where = rng.choice(BACKGROUND_TEMPLATES).format(background) if rng.random() < MENTION else ""
    how = rng.choice(STYLE_TEMPLATES).format(style) if rng.random() < MENTION else ""
    return " ".join(filter(None, [", ".join(filter(None, [text, extra])), where])) + (f", {how}" if how else "")


def prompt(concept: Concept, style: str = "", background: str = "") -> str:
    """The plain prompt used for measuring: name, then background and style if given."""
    return concept.name + (f" on {background}" if background else "") + (f", {style} style" if style else "")


def vocabulary(concepts: Iterable[Concept]) -> list[str]:
    """Texts that together hold every token a caption or `prompt` can hold."""
    words = [*STYLES, *BACKGROUNDS, ",", *(t.format("") for t in (*TEMPLATES, *BACKGROUND_TEMPLATES, *STYLE_TEMPLATES))]
    return words + [text for c in concepts for text in (c.name, *c.tags)]


def held_out(code: str, kind: str, value: str) -> bool:
    """Whether the pair (concept, style) or (concept, background) is kept out of training.

    kind: "style" or "background". A concept loses at most one of the two styles of the teacher. The
    answer depends on the names only, so it never changes with the list of concepts or the machine.
    """

    def unit(*parts: str) -> float:
        return int.from_bytes(hashlib.sha256("/".join(parts).encode()).digest()[:6], "big") / 2**48

    if kind == "style":
        teacher = [s for s in STYLES if s != "openmoji"]
        chosen = teacher[int(unit(code, "which style") * len(teacher))]
        return value == chosen and unit(code, "style") < HELD_OUT * len(teacher)
    return unit(code, "background", value) < HELD_OUT
