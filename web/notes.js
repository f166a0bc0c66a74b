// What our techniques say in a run, on the nodes they come from: where one cannot act, or does less than it was asked for.
// It stays as long as the results of that run. The server keeps it too (GET /asdm/notes), for pages that are opened later,
// for nodes that are made anew (after a change of tabs, an undo), and where a run takes the results of one before.
import { api } from '../../scripts/api.js'
import { app } from '../../scripts/app.js'
import { write } from './outputs.js'

const NAME = 'asdm_notes'

// The node with an id as the host names it: "12", in subgraphs "7:12".
function find(id) {
  let graph = app.rootGraph ?? app.graph
  let node
  for (const part of String(id).split(':')) {
    node = graph?.getNodeById(part) ?? graph?.getNodeById(Number(part))
    graph = node?.subgraph
  }
  return node
}

function all(graph = app.rootGraph ?? app.graph) {
  return graph.nodes.flatMap((node) => [node, ...(node.subgraph ? all(node.subgraph) : [])])
}

function show(id, notes) {
  const node = find(id)
  // Ids start anew in each workflow: what was said of another one's node must not stand on this one's.
  if (node?.constructor.nodeData?.name?.startsWith('ASDM')) write(node, NAME, notes.join('\n'))
}

// Says again what holds of the last results of the workflow that is shown.
async function recall() {
  const workflow = (app.rootGraph ?? app.graph).id
  const answer = await api.fetchApi('/asdm/notes?' + new URLSearchParams({ workflow }))
  if (!answer.ok || (app.rootGraph ?? app.graph).id !== workflow) return // another one is shown by now
  for (const [id, notes] of Object.entries(await answer.json())) show(id, notes)
}

app.registerExtension({
  name: 'asdm.notes',
  afterConfigureGraph: recall,
  setup() {
    api.addEventListener('asdm.notes', ({ detail }) => show(detail.node, detail.notes))
    api.addEventListener('execution_start', () => {
      for (const node of all()) write(node, NAME, '')
    })
    // The host records a run between the word that it is over and the next one about its queue.
    let over = false
    api.addEventListener('execution_success', () => (over = true))
    api.addEventListener('status', () => {
      if (over) recall()
      over = false
    })
  }
})
