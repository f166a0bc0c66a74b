"""The README's first screen."""

import html
import re

from playwright.sync_api import expect

from demo.server import PACK

from tests.host.browser.on_page import SHOTS, loaded


def as_page(markdown: str) -> str:
    """The little of Markdown that the first screen of the README uses, as HTML in the form of a code host's page."""
    blocks = []
    for block in re.split(r"\n{2,}", markdown.strip()):
        if block.startswith("```"):
            blocks.append(f"<pre>{html.escape(block.strip('`').strip())}</pre>")
            continue
        text = html.escape(block)
        text = re.sub(r"!\[(.*?)\]\((.*?)\)", r'<img alt="\1" src="\2">', text)
        text = re.sub(r"\[(.*?)\]\((.*?)\)", r'<a href="\2">\1</a>', text)
        text = re.sub(r"\*\*(.*?)\*\*", r"<b>\1</b>", text)
        text = re.sub(r"\*(.*?)\*", r"<i>\1</i>", text)
        heading = re.match(r"(#+) (.*)", text)
        blocks.append(f"<h{len(heading[1])}>{heading[2]}</h{len(heading[1])}>" if heading else f"<p>{text}</p>")
    style = """body { width: 838px; margin: 32px auto; font: 16px/1.5 sans-serif } h1, p, pre { margin: 0 0 16px }
      img { max-width: 100% } pre { font-size: 85%; padding: 16px; line-height: 1.45 }"""
    return f"<style>{style}</style>{''.join(blocks)}"


def test_the_readme_opens_with_picture_headline_and_commands(browser):
    file = PACK / "readme-first-screen.html"  # beside the README, whose pictures it shows
    file.write_text(as_page((PACK / "README.md").read_text("utf-8").split("\n## ")[0]), "utf-8")
    page = browser.new_page(viewport={"width": 1280, "height": 720})
    try:
        page.goto(file.as_uri())
        picture, commands = page.locator("img"), page.locator("pre")
        loaded(picture)
        for shown in (page.locator("h1"), picture, commands):
            box = shown.bounding_box()
            assert box["y"] >= 0 and box["y"] + box["height"] <= 720
        expect(commands).to_contain_text("make demo")
        assert picture.evaluate("image => image.naturalWidth") >= 838  # not blown up
        page.screenshot(path=SHOTS / "readme.png")
    finally:
        page.close()
        file.unlink()
