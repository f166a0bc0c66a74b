// What our nodes have to say after a run, on the nodes themselves. The front end shows pictures that a node makes; such
// nodes only begin large enough to be read. Words it does not show: they get a widget.
import { app } from '../../scripts/app.js'
import { endProgress, remembering, shows, write } from './outputs.js'

const WIDTH = 520
const PICTURE = 380 // height

app.registerExtension({
  name: 'asdm.show',
  nodeCreated(node) {
    const what = shows(node)
    if (what === 'picture') {
      node.setSize([Math.max(node.size[0], WIDTH), node.size[1] + PICTURE])
      const configured = node.onConfigure
      node.onConfigure = function (saved) {
        configured?.apply(this, arguments)
        this.setSize([...saved.size]) // inputs behind a choice shrink the node to its widgets when they come
      }
      const drawn = node.onExecuted
      node.onExecuted = function () {
        drawn?.apply(this, arguments)
        endProgress(this)
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
