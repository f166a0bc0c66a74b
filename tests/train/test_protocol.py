"""The evaluation protocol on the emoji family as it ships, its classifier in the place of Inception and CLIP."""

import csv
import json
import math

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import to_tensor

from bootstrap import ROOT
from train import coco
from train.emoji import protocol
from train.emoji.protocol import ClassifierJudge

pytestmark = pytest.mark.host  # which brings the tokeniser
MODELS = ROOT / "models" / "emoji"
PICTURES = 70  # more than the classifier has features


@pytest.fixture(scope="module")
def judge():
    return ClassifierJudge(MODELS)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory, judge):
    """The whole command on the teacher, a pack and the smallest student, against the teacher's own pictures from other
    noises: the folder, and the rows.
    """
    folder = tmp_path_factory.mktemp("protocol")
    names = list(json.loads((MODELS / "concepts.json").read_text("utf-8")).values())[:: 360 // PICTURES][:PICTURES]
    with open(folder / "metadata.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, ["file_name", "text"])
        writer.writeheader()
        writer.writerows({"file_name": f"{i:03d}.png", "text": name} for i, name in enumerate(names))
    pipeline = judge.pipeline(MODELS, None, torch.device("cpu"))
    (folder / "val").mkdir()
    for at in range(0, PICTURES, 16):
        numbers = range(at, min(at + 16, PICTURES))
        noises = [torch.Generator().manual_seed(10**6 + i) for i in numbers]
        for i, picture in zip(numbers, pipeline([names[i] for i in numbers], 2, 1.0, noises).images, strict=True):
            picture.save(folder / "val" / f"{i:03d}.png")
    coco.main([str(folder / "val"), str(folder / "real"), "--names", str(folder / "metadata.csv")])
    rows = {}
    for name in (None, "emoji-m2", "emoji-small"):
        protocol.main(
            [
                *([str(MODELS / f"{name}.safetensors")] if name else []),
                *("--models", str(MODELS), "--prompts", str(folder / "metadata.csv"), "--real", str(folder / "real")),
                *("--steps", "2", "--cfg", "1", "--batch", "16", "--cpu", "--out", str(folder / "out")),
            ],
            MODELS,
        )
    for path in (folder / "out").glob("*.json"):
        row = json.loads(path.read_text())
        rows[row["network"].rpartition("-")[0] or row["network"]] = row
    return folder, rows


def test_students_are_told_from_the_teacher(drawn):
    _, rows = drawn
    assert set(rows) == {"whole", "emoji-m2", "emoji-small"} and all(r["pictures"] == PICTURES for r in rows.values())
    # The teacher is nearest to its own pictures; the student with most cut is the farthest in every column.
    assert rows["whole"]["fid"] < rows["emoji-m2"]["fid"] and rows["whole"]["fid"] < rows["emoji-small"]["fid"]
    assert rows["emoji-small"]["clip"] == min(r["clip"] for r in rows.values())
    assert rows["emoji-small"]["parameters"] < rows["emoji-m2"]["parameters"] < rows["whole"]["parameters"]
    assert 1 < rows["whole"]["is"] <= PICTURES / protocol.SPLITS


def test_the_table_has_the_papers_columns_and_rows(drawn):
    folder, rows = drawn
    lines = (folder / "out" / "scores.md").read_text("utf-8").splitlines()
    assert lines[0] == "| | FID | IS | CLIP | parameters | pictures, steps, cfg |"
    own = [line for line in lines if line.startswith("| **")]
    for row in rows.values():
        cells = (
            f"{row['fid']:.3f} | {row['is']:.3f} | {row['clip']:.4f} | {row['parameters'] / 1e9:.3g} B | 70, 2, 1.0 |"
        )
        assert f"| **{row['network']}** | {cells}" in own
    for published in (
        "| Tiny with CondConv e2 | 17.470 | 28.720 | 0.2630 | - | |",
        "| M2, original part frozen | 11.840 | 36.560 | 0.2960 | - | |",
        "| S1: Base 10 steps, then SD 15 | 12.900 | 35.651 | 0.2970 | - | |",
        "| BK-SDM-Tiny | 17.120 | 30.090 | 0.2653 | 0.5 B | |",
    ):
        assert published in lines
    assert any("classifier in the place of Inception and CLIP" in line for line in lines)
    assert any("do not compare" in line for line in lines)


def test_the_scores_are_what_they_say(drawn, judge):
    """Each of them by another way, from the pictures on the disk."""
    folder, rows = drawn
    pictures = sorted((folder / "out" / "whole").glob("*.jpg"))
    real = sorted((folder / "real").glob("*.jpg"))
    assert len(pictures) == len(real) == PICTURES and Image.open(pictures[0]).size == (256, 256)

    def features(files):
        with torch.no_grad():
            x = [
                to_tensor(Image.open(file)).unflatten(1, (128, 2)).unflatten(3, (128, 2)).mean((2, 4)) for file in files
            ]
            return torch.cat([judge.classifier.features(one[None]) for one in x]).double()

    a, b = features(pictures), features(real)
    ca, cb = torch.cov(a.T), torch.cov(b.T)
    roots = torch.linalg.eigvals(ca @ cb).real.clamp_min(0).sqrt().sum()
    fid = (a.mean(0) - b.mean(0)).square().sum() + ca.trace() + cb.trace() - 2 * roots
    assert rows["whole"]["fid"] == pytest.approx(float(fid), rel=1e-3)
    logits = judge.classifier.head(a.float()).detach()
    names = [row["text"] for row in csv.DictReader(open(folder / "metadata.csv", newline=""))]
    weights = judge.classifier.head.weight.detach()[[judge.classes[name] for name in names]]
    assert rows["whole"]["clip"] == pytest.approx(float(torch.cosine_similarity(a.float(), weights).mean()), rel=1e-4)
    splits = []
    for i in range(10):
        p = logits[7 * i : 7 * i + 7].double().softmax(1)
        entropy = torch.distributions.Categorical(probs=p).entropy().mean()
        splits.append(math.exp(torch.distributions.Categorical(probs=p.mean(0)).entropy() - entropy))
    assert rows["whole"]["is"] == pytest.approx(sum(splits) / 10, rel=1e-4)


def test_a_stopped_evaluation_goes_on_and_other_prompts_are_refused(drawn, judge):
    folder, rows = drawn
    kept = (folder / "out" / "whole" / "000007.jpg").read_bytes()
    (folder / "out" / "whole" / "000007.jpg").unlink()
    command = [
        *("--models", str(MODELS), "--prompts", str(folder / "metadata.csv"), "--real", str(folder / "real")),
        *("--steps", "2", "--cfg", "1", "--cpu", "--out", str(folder / "out")),
    ]
    protocol.main(command, MODELS)
    again = json.loads((folder / "out" / "whole.json").read_text())
    assert again["fid"] == pytest.approx(rows["whole"]["fid"], rel=0.02)
    assert len(kept) == pytest.approx(len((folder / "out" / "whole" / "000007.jpg").read_bytes()), rel=0.05)
    with pytest.raises(ValueError, match="'no such thing' is no concept of the family"):
        judge.sides(torch.device("cpu"))([Image.new("RGB", (256, 256))], ["no such thing"])
