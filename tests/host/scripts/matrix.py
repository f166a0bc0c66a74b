"""What asdm's techniques are promised to do beside what others do to a UNet: plain data, without the host.

tests/host/inside/compatibility.py and compiled.py test every cell in the real host, and docs/compatibility.md shows
this very table (tests/core/test_compatibility.py).
"""

from dataclasses import dataclass

TECHNIQUES = PRUNED, PACK, EXPERTS, INHERITANCE, GRI, SWITCH = (
    "Pruned UNet",
    "Pack",
    "CondConv pack",
    "Feature Inheritance",
    "GRI Attention",
    "Switch UNet",
)

# Feature -> how the page names it.
FEATURES = {
    "ControlNet": "ControlNet",
    "Control-LoRA": "Control-LoRA",
    "T2I adapter": "T2I adapter",
    "IP-Adapter": "IP-Adapter (cross-attention replaced in every block)",
    "areas and masks": "Area and mask conditioning",
    "FreeU": "FreeU V2",
    "PAG": "Perturbed-Attention Guidance (PAG)",
    "SAG": "Self-Attention Guidance (SAG)",
    "HyperTile": "HyperTile",
    "ToMe": "Token Merging (ToMe)",
    "deep shrink": "Deep shrink (PatchModelAddDownscale)",
    "AnimateDiff": "AnimateDiff-style modules between the layers",
    "context windows": "Context windows",
    "tiles": "Tiled sampling (MultiDiffusion)",
    "EasyCache": "EasyCache",
    "LazyCache": "LazyCache",
    "LoRA": "LoRA",
    "LoCon": "LyCORIS: LoCon",
    "LoHa": "LyCORIS: LoHa",
    "LoKr": "LyCORIS: LoKr",
    "DoRA": "DoRA",
    "hook LoRA": "LoRA in a hook (prompt, schedule)",
    "bypass LoRA": "LoRA in bypass mode",
    "LCM": "LCM LoRA with the lcm sampler",
    "restart": "Restart sampling",
    "unsampling": "Unsampling (flipped sigmas)",
    "image to image": "Image to image",
    "inpainting": "Inpainting with a mask",
    "inpainting model": "Inpainting models (9 channels)",
    "v-prediction": "v-prediction models",
    "zero terminal SNR": "Zero terminal SNR",
    "RescaleCFG": "RescaleCFG",
    "CFGOverride": "CFG Override (guidance in an interval)",
    "PerpNeg": "PerpNeg guider",
    "fp8": "fp8 weights",
    "little memory": "Little memory (`--lowvram`, `--novram`)",
    "dynamic memory": "Dynamic memory, the default on NVIDIA",
    "compile": "torch.compile (TorchCompileModel)",
}

WORKS, REFUSED, OFF = "works", "refused", "off"


@dataclass(frozen=True)
class Note:
    """What the page says about a cell. status: works, refused (the run ends with a message) or off (one of the two
    stands back).
    """

    status: str
    text: str


_CONTROL_LORA = Note(
    REFUSED,
    "A Control-LoRA rebuilds its network from the UNet's own encoder. Where units of the encoder or the mid "
    "block are cut, the run ends at once with a message; use an ordinary ControlNet. On a Pack it works: the "
    "checkpoint below still has them.",
)
_GRI_OFF = Note(
    OFF,
    "Where HyperTile or Token Merging change what self-attention sees, GRI stands back: the picture is theirs alone, "
    "and "
    "the log says so.",
)
_OWN_CACHE = Note(
    WORKS,
    "Each of the two models has its own cache, which is empty when it takes over: the first steps after the switch "
    "compute in full.",
)
_OTHERS_STEPS = Note(
    WORKS,
    "The two work on different steps: what the other cache skipped was never computed, so nothing inherits from it. "
    "The losses add up; one of the two is usually enough.",
)
_FEW_STEPS = Note(
    WORKS,
    "Works, but with so few steps each differs so much from the last that inheriting hurts the picture; the log says "
    "so.",
)
_BY_LEVEL = Note(
    WORKS,
    "On flipped sigmas, too, each model plays its own noise levels: the second one those below the switch, which come "
    "first. So sampling from there meets the same models again.",
)

NOTES = {
    ("Control-LoRA", "Pruned UNet"): _CONTROL_LORA,
    ("HyperTile", "GRI Attention"): _GRI_OFF,
    ("ToMe", "GRI Attention"): _GRI_OFF,
    ("EasyCache", "Feature Inheritance"): _OTHERS_STEPS,
    ("LazyCache", "Feature Inheritance"): _OTHERS_STEPS,
    ("EasyCache", "Switch UNet"): _OWN_CACHE,
    ("LazyCache", "Switch UNet"): _OWN_CACHE,
    ("unsampling", "Switch UNet"): _BY_LEVEL,
    ("LCM", "Feature Inheritance"): _FEW_STEPS,
}


def status(feature: str, technique: str) -> str:
    """works, refused or off."""
    note = NOTES.get((feature, technique))
    return note.status if note else WORKS


# Under TorchCompileModel: graphs that a first run of four steps traces, and how many more a second one with the same
# settings.
ALONE = "the checkpoint alone"
GRAPHS = {
    ALONE: (1, 0),
    PRUNED: (1, 0),
    PACK: (1, 0),
    EXPERTS: (1, 0),
    INHERITANCE: (2, 0),
    GRI: (1, 0),
    SWITCH: (1, 0),
}


# As the page shows it -------------------------------------------------------------------------------


def numbered() -> list[Note]:
    """The notes in the order in which the table's cells come to them."""
    return list(
        dict.fromkeys(
            NOTES[feature, technique]
            for feature in FEATURES
            for technique in TECHNIQUES
            if (feature, technique) in NOTES
        )
    )


def cell(feature: str, technique: str) -> str:
    note = NOTES.get((feature, technique))
    return f"{note.status} ({numbered().index(note) + 1})" if note else WORKS


def _rows(head, rows) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def table() -> str:
    return _rows(
        ["", *TECHNIQUES], [[title, *(cell(feature, t) for t in TECHNIQUES)] for feature, title in FEATURES.items()]
    )


def notes() -> str:
    return "\n".join(f"{i}. {note.text}" for i, note in enumerate(numbered(), 1))


def graphs() -> str:
    return _rows(
        ["", "first run of 4 steps", "second run"],
        [[technique, *map(str, counts)] for technique, counts in GRAPHS.items()],
    )
