"""One page from what was found: report.md with two plots, and report.json with all of it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageDraw

from asdm_core.pictures import EDGE, INK, PAPER, QUIET, duration, font

PAYS = 1.03  # a technique pays from this ratio on
COLOURS = (
    *("#1f2937", "#2b59c3", "#d1495b", "#3a9d5d", "#e08e1b", "#7a4fb5", "#2a9d9d", "#8a5a3c", "#c2558f", "#6b7280"),
    *("#9bb1e8", "#f0a3ad", "#9ad0aa", "#f2cd8f", "#c3aee0", "#93d6d6"),
)
NETWORKS = {"sd15": "SD1.5", "sdxl": "SDXL"}


def rows(found: dict) -> Iterator[tuple[str, str, dict]]:
    """(part, name, row)"""
    for part, kept in found["parts"].items():
        for name, row in kept["rows"].items():
            yield part, name, row


def times(found: dict) -> list[dict]:
    """The timed rows, those that ran out of memory included."""
    return [time for _, _, row in rows(found) if row["kind"] == "times" for time in row["rows"]]


def failed(row: dict) -> bool:
    """Whether a row has a check that did not pass, or times of what is no number."""
    wrong = row["kind"] == "check" and not row["passed"]
    return wrong or any(time.get("finite") is False for time in row.get("rows", ()))


def failures(found: dict) -> list[str]:
    """What did not pass, in words."""
    failed = []
    for part, kept in found["parts"].items():
        for name, row in kept["rows"].items():
            if row["kind"] == "check" and not row["passed"]:
                by = row.get("error") or ("no number" if row["found"] is None else f"{row['found']:.3g}")
                failed.append(f"{part}: {name}: wanted {row['wanted']}, found {by}")
            for time in row.get("rows", ()):
                if time.get("finite") is False:
                    failed.append(f"{part}: {time['technique']} at {at(time)} makes something that is no number")
        if kept["state"] == "broken":
            failed.append(f"{part}: {kept['why']}")
    return failed


def passed(found: dict) -> int:
    checks = sum(row["kind"] == "check" and row["passed"] for _, _, row in rows(found))
    return checks + sum(time.get("finite") is True for time in times(found))


def skipped(found: dict) -> list[str]:
    """What was not run, and why."""
    left = [
        f"{part}: {kept['why']}" for part, kept in found["parts"].items() if kept["state"] in ("skipped", "unfinished")
    ]
    left += [f"{part}: {name}: {row['why']}" for part, name, row in rows(found) if row["kind"] == "skipped"]
    return left + [f"{time['technique']} at {at(time)}: {time['why']}" for time in times(found) if "why" in time]


def network(name: str) -> str:
    return NETWORKS.get(name, name)


def at(time: dict) -> str:
    return f"{network(time['network'])} {time['pixels']}" + (f", batch {time['batch']}" if time["batch"] > 1 else "")


def device(found: dict) -> str:
    return found["machine"].get("gpu") or "CPU"


# The sentence ---------------------------------------------------------------------------------------


def sentence(found: dict) -> str:
    """How fast, from when on, and what failed."""
    measured = [time for time in times(found) if "speedup" in time]
    said = []
    if headline := best_headline(measured):
        said.append(f"{headline['technique']} is {headline['speedup']:.1f}x at {at(headline)}")
    if gri := [time for time in measured if time["technique"] == "GRI" and time["batch"] == 1]:
        said.append(gri_pays(gri))
    failed, good = failures(found), passed(found)
    if failed:
        said.append(f"{len(failed)} of {len(failed) + good} checks failed, the first: {failed[0].split(': wanted')[0]}")
    else:
        said.append(f"nothing failed in {good} checks" if good else "nothing was checked")
    open_ = [part for part, kept in found["parts"].items() if kept["state"] in ("unfinished", "open")]
    if open_:
        said.append(f"{len(open_)} parts are not finished")
    where = "On this card" if "gpu" in found["machine"] else "On this CPU, with narrow networks,"
    return f"{where} {'; '.join(said)}."


def best_headline(measured: list[dict]) -> dict | None:
    """The headline technique, at SDXL 1024 or at what is nearest to it of what was measured."""
    chosen = [time for time in measured if time.get("headline") and time["batch"] == 1]

    def order(time):
        return time["network"] != "sdxl", abs(time["pixels"] - 1024), -time["speedup"]

    return min(chosen, key=order, default=None)


def gri_pays(gri: list[dict]) -> str:
    said = []
    for name in dict.fromkeys(time["network"] for time in gri):
        ratios = {time["pixels"]: time["speedup"] for time in gri if time["network"] == name}
        first = next((p for p in sorted(ratios) if all(ratios[q] >= PAYS for q in ratios if q >= p)), None)
        where = f"with {network(name)}"
        said.append(f"pays from {first} on {where}" if first else f"does not pay up to {max(ratios)} {where}")
    return "GRI " + " and ".join(said)


# The page -------------------------------------------------------------------------------------------


def page(found: dict) -> str:
    """report.md. The conclusion is its third line, below the title."""
    lines = [f"# asdm on {device(found)}", "", sentence(found), ""]
    facts = found["machine"] | found["card"] | found["versions"] | {"date": found["date"], "form": found["form"]}
    lines += ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in facts.items()), ""]
    lines += [
        "## What passed",
        "",
        "| part | checks | passed | largest difference | seconds |",
        "|---|---|---|---|---|",
    ]
    for part, kept in found["parts"].items():
        checks = [row for row in kept["rows"].values() if row["kind"] == "check"]
        if checks:
            off = [row["found"] for row in checks if row["found"] is not None and row["wanted"].startswith("at most")]
            good, most = sum(row["passed"] for row in checks), f"{max(off):.2g}" if off else "0"
            lines.append(f"| {part} | {len(checks)} | {good} | {most} | {kept.get('seconds', 0):.0f} |")
    for title, listed in (("What did not", failures(found)), ("What was not run", skipped(found))):
        if listed:
            lines += ["", f"## {title}", "", *(f"- {line}" for line in listed)]
    if found.get("left_out"):
        lines += ["", "## Left out of this bundle", "", *(f"- {text}" for text in found["left_out"])]
    if timed := [time for time in times(found) if "seconds" in time]:
        lines += ["", "## How fast", "", "![speed](speed.png)", "", "![cost](cost.png)", ""]
        lines += [
            "Random weights, guidance, seven steps, measured in turn. Ratio: time without over time with it, the",
            "median of the rounds. EasyCache decides by what a picture shows, which random weights do not tell.",
            "Share: of the multiplications a second that products of matrices reach in the same run.",
            "",
            "| network | technique | a step | ratio | peak memory | share of the limit |",
            "|---|---|---|---|---|---|",
        ]
        for time in timed:
            memory = "-" if time["peak_mb"] is None else f"{time['peak_mb'] / 1024:.1f} GiB"
            share = "-" if time["share"] is None else f"{time['share']:.0%}"
            lines.append(
                f"| {at(time)} | {time['technique']} | {duration(time['seconds'])} | {time['speedup']:.2f} | {memory} "
                f"| {share} |"
            )
    return "\n".join(lines) + "\n"


def keep(found: dict, folder: Path) -> None:
    """report.json, from which the next run goes on."""
    folder.mkdir(parents=True, exist_ok=True)
    found["sentence"] = sentence(found)
    part = folder / "report.json.part"
    part.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    part.replace(folder / "report.json")


def write(found: dict, folder: Path) -> None:
    """report.json, report.md, speed.png and cost.png."""
    keep(found, folder)
    (folder / "report.md").write_text(page(found), "utf-8")
    timed = [time for time in times(found) if "seconds" in time and time["batch"] == 1]
    if timed:
        plot(timed, "speedup", "time without over time with it").save(folder / "speed.png")
        key, title = ("peak_mb", "peak memory in MiB") if timed[0]["peak_mb"] else ("seconds", "seconds of a step")
        plot(timed, key, title).save(folder / "cost.png")


def plot(timed: list[dict], value: str, title: str) -> Image.Image:
    """A value by size of picture, a panel for each network and a line for each technique."""
    names = list(dict.fromkeys(time["network"] for time in timed))
    panel, height, left, top, legend = 420, 300, 60, 60, 210
    image = Image.new("RGB", (left + len(names) * panel + legend, height + top + 50), PAPER)
    draw = ImageDraw.Draw(image)
    techniques = list(dict.fromkeys(time["technique"] for time in timed))
    colour = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(techniques)}
    sizes = sorted({time["pixels"] for time in timed})
    most = max(time[value] for time in timed) or 1
    unit = 10 ** math.floor(math.log10(most))
    step = next(s * unit for s in (0.2, 0.5, 1, 2) if most / (s * unit) <= 6)
    draw.text((left, 14), title, INK, font(18))
    for i, name in enumerate(names):
        x0 = left + i * panel
        draw.text((x0, 40), network(name), QUIET, font(14))

        def place(pixels, v, x0=x0):
            share = sizes.index(pixels) / max(1, len(sizes) - 1)
            return x0 + 20 + share * (panel - 80), top + height - v / most * (height - 10)

        for n in range(int(most / step) + 1):
            y = place(sizes[0], n * step)[1]
            draw.line((x0, y, x0 + panel - 40, y), EDGE)
            draw.text((x0 - 6, y), f"{n * step:.3g}", QUIET, font(12), anchor="rm")
        for pixels in sizes:
            draw.text((place(pixels, 0)[0], top + height + 8), str(pixels), QUIET, font(12), anchor="mt")
        for technique in techniques:
            points = [
                place(time["pixels"], time[value])
                for time in sorted(timed, key=lambda time: time["pixels"])
                if time["technique"] == technique and time["network"] == name
            ]
            if len(points) > 1:
                draw.line(points, colour[technique], 2)
            for x, y in points:
                draw.ellipse((x - 3, y - 3, x + 3, y + 3), colour[technique])
    for i, technique in enumerate(techniques):
        y = top + 8 + i * 20
        x = left + len(names) * panel
        draw.line((x, y, x + 18, y), colour[technique], 3)
        draw.text((x + 26, y), technique, INK, font(13), anchor="lm")
    return image
