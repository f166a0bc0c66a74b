"""Captions as people's programs write them: what is taken, what is refused, and what is counted before anything is."""

import csv
import io
import json
import random
import tarfile

import pytest
from PIL import Image

from tests.train.test_sources import models, recipe  # noqa: F401  (a fixture)
from train.captions import SUFFIXES, captioned, say_unreadable
from train.shards import rows_of
from train.sources import open_source, read_prompts

TEXT = "caf\u00e9, \u685c, \U0001f431"


def paint(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path, "png")


@pytest.fixture()
def folder(tmp_path):
    paint(tmp_path / "in" / "a.png", tmp_path / "in" / "b.png")
    return tmp_path / "in"


# Text files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name", ["a.txt", "a.caption", "a.TXT", "A.txt", "a.Caption"])
def test_captions_beside_pictures_are_read_however_they_are_spelled(folder, name, encoding):
    (folder / name).write_bytes(f" {TEXT}\r\n".encode(encoding))
    assert captioned(folder) == [(folder / "a.png", [TEXT])]


def test_pictures_are_known_by_their_endings_in_any_case(tmp_path):
    paths = [tmp_path / f"{i}{s.upper() if i % 2 else s}" for i, s in enumerate(SUFFIXES)]
    paint(*paths, tmp_path / "no.svg")
    for path in (*paths, tmp_path / "no.svg"):
        path.with_suffix(".txt").write_text("x")
    assert [path for path, _ in captioned(tmp_path)] == sorted(paths)


def test_the_exact_name_wins_over_another_case(folder):
    paint(folder / "A.png")
    (folder / "A.txt").write_text("large")
    (folder / "a.txt").write_text("small")
    assert dict(captioned(folder)) == {folder / "A.png": ["large"], folder / "a.png": ["small"]}


@pytest.mark.parametrize("encoding", ["latin-1", "shift_jis", "gb18030", "cp1251"])
def test_what_cannot_be_decoded_names_its_file(folder, encoding):
    data = {"latin-1": "caf\u00e9", "shift_jis": "\u685c", "gb18030": "\u6a31\u82b1", "cp1251": "\u043a\u043e\u0442"}
    (folder / "a.txt").write_text("fine")
    (folder / "b.txt").write_bytes(data[encoding].encode(encoding))
    with pytest.raises(ValueError, match=r"b.txt: not UTF-8 \(byte \d\); save it as UTF-8$"):
        captioned(folder)
    (folder / "a.txt").write_bytes(data[encoding].encode(encoding))
    with pytest.raises(ValueError, match="a.txt: not UTF-8 .*, and 1 more$"):
        captioned(folder)
    prompts = folder / "b.txt"
    with pytest.raises(ValueError, match="b.txt: not UTF-8"):
        read_prompts(prompts)


@pytest.mark.parametrize("data", ["cat".encode("utf-16-le"), "cat".encode("utf-16-be"), b"cat\0dog"])
def test_zeros_are_no_text(folder, data):
    (folder / "a.txt").write_bytes(data)
    with pytest.raises(ValueError, match=r"a.txt: not UTF-8 \(a zero, character \d\); save it as UTF-8$"):
        captioned(folder)


def test_prompts_of_windows_editors_have_no_mark_in_them(tmp_path):
    (tmp_path / "p.txt").write_bytes(f"{TEXT}\r\n\r\na cat\r\n".encode("utf-8-sig"))
    assert read_prompts(tmp_path / "p.txt") == [TEXT, "a cat"]


def test_what_has_no_caption_or_cannot_be_read_is_counted_and_said(folder, capsys):
    paint(folder / "c.png", folder / "more" / "d.png")
    (folder / "a.txt").write_text("x")
    (folder / "b.txt").write_text(" \n")
    (folder / "more" / "e.jpg").write_bytes(b"no picture")
    (folder / "more" / "e.txt").write_text("y")
    found = captioned(folder)
    assert [path.name for path, _ in found] == ["a.png", "e.jpg"]
    assert f"{folder}: 3 pictures have no caption and are left out, the first is b.png" in capsys.readouterr().out
    say_unreadable(found, folder)
    assert "1 pictures cannot be read, the first is more/e.jpg" in capsys.readouterr().out.replace("\\", "/")


# Tables -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_tables_of_spreadsheets_are_read(folder, encoding, delimiter, ending):
    """Written by Python's own csv, with every caption it must put in quotes."""
    given = {"a.png": f'{TEXT}; "big", red', "b.png": "two\nlines\tand a tab"}
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter=delimiter, lineterminator=ending)
    writer.writerows([["text", "file_name", "width"], *([text, name, 8] for name, text in given.items())])
    (folder / "Metadata.CSV").write_bytes(file.getvalue().encode(encoding))
    assert captioned(folder) == [(folder / name, [text]) for name, text in given.items()]


