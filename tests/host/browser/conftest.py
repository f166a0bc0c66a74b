"""The nodes as a person meets them: the real front end in a real browser.

Screenshots are written to output/browser/, to be looked at.
"""

import pytest
from playwright.sync_api import expect, sync_playwright

from demo.browser import WANTED, find_browser
from demo.server import Client

from tests.host.browser.on_page import PATIENCE, READY, SHOTS


@pytest.fixture(scope="module")
def browser():
    program = find_browser()
    assert program, WANTED
    SHOTS.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def opened(browser, server):
    """ComfyUI's page, loaded once: loading takes longer than most of the tests."""
    Client(server.url).request(
        "/settings", {"Comfy.TutorialCompleted": True}
    )  # a new user's page opens with the templates over it
    page = browser.new_page(viewport={"width": 1600, "height": 1000})
    page.set_default_timeout(PATIENCE)
    page.errors = []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.goto(server.url)
    page.wait_for_function(READY)
    page.screenshot()  # what fades out as the page opens goes with a frame, and without a window nobody asks for one
    expect(page.locator(".p-blockui-mask")).to_have_count(0)
    return page


@pytest.fixture
def page(opened, request):
    opened.errors.clear()
    yield opened
    opened.screenshot(path=SHOTS / f"{request.node.name}.png")
    for _ in range(3):
        opened.keyboard.press("Escape")
    if opened.get_by_test_id("error-overlay-dismiss").is_visible():
        opened.get_by_test_id("error-overlay-dismiss").click()
    assert not opened.errors


@pytest.fixture(params=["canvas", "vue"])
def front_end(page, request):
    """Both of the host's front ends for nodes: the one that draws them on the canvas, and the one of Vue components."""
    choose = "on => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)"
    page.evaluate(choose, request.param == "vue")
    yield request.param
    page.evaluate(choose, False)
