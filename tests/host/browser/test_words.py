"""What a run says stands on its nodes, and is there again later."""

import pytest

from demo.server import PACK
from demo.thumbnails import api_graph

from tests.host.browser.on_page import NODE, PATIENCE, READY, drop, run, select, set_widget, until


def test_words_of_a_run_stand_on_the_node(page, front_end):
    drop(page, PACK / "workflows" / "11 Full stack.json")
    page.evaluate(f"type => {{ {NODE}; node.onExecuted({{text: ['plays in large pictures']}}) }}", "ASDMGRIAttention")
    select(page, "ASDMGRIAttention")
    page.wait_for_function(
        "() => [...document.querySelectorAll('.asdm-words')].some(e => e.textContent === 'plays in large pictures' && "
        "e.clientWidth > 100)"
    )
    # They are not sent with the next run.
    assert page.evaluate("async () => (await app.graphToPrompt()).output") == api_graph(
        PACK / "workflows" / "11 Full stack.json"
    )


def test_what_a_technique_says_in_a_run_stands_on_its_node_until_the_next(page):
    drop(page, PACK / "workflows" / "11 Full stack.json", name="Notes.json")
    id = page.evaluate(f"type => {{ {NODE}; return String(node.id) }}", "ASDMGRIAttention")
    speak = """([id, notes]) => app.api.dispatchCustomEvent("asdm.notes", {node: id, notes, prompt_id: ""})"""
    standing = """notes => [app.rootGraph, ...app.rootGraph.subgraphs.values()].flatMap(graph => graph.nodes)
      .flatMap(node => node.widgets ?? []).filter(w => w.name === "asdm_notes").map(w => w.value).join("|") === notes"""
    before = page.evaluate("async () => (await app.graphToPrompt()).output")
    page.evaluate(speak, [id, ["another node replaces it.", "too small."]])
    page.wait_for_function(standing, arg="another node replaces it.\ntoo small.")
    assert page.evaluate("async () => (await app.graphToPrompt()).output") == before
    page.evaluate("""() => app.api.dispatchCustomEvent("execution_start", {prompt_id: "", timestamp: 0})""")
    page.wait_for_function(standing, arg="")
    group = page.evaluate("id => String(app.graph.convertToSubgraph(new Set([app.graph.getNodeById(id)])).node.id)", id)
    (inside,) = page.evaluate(
        "group => app.graph.getNodeById(group).subgraph.nodes.map(n => `${group}:${n.id}`)", group
    )
    page.evaluate(speak, [inside, ["in a subgraph."]])
    page.wait_for_function(standing, arg="in a subgraph.")


@pytest.mark.sweep(1)
def test_a_page_that_is_opened_later_shows_what_was_said(browser, page, server, front_end):
    """In two steps nothing can be left out, and Speed Up says so on its node."""
    name = f"Said before, {front_end}"
    drop(page, PACK / "workflows" / "11 Full stack.json", name=f"{name}.json")
    id = page.evaluate(f"type => {{ {NODE}; return String(node.id) }}", "ASDMSpeedUp")
    for widget, value in (("steps", 2), ("rounds", 1), ("seed", 10 + len(front_end))):  # not the host's kept result
        set_widget(page, "ASDMABCompare", widget, value)
    said = """id => app.graph.getNodeById(id)?.widgets?.find(w => w.name === "asdm_notes")?.value ?? ''"""
    run(page)
    until(lambda: "every step is computed" in page.evaluate(said, id))
    # Once more, with nothing changed: the host runs nothing, and what it shows is what that was said of.
    page.evaluate("() => { window.over = new Promise(done => app.api.addEventListener('execution_success', done)) }")
    run(page)
    page.evaluate("() => window.over.then(() => true)")
    until(lambda: "every step is computed" in page.evaluate(said, id))
    saved = page.evaluate("() => app.graph.serialize()")
    later = browser.new_page(viewport={"width": 1366, "height": 768})
    try:
        later.set_default_timeout(PATIENCE)
        later.goto(server.url)
        later.wait_for_function(READY)
        later.evaluate("saved => app.loadGraphData(saved)", saved)
        until(lambda: "every step is computed" in later.evaluate(said, id))
        later.evaluate("saved => app.loadGraphData(saved)", saved | {"id": "11111111-1111-4111-8111-111111111111"})
        until(lambda: later.evaluate(said, id) == "")  # another workflow, where the same id is another node
    finally:
        later.close()


SPOKEN = """([id, note, title]) => {
  const batches = [[{filename: "a.png"}], [{filename: "b.png"}]]
  const said = {text: [note], asdm_compare: [{title, labels: ["a", "b"], batches, likeness: {"01": ["identical"]}}]}
  app.api.dispatchCustomEvent("executed", {node: id, display_node: id, output: said, prompt_id: ""})
}"""
SHOWN = """([note, title]) => {
  const nodes = [app.rootGraph, ...app.rootGraph.subgraphs.values()].flatMap(graph => graph.nodes)
  const [words, view] = ["ASDMGRIAttention", "ASDMABCompare"].map(type => nodes.find(n => n.type === type)?.widgets)
  return words?.find(w => w.name === "note")?.value === note
    && view?.find(w => w.name === "asdm_compare").element.querySelector(".asdm-title")?.textContent === title
}"""


@pytest.mark.sweep(1)
def test_what_a_run_showed_is_back_after_a_change_of_tabs_and_an_undo(page, front_end):
    name = f"Left and back, {front_end}"
    drop(page, PACK / "workflows" / "01 Quick start.json", name=f"{name}.json")
    page.evaluate("() => app.graph.add(LiteGraph.createNode('ASDMGRIAttention'))")
    ids = [
        page.evaluate(f"type => {{ {NODE}; return String(node.id) }}", type)
        for type in ("ASDMGRIAttention", "ASDMABCompare")
    ]
    for id in ids:
        page.evaluate(SPOKEN, [id, "large pictures", "1.5x"])
    page.wait_for_function(SHOWN, arg=["large pictures", "1.5x"])
    drop(page, PACK / "workflows" / "09 Combined UNet from a pack.json")
    page.locator(".workflow-tab").filter(has_text=name).click()
    page.wait_for_function("name => app.extensionManager.workflow.activeWorkflow.filename === name", arg=name)
    page.wait_for_function(SHOWN, arg=["large pictures", "1.5x"])
    # The same in a subgraph, where the front end names outputs in another way.
    group = page.evaluate(
        "ids => String(app.graph.convertToSubgraph(new Set(ids.map(id => app.graph.getNodeById(id)))).node.id)", ids
    )
    inside = page.evaluate("group => app.graph.getNodeById(group).subgraph.nodes.map(n => `${group}:${n.id}`)", group)
    for id in inside:
        page.evaluate(SPOKEN, [id, "in a subgraph", "2.5x"])
    page.wait_for_function(SHOWN, arg=["in a subgraph", "2.5x"])
    assert page.evaluate(
        """async group => {
      const {changeTracker} = app.extensionManager.workflow.activeWorkflow
      const before = app.graph.getNodeById(group)
      changeTracker.captureCanvasState()
      before.title = "Moved"
      changeTracker.captureCanvasState()
      await changeTracker.undo()
      return app.graph.getNodeById(group) !== before
    }""",
        group,
    )
    page.wait_for_function(SHOWN, arg=["in a subgraph", "2.5x"])