def test_any_table_of_csv_comes_back_as_it_was(folder):
    """Random captions of all characters that mean something to a table."""
    rng = random.Random(0)
    for _ in range(50):
        text = "x" + "".join(rng.choice("\";,\t\n'\\ a=\u00e9") for _ in range(12)) + "x"
        file = io.StringIO(newline="")
        csv.writer(file, delimiter=(d := rng.choice(",;\t"))).writerows([["file_name", "text"], ["a.png", text]])
        (folder / "metadata.csv").write_bytes(file.getvalue().encode())
        assert captioned(folder) == [(folder / "a.png", [text])], d


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (
            "file_name,text\na.png,red, round\n",
            r"metadata.csv, line 2: 3 columns, wanted 2; .* ',' must stand in quotes",
        ),
        ("file_name,text\na.png\n", "metadata.csv, line 2: 1 columns, wanted 2"),
        ("a.png,red\n", "metadata.csv: wanted the columns file_name and text, got a.png, red"),
        ("", "wanted the columns file_name and text, got none"),
        ("file_name,text\n,red\n", "entry 1 of its metadata has no file_name"),
        ('file_name,text\na.png,"red\nb.png,blue\n', "metadata.csv, line 3: cannot be read as a table .unexpected end"),
    ],
)
def test_wrong_tables_are_refused_by_line(folder, data, said):
    (folder / "metadata.csv").write_text(data)
    with pytest.raises(ValueError, match=said):
        captioned(folder)


def test_excels_own_first_line_is_known(folder):
    (folder / "metadata.csv").write_text("sep=;\nfile_name;text\na.png;red\n")
    assert captioned(folder) == [(folder / "a.png", ["red"])]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"file_name":"a.png",', "metadata.jsonl, line 3: not valid JSON"),
        ('["a.png","x"]', "metadata.jsonl, line 3: wanted an object with file_name and text"),
        ("5", "metadata.jsonl, line 3: wanted an object"),
        ('{"file_name":"a.png","text":5}', "entry 2: text: wanted a text or a list of texts, got 5"),
        ('{"file_name":"a.png","text":["x",5]}', "wanted a text or a list of texts"),
        ('{"file_name":"a.png","text":null}', "entry 2 of its metadata has no file_name or no text"),
        ('{"file_name":5,"text":"x"}', "entry 2 of its metadata has no file_name or no text"),
        ("[" * 100_000, "metadata.jsonl, line 3: not valid JSON"),
    ],
)
def test_wrong_lines_of_json_are_refused_by_number(folder, line, said):
    (folder / "metadata.jsonl").write_text(f'{{"file_name":"b.png","text":"x"}}\n\n{line}\n')
    with pytest.raises(ValueError, match=said) as caught:
        captioned(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_rows_of_one_picture_give_it_several_captions_and_missing_pictures_are_counted(folder, capsys):
    rows = [("a.png", "one"), ("gone.png", "x"), ("a.png", ["two", " "]), ("b.png", "")]
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps({"file_name": f, "caption": t}) for f, t in rows))
    assert captioned(folder) == [(folder / "a.png", ["one", "two"])]
    said = capsys.readouterr().out
    assert "1 pictures have no caption and are left out, the first is b.png" in said
    assert "1 pictures of metadata.jsonl are not there and are left out, the first is gone.png" in said


# Where a run reads them -------------------------------------------------------------------------------


def test_shards_count_what_has_no_caption_and_leave_out_what_cannot_be_decoded(models, tmp_path, capsys):  # noqa: F811
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "png")
    members = {
        "a.png": picture.getvalue(),
        "a.txt": "red".encode("utf-8-sig"),
        "b.png": picture.getvalue(),
        "c.PNG": picture.getvalue(),
        "c.caption": b"blue",
        "d.webp": picture.getvalue(),
        "d.json": b'{"caption": 5}',
        "e.png": picture.getvalue(),
        "e.txt": "caf\u00e9".encode("latin-1"),
        "f.png": picture.getvalue(),
        "f.json": b'{"text": ""}',
    }
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    rows = list(rows_of(str(tmp_path / "a.tar")))
    assert [(row.name[6:], row.without) for row in rows] == [("a", 0), ("c", 1), ("d", 0), ("e", 0), ("f", 0)]
    assert [row.captions for row in rows[:2]] == [["red"], ["blue"]]
    source = open_source(recipe("shards", tmp_path, models, "data.lanes=1"))
    source.lanes.shuffled = lambda url, epoch: iter(rows)
    found = source.examples(range(5), [0.0] * 5)
    said = capsys.readouterr().out
    assert found.left_out.tolist() == [0, 1, 3, 2, 1]
    assert "pictures without a caption are left out and counted, the first before a.tar:c" in said
    for name, why in (("d", "wanted a text"), ("e", "not UTF-8"), ("f", "has no caption")):
        assert f"a.tar:{name}: {why}" in said


def test_a_run_says_what_it_cannot_read_before_its_first_step(models, folder, capsys):  # noqa: F811
    for name in ("a", "b"):
        (folder / f"{name}.txt").write_text("red")
    (folder / "b.png").write_bytes(b"no picture")
    open_source(recipe("folder", folder, models))
    assert "1 pictures cannot be read, the first is b.png" in capsys.readouterr().out
