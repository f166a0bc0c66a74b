// What a node made in its last run, said again when the node is new: after a change of tabs, an undo, a run taken from the history.
import { app } from '../../scripts/app.js'

function tell(node, outputs) {
  // The front end keeps outputs by id; of nodes in a subgraph, by its id and theirs.
  const output = outputs?.[node.graph?.isRootGraph === false ? `${node.graph.id}:${node.id}` : node.id]
  if (output) node.onExecuted?.(output)
}

// The hooks of an extension by which nodes of these types get their outputs.
export function remembering(types) {
  const ours = (node) => types.includes(node.comfyClass)
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
