"""The measured part of docs/forecasts.md says what stands in the record."""

from bench._savings import FEWER, OURS, SAVED, UNCALIBRATED, summary
from bench._savings_page import HEADING, with_measures


def row(method, setting, saved, psnr, run="euler-20-cfg3"):
    return {
        "part": "runs",
        "run": run,
        "method": method,
        "setting": setting,
        "saved": saved,
        "psnr": psnr,
        "psnr_least": psnr - 9,
    }


ROWS = [
    *(row(OURS, f"{saved:.0%}: F", saved, 60 - 40 * saved) for saved in SAVED),
    *(row(UNCALIBRATED, f"{saved:.0%}: F", saved, 59 - 40 * saved) for saved in (0.4, 0.5)),
    *(row(FEWER, f"{steps} steps", 1 - steps / 20, 50 - 30 * (1 - steps / 20)) for steps in (16, 12, 10, 8)),
    *(row("easycache", f"threshold {t}", t, 40 - 10 * t) for t in (0.2, 0.5)),
    *(row("deepcache", f"branch {t}", t, 30) for t in (0.1, 0.3)),
    {"part": "cost"},
]
DIAL = [row(UNCALIBRATED, name, s, q) for name, s, q in (("same to the eye", 0.5, 41), ("close", 0.6, 35))]


def test_the_page_says_what_stands_in_the_rows_and_keeps_what_is_before():
    page = with_measures(f"# Title\n\nProse.\n\n{HEADING}\n\nearlier words", ROWS, summary(ROWS))
    assert page.startswith(f"# Title\n\nProse.\n\n{HEADING}\n") and "earlier words" not in page
    assert "| euler, normal, 20 steps, CFG 3 | 40% | 44.0 dB (35.0) | 43.0 dB (34.0) | 38.0 dB (29.0) |" in page
    assert "| euler, normal, 20 steps, CFG 3 | 50% | 40.0 dB (31.0) | 39.0 dB (30.0) | 35.0 dB (26.0) |" in page
    # Between the settings of EasyCache, beyond those of DeepCache; LazyCache and others were not run.
    assert "| 40% | 44.0 dB | 43.0 dB | 36.0 dB |  | not reached |  |  |" in page
    assert "| saved at 35 dB: euler, 20 steps, CFG 3 | 70% | 60% |  |" in page
    assert "| least lead over fewer steps at 40% and 50% saved | 6.0 dB | 5.0 dB |  |" in page
    missing = page.partition("Not measured: ")[2]
    assert "euler, normal, 30 steps, CFG 7" in missing and "euler, normal, 20 steps, CFG 3;" not in missing
    assert with_measures(page, ROWS, summary(ROWS)) == page


def test_the_dial_is_told_where_all_its_positions_were_measured():
    tail = row(UNCALIBRATED, "same motif", 0.7, 30)
    said = "| euler, normal, 20 steps, CFG 3 | 50%: 41.0 dB (32.0) | 60%: 35.0 dB (26.0) | 70%: 30.0 dB (21.0) |"
    for rows, told in (([*ROWS, *DIAL], False), ([*ROWS, *DIAL, tail], True)):
        assert (said in with_measures(HEADING, rows, {})) == told


def test_the_least_lead_of_the_positions_of_feature_inheritance_is_told():
    # Fewer steps at 30%: 41 dB. Where they were not measured, nothing is compared; nor where noise is added or blended.
    dial = [row("dial", name, s, q) for name, s, q in (("faithful", 0.3, 43.5), ("fast", 0.5, 41), ("x", 0.1, 2))]
    others = [
        row(*setting, run)
        for run in ("dpmpp_sde-20-cfg3", "euler-flow-20-cfg3")
        for setting in ((FEWER, "16 steps", 0.2, 30), ("dial", "fast", 0.2, 20))
    ]
    found = summary([*ROWS, *dial, *others])
    assert found["dial_lead_over_fewer_steps_db"] == 2.5
    assert "dial is at least 2.5 dB ahead of fewer steps" in with_measures(HEADING, ROWS, found)
    assert "dial is at least" not in with_measures(HEADING, ROWS, summary(ROWS))
