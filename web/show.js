// What our nodes have to say after a run, on the nodes themselves. The front end shows pictures that a node makes; such
// nodes only begin large enough to be read. Words it does not show: they get a widget.
import { app } from '../../scripts/app.js'
import { api } from '../../scripts/api.js'
import { endProgress, grow, remembering, shows, write } from './outputs.js'

const WIDTH = 520
const PICTURE = 380 // height
const CAPTION = 24 // height of the size that the front end writes below a picture

// Gives the picture that a node made the height in which it is read at its own size. How high it is shown the front ends
// know when they have drawn the node, and what else can grow takes its share, so it takes a few steps.
function makeRoom(node, picture, still, steps = 10, before = 0) {
  if (!node.graph || !steps || !still()) return
  const shown = LiteGraph.vueNodesMode
    ? document.querySelector(`[data-node-id="${node.id}"] img`)?.clientHeight
    : node.widgets?.find((w) => w.name === '$$canvas-image-preview')?.computedHeight
  const wanted = picture.naturalHeight * Math.min(1, (node.size[0] - 16) / picture.naturalWidth) + CAPTION
  if (shown >= wanted) return
  const drawn = shown && shown !== before
  if (drawn) grow(node, wanted - shown)
  setTimeout(() => makeRoom(node, picture, still, drawn ? steps - 1 : steps, shown), 100)
}

app.registerExtension({
  name: 'asdm.show',
  nodeCreated(node) {
    const what = shows(node)
    if (what === 'picture') {
      node.setSize([Math.max(node.size[0], WIDTH), node.size[1] + PICTURE])
      let kept = false
      let latest
      const configured = node.onConfigure
      node.onConfigure = function (saved) {
        configured?.apply(this, arguments)
        kept = true // somebody has chosen its size
        this.setSize([...saved.size]) // inputs behind a choice shrink the node to its widgets when they come
      }
      const drawn = node.onExecuted
      node.onExecuted = function () {
        drawn?.apply(this, arguments)
        endProgress(this)
        const [picture] = arguments[0]?.images ?? []
        if (kept || !picture) return
        const image = (latest = new Image())
        image.onload = () => makeRoom(this, image, () => image === latest)
        image.src = api.apiURL('/view?' + new URLSearchParams(picture))
      }
    }
    if (what !== 'words') return
    const executed = node.onExecuted
    node.onExecuted = function (output) {
      executed?.apply(this, arguments)
      if (output?.text?.length) write(this, 'note', output.text.join('\n'))
    }
  },
  ...remembering('words')
})
