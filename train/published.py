"""Published scores on MS-COCO, to stand beside one's own: zero-shot, 30,000 prompts of the 2014 validation set, 256 px.

From the tables of A-SDM (arXiv 2312.15516), whose Table 4 repeats BK-SDM's Table 1 (arXiv 2305.15798). FID falls
with the number of pictures, and samplers, steps and guidance differ between the papers: the rows are comparable
within a table, with one's own only where it is drawn by the same protocol.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

ASDM = "A-SDM, arXiv 2312.15516"
BK = "BK-SDM, arXiv 2305.15798, Table 1"
PICTURES = 30_000


class Row(NamedTuple):
    """FID (lower is better), IS and CLIP score (higher), and the parameters of all networks in billions; None: not
    given.
    """

    source: str
    name: str
    fid: float | None
    inception: float | None
    clip: float | None
    billions: float | None = None


ROWS = (
    Row(f"{ASDM}, Table 1", "Base", 14.426, 33.403, 0.288),
    Row(f"{ASDM}, Table 1", "Base with CondConv e2", 14.963, 33.522, 0.288),
    Row(f"{ASDM}, Table 1", "Small", 17.120, 31.271, 0.268),
    Row(f"{ASDM}, Table 1", "Small with CondConv e2", 16.056, 31.740, 0.274),
    Row(f"{ASDM}, Table 1", "Tiny", 18.670, 27.730, 0.257),
    Row(f"{ASDM}, Table 1", "Tiny with CondConv e2", 17.470, 28.720, 0.263),
    Row(f"{ASDM}, Table 2", "SD-UNet", 12.832, 36.653, 0.297),
    Row(f"{ASDM}, Table 2", "M1, original part frozen", 13.049, 37.848, 0.298),
    Row(f"{ASDM}, Table 2", "M2, original part frozen", 11.840, 36.560, 0.296),
    Row(f"{ASDM}, Table 2", "M3, original part frozen", 20.037, 22.338, 0.249),
    Row(f"{ASDM}, Table 2", "M4 (M1, all trained)", 13.377, 37.957, 0.298),
    Row(f"{ASDM}, Table 2", "M5 (M2, all trained)", 13.222, 37.726, 0.299),
    Row(f"{ASDM}, Table 2", "M6 (M3, all trained)", None, None, None),
    Row(f"{ASDM}, Table 2", "Base-UNet", 14.426, 33.403, 0.288),
    Row(f"{ASDM}, Table 3", "SD-UNet", 12.832, 36.653, 0.297),
    Row(f"{ASDM}, Table 3", "S1: Base 10 steps, then SD 15", 12.900, 35.651, 0.297),
    Row(f"{ASDM}, Table 3", "S2: SD 15 steps, then Base 10", 13.529, 34.560, 0.294),
    Row(f"{ASDM}, Table 3", "S3: SD 10 steps, then Base 15", 13.548, 36.720, 0.295),
    Row(f"{ASDM}, Table 3", "Base-UNet", 14.426, 33.403, 0.288),
    Row(BK, "SD v1.4", 13.05, 36.76, 0.2958, 1.04),
    Row(BK, "Small Stable Diffusion", 12.76, 32.33, 0.2851, 0.76),
    Row(BK, "BK-SDM-Base", 15.76, 33.79, 0.2878, 0.76),
    Row(BK, "BK-SDM-Small", 16.98, 31.68, 0.2677, 0.66),
    Row(BK, "BK-SDM-Tiny", 17.12, 30.09, 0.2653, 0.50),
    Row(BK, "SD v2.1-base", 13.93, 35.93, 0.3075, 1.26),
    Row(BK, "BK-SDM-v2-Base", 15.85, 31.70, 0.2868, 0.98),
    Row(BK, "BK-SDM-v2-Small", 16.61, 31.73, 0.2901, 0.88),
    Row(BK, "BK-SDM-v2-Tiny", 15.68, 31.64, 0.2897, 0.72),
)


def beside(found: Sequence[Mapping], note: str = "") -> str:
    """The columns of the papers' tables in Markdown: one's own rows, and beneath them the published ones.

    found: rows of train.evaluate. note: what is to be said of them.
    """
    lines = ["| | FID | IS | CLIP | parameters | pictures, steps, cfg |", "|---|---|---|---|---|---|"]
    for row in found:
        how = f"{row['pictures']}, {row['steps']}, {row['cfg']}"
        cells = _cells(row["fid"], row["is"], row["clip"], row["parameters"] / 1e9 if "parameters" in row else None)
        lines.append(f"| **{row['network']}** | {cells} | {how} |")
    source = ""
    for published in ROWS:
        if published.source != source:
            source = published.source
            lines.append(f"| *{source}* | | | | | |")
        lines.append(f"| {published.name} | {_cells(*published[2:])} | |")
    if note:
        lines += ["", note]
    few = sorted({row["pictures"] for row in found if row["pictures"] != PICTURES})
    if few:
        said = ", ".join(map(str, few))
        lines += ["", f"Drawn: {said} pictures, published: {PICTURES}. FID falls with their number: do not compare."]
    return "\n".join(lines) + "\n"


def _cells(fid: float | None, inception: float | None, clip: float | None, billions: float | None) -> str:
    values = ((fid, ".3f", ""), (inception, ".3f", ""), (clip, ".4f", ""), (billions, ".3g", " B"))
    return " | ".join("-" if value is None else format(value, form) + unit for value, form, unit in values)
