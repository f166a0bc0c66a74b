// What a node shows after a run, and that it is said again when the node is new: after a change of tabs, an undo, a run
// taken from the history. Which nodes show what, the nodes say themselves, with one of their inputs.
import { app } from '../../scripts/app.js'

// "comparison", "picture" or "words"; undefined for nodes that show nothing, and for those of others.
export function shows(node) {
  const { required, optional } = node.constructor.nodeData?.input ?? {}
  return Object.values({ ...required, ...optional }).find((input) => input[1]?.asdm_shows)?.[1].asdm_shows
}

const LINE = 16 // px, of words
const ROOM = 12 // px above and below them
const MARGIN = 20 // px that the front end keeps above and below a widget like this
const STYLE = `font: 12px/${LINE}px sans-serif; padding: ${ROOM / 2}px 8px; box-sizing: border-box; border-radius: 6px;
  color: var(--input-text, #ddd); background: var(--comfy-input-bg, #222); white-space: pre-wrap; overflow-wrap: anywhere;
  user-select: text;`

// Height of words in a node so wide, so that all of them are read without scrolling.
function heightOf(text, width) {
  const pen = document.createElement('canvas').getContext('2d')
  pen.font = '12px sans-serif'
  const room = (width - 56) / 1.08
  let lines = 0
  for (const line of text.split('\n')) {
    lines += 1
    let used = 0
    for (const word of line.split(' ')) {
      const wide = pen.measureText(word + ' ').width
      if (used && used + wide > room) [lines, used] = [lines + 1, 0]
      lines += Math.max(0, Math.ceil(wide / room) - 1) // a word longer than a line is broken
      used = (used + wide) % room
    }
  }
  return LINE * lines + ROOM + MARGIN
}

// Shows text on a node, in a widget of its own that is not saved and not sent with a run; no text takes it away.
export function write(node, name, text) {
  let widget = node.widgets?.find((w) => w.name === name)
  if (!text) {
    if (widget) drop(node, name)
    node.setDirtyCanvas?.(true)
    return
  }
  if (!widget) {
    const element = Object.assign(document.createElement('div'), { className: 'asdm-words' })
    element.style.cssText = STYLE
    widget = node.addDOMWidget(name, 'asdm_words', element, {
      serialize: false,
      getValue: () => element.textContent,
      setValue: (value) => (element.textContent = value),
      getMinHeight: () => heightOf(element.textContent, node.size[0]),
      getMaxHeight: () => heightOf(element.textContent, node.size[0])
    })
    widget.serialize = false
    widget.serializeValue = () => undefined
    // The properties panel writes its own width into the widgets it lists, and leaves it there.
    Object.defineProperty(widget, 'width', { get: () => undefined, set: () => {} })
  }
  widget.value = text
  grow(node, node.computeSize()[1] - node.size[1])
}

// Makes a node higher.
export function grow(node, by) {
  if (!(by > 0)) return
  node.setSize([node.size[0], node.size[1] + by])
  node.setDirtyCanvas?.(true, true)
}

// Takes a widget off a node, by its name; returns its height.
function drop(node, name) {
  const at = node.widgets?.findIndex((w) => w.name === name) ?? -1
  if (at < 0) return 0
  const [widget] = node.widgets.splice(at, 1)
  widget.onRemove?.()
  return widget.computedHeight ?? 0
}

// Takes off a node what was shown while it ran, words about the time left and a picture that is not its result: its run is
// over. The front end does so with the same steps.
export function endProgress(node) {
  drop(node, '$$node-text-preview')
  if (!node.imgs?.[0]?.src.startsWith('blob:')) return
  delete app.nodePreviewImages?.[node.id]
  node.imgs = undefined
  const freed = drop(node, '$$canvas-image-preview')
  node.setSize([node.size[0], Math.max(node.size[1] - freed, node.computeSize()[1])])
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
