// What a node shows after a run, and that it is said again when the node is new: after a change of tabs, an undo, a run
// taken from the history. Which nodes show what, the nodes say themselves, with one of their inputs.
import { app } from '../../scripts/app.js'
import { ComfyWidgets } from '../../scripts/widgets.js'

// "comparison", "picture" or "words"; undefined for nodes that show nothing, and for those of others.
export function shows(node) {
  const { required, optional } = node.constructor.nodeData?.input ?? {}
  return Object.values({ ...required, ...optional }).find((input) => input[1]?.asdm_shows)?.[1].asdm_shows
}

// Shows text on a node, in a widget of its own that is not saved and not sent with a run; no text takes it away.
export function write(node, name, text) {
  const at = node.widgets?.findIndex((w) => w.name === name) ?? -1
  let widget = node.widgets?.[at]
  if (!text) {
    if (!widget) return
    widget.onRemove?.()
    node.widgets.splice(at, 1)
    node.setDirtyCanvas?.(true)
    return
  }
  if (!widget) {
    widget = ComfyWidgets.STRING(node, name, ['STRING', { multiline: true }], app).widget
    widget.element.readOnly = true
    widget.options.read_only = true
    widget.options.serialize = widget.serialize = false
    widget.serializeValue = () => undefined
  }
  widget.value = text
}

// Takes the words about the time left off a node: its run is over. The front end does so with the same steps.
export function endProgress(node) {
  const at = node.widgets?.findIndex((w) => w.name === '$$node-text-preview') ?? -1
  if (at < 0) return
  node.widgets[at].onRemove?.()
  node.widgets.splice(at, 1)
}

function tell(node, outputs) {
  // The front end keeps outputs by id; of nodes in a subgraph, by its id and theirs.
  const output = outputs?.[node.graph?.isRootGraph === false ? `${node.graph.id}:${node.id}` : node.id]
  if (output) node.onExecuted?.(output)
}

// The hooks of an extension by which nodes that show this get their outputs.
export function remembering(what) {
  const ours = (node) => shows(node) === what
  return {
    // An undo keeps the outputs and makes new nodes.
    loadedGraphNode(node) {
      if (ours(node)) tell(node, app.nodeOutputs)
    },
    // A change of tabs drops the outputs first, and brings back those of the tab when its nodes are there.
    onNodeOutputsUpdated(outputs) {
      if (!Object.keys(outputs).length) return // as before the first graph is there
      const root = app.rootGraph ?? app.graph
      for (const graph of [root, ...(root.subgraphs?.values() ?? [])]) {
        for (const node of graph.nodes.filter(ours)) tell(node, outputs)
      }
    }
  }
}
