"""Chinese and Japanese for every node, setting and help page, as the host hands them to the browser. English is the
schema.
"""

import re

import pytest

from demo.server import Client
from tools import signatures
from tools.registry import node_ids

IDS = sorted(node_ids())
LANGUAGES = {"zh": r"[\u4e00-\u9fff]", "ja": r"[\u3040-\u30ff]"}
SYNTAX = re.compile(
    r"[{}@|$]"
)  # means something to the front end in names and descriptions (vue-i18n), not in tooltips
KEPT = re.compile(
    r"`[^`]+`|arXiv|\d+(?:\.\d+)+|\(pictures/.+\)"
)  # what a translation of a help page keeps: code, versions, numbers of papers, pictures


@pytest.fixture(scope="module")
def translations(server):
    return Client(server.url).get("/i18n")


def inputs(sections, prefix=""):
    """{key of the front end: English tooltip} of a node's inputs, those behind a choice included."""
    found = {}
    for section in ("required", "optional"):
        for name, (_, *options) in sections.get(section, {}).items():
            options = options[0] if options else {}
            found[prefix + name] = options.get("tooltip")
            for choice in options.get("options", []):
                if isinstance(choice, dict):
                    found |= inputs(choice["inputs"], f"{prefix}{name}_")
    return found


def outputs(info):
    """{slot: (name, None where it is that of the type; English tooltip)} of a node's outputs that can be translated."""
    tooltips = info.get("output_tooltips") or [None] * len(info["output"])
    slots = {
        str(n): (name if name != kind else None, tip)
        for n, (kind, name, tip) in enumerate(zip(info["output"], info["output_name"], tooltips, strict=True))
    }
    return {slot: texts for slot, texts in slots.items() if any(texts)}


def test_no_other_languages_and_no_other_nodes(translations):
    assert set(translations) == set(LANGUAGES)
    for language in LANGUAGES:
        assert sorted(translations[language]["nodeDefs"]) == IDS
        assert "asdm" in translations[language]["nodeCategories"]


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("node", IDS)
def test_every_text_of_a_node_is_translated(client, translations, node, language):
    info = client.object_info(node)
    translated = translations[language]["nodeDefs"][node]
    named, said = [translated["display_name"]], [translated["description"]]
    tooltips = inputs(info["input"])
    explained = {
        choice for kind, options, _ in signatures.inputs(info).values() for choice in signatures.choices(kind, options)
    }
    assert set(translated["inputs"]) == set(tooltips)
    for name, english in tooltips.items():
        entry = translated["inputs"][name]
        named.append(entry["name"])
        assert bool(english) == ("tooltip" in entry), name
        if english:
            said.append(entry["tooltip"])
            # The choices themselves stay English: a tooltip that explains them must name them as they are.
            missing = [
                c for c in explained if re.search(rf"\b{re.escape(c)}(:|\))", english) and c not in entry["tooltip"]
            ]
            assert not missing, f"{name}: {missing}"
    assert set(translated.get("outputs", {})) == set(outputs(info))
    for slot, (name, tip) in outputs(info).items():
        entry = translated["outputs"][slot]
        assert bool(name) == ("name" in entry) and bool(tip) == ("tooltip" in entry), slot
        named.append(entry.get("name", ""))
        said += [entry["tooltip"]] if tip else []
    assert not [text for text in [*named, translated["description"]] if SYNTAX.search(text)]
    assert not [text for text in said if not re.search(LANGUAGES[language], text)]


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("node", IDS)
def test_every_node_has_a_help_page_in_each_language(client, translations, node, language):
    english = client.request(f"/extensions/asdm/docs/{node}.md").decode()
    page = client.request(f"/extensions/asdm/docs/{node}/{language}.md").decode()
    translated = translations[language]["nodeDefs"][node]
    assert page.startswith(f"# {translated['display_name']}\n")
    assert len(re.findall(LANGUAGES[language], page)) > 50
    for name, entry in translated["inputs"].items():
        if re.search(rf"\*\*{name}\*\*", english):
            assert f"**{entry['name']}**" in page, name
    assert set(KEPT.findall(english)) == set(KEPT.findall(page))
    assert len(re.findall(r"^\|", english, re.M)) == len(re.findall(r"^\|", page, re.M))
