// The view of A/B Compare and Compare Images: slider, flip, difference, zoom in step, one pair of the batch after the other.
// A DOM widget, so that the old and the new node front end show the same. The pictures are ordinary <img> elements: the
// browser's own menu saves and copies them, with the workflow in them.
import { app } from '../../scripts/app.js'
import { api } from '../../scripts/api.js'
import { remembering } from './outputs.js'

const NODES = ['ASDMABCompare', 'ASDMCompareImages']
const MODES = {
  slider: 'Move over the picture: A on the left, B on the right',
  flip: 'Click the picture to change between A and B',
  difference: 'What differs, four times as bright; equal pixels are black',
  side: 'Side by side'
}
const LABELS = { slider: 'Slider', flip: 'Flip', difference: 'Difference', side: 'Side by side' }
const LETTERS = 'ABCDEFGH'
const HEIGHT = 320 // of the view, at least

const STYLE = `
.asdm-compare { display: flex; flex-direction: column; gap: 4px; width: 100%; height: 100%; min-height: ${HEIGHT}px; font: 12px sans-serif; color: #ddd; }
.asdm-compare .asdm-bar { display: flex; flex-wrap: wrap; gap: 4px; align-items: center; flex: none; }
.asdm-compare button, .asdm-compare select { background: #353535; color: #ddd; border: 1px solid #555; border-radius: 4px; padding: 2px 7px; font: inherit; cursor: pointer; }
.asdm-compare button[aria-pressed=true] { background: #f4a261; border-color: #f4a261; color: #1c2330; }
.asdm-compare .asdm-title { font-weight: bold; color: #fff; }
.asdm-compare .asdm-turn { display: flex; gap: 4px; align-items: center; white-space: nowrap; }
.asdm-compare .asdm-fill { flex: 1; }
.asdm-compare .asdm-stage { position: relative; flex: 1; min-height: 0; display: flex; gap: 4px; touch-action: none; user-select: none; outline: none; }
.asdm-compare .asdm-stage:focus { box-shadow: 0 0 0 1px #f4a261; border-radius: 4px; }
.asdm-compare .asdm-pane { position: relative; flex: 1; overflow: hidden; background: #1a1a1a; border-radius: 4px; isolation: isolate; }
.asdm-compare img { position: absolute; inset: 0; width: 100%; height: 100%; object-fit: contain; transform-origin: 0 0; -webkit-user-drag: none; }
.asdm-compare .asdm-pixels img { image-rendering: pixelated; }
.asdm-compare .asdm-line { position: absolute; top: 0; bottom: 0; width: 2px; margin-left: -1px; background: #fff; box-shadow: 0 0 3px #000; pointer-events: none; }
.asdm-compare .asdm-tag { position: absolute; top: 6px; max-width: 46%; padding: 2px 6px; background: #000a; border-radius: 4px; pointer-events: none; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.asdm-compare .asdm-empty { margin: auto; color: #888; }
`

function element(tag, attributes = {}, ...children) {
  const made = Object.assign(document.createElement(tag), attributes)
  made.append(...children)
  return made
}

class CompareView {
  constructor() {
    this.mode = 'slider'
    this.index = 0
    this.pair = [0, 1]
    this.split = 0.5
    this.flipped = false
    this.reset()
    this.bar = element('div', { className: 'asdm-bar' })
    this.stage = element('div', { className: 'asdm-stage', tabIndex: -1 })
    this.stage.dataset.captureWheel = true // the new front end leaves the wheel to a focused element marked so
    this.root = element('div', { className: 'asdm-compare' }, element('style', { textContent: STYLE }), this.bar, this.stage)
    this.stage.append(element('span', { className: 'asdm-empty', textContent: 'Run the workflow to compare' }))
    this.listen()
  }

  reset() {
    this.zoom = 1
    this.x = this.y = 0
  }

  show(payload) {
    this.payload = payload
    const count = payload.batches.length
    // Of two, there is nothing to choose: never one beside itself.
    if (this.pair.some((n) => n >= count) || (count === 2 && this.pair[0] === this.pair[1])) this.pair = [0, 1]
    this.index = Math.min(this.index, this.count() - 1)
    this.draw()
  }

  count() {
    return Math.max(...this.payload.batches.map((batch) => batch.length))
  }

  url(n) {
    const batch = this.payload.batches[n]
    const picture = batch[Math.min(this.index, batch.length - 1)]
    return api.apiURL('/view?' + new URLSearchParams(picture))
  }

  name(n) {
    return `${LETTERS[n]}  ${this.payload.labels[n]}`.trim()
  }

  draw() {
    const { batches, likeness, title } = this.payload
    this.bar.replaceChildren()
    for (const mode in MODES) {
      const button = element('button', { type: 'button', textContent: LABELS[mode], title: MODES[mode], onclick: () => this.change({ mode }) })
      button.setAttribute('aria-pressed', mode === this.mode)
      this.bar.append(button)
    }
    if (batches.length > 2) {
      this.pair.forEach((chosen, i) => {
        const select = element('select', { title: `Which picture is ${i ? 'on the right' : 'on the left'}` })
        batches.forEach((_, n) => select.append(new Option(this.name(n), n, false, n === chosen)))
        select.onchange = () => this.change({ pair: this.pair.map((n, j) => (j === i ? Number(select.value) : n)) })
        this.bar.append(select)
      })
    }
    const count = this.count()
    if (count > 1) {
      const turn = (by) => () => this.change({ index: (this.index + by + count) % count })
      this.bar.append(element('span', { className: 'asdm-turn' },
        element('button', { type: 'button', textContent: '\u2039', title: 'The pair before', onclick: turn(-1) }),
        element('span', { className: 'asdm-index', textContent: `${this.index + 1} of ${count}` }),
        element('button', { type: 'button', textContent: '\u203a', title: 'The next pair', onclick: turn(1) })
      ))
    }
    const [low, high] = [...this.pair].sort()
    const words = low === high ? ['identical'] : likeness[`${low}${high}`]
    this.bar.append(
      element('span', { className: 'asdm-fill' }),
      element('span', { className: 'asdm-title', textContent: title }),
      element('span', { className: 'asdm-likeness', textContent: words[Math.min(this.index, words.length - 1)] })
    )
    this.stage.replaceChildren()
    this.images = this.pair.map((n) => element('img', { src: this.url(n), alt: this.name(n), draggable: false }))
    for (const image of this.images) image.onload = () => this.place()
    const tags = this.pair.map((n, i) => element('span', { className: 'asdm-tag', textContent: this.name(n), style: i ? 'right: 6px' : 'left: 6px' }))
    if (this.mode === 'side') {
      this.panes = this.images.map((image, i) => element('div', { className: 'asdm-pane' }, image, tags[i]))
    } else {
      this.line = element('div', { className: 'asdm-line', hidden: this.mode !== 'slider' })
      this.tags = tags
      this.panes = [element('div', { className: 'asdm-pane' }, ...this.images, this.line, ...tags)]
    }
    this.stage.append(...this.panes)
    this.place()
  }

  change(what) {
    const beside = this.mode === 'side'
    Object.assign(this, what)
    if ((this.mode === 'side') !== beside) this.reset() // the panes change their width
    this.draw()
  }

  // Where both pictures lie: the same zoom and place for both. The slider is a clip in the pane, so it is undone for the zoom.
  place() {
    const [a, b] = this.images
    const width = this.panes[0].clientWidth
    for (const image of this.images) image.style.transform = `translate(${this.x}px, ${this.y}px) scale(${this.zoom})`
    const scale = (this.zoom * width) / (a.naturalWidth || width)
    this.stage.classList.toggle('asdm-pixels', scale * (window.devicePixelRatio || 1) > 2)
    b.style.clipPath = b.style.mixBlendMode = b.style.visibility = ''
    Object.assign(this.panes[0].style, { filter: '', background: '', clipPath: '' })
    if (this.mode === 'slider') {
      const from = (this.split * width - this.x) / this.zoom
      b.style.clipPath = `inset(0 0 0 ${from}px)`
      this.line.style.left = `${100 * this.split}%`
    } else if (this.mode === 'flip') {
      b.style.visibility = this.flipped ? 'visible' : 'hidden'
      this.tags[0].hidden = this.flipped
      this.tags[1].hidden = !this.flipped
    } else if (this.mode === 'difference') {
      b.style.mixBlendMode = 'difference'
      // At the very edge one picture can show by a fraction of a pixel.
      Object.assign(this.panes[0].style, { filter: 'brightness(4)', background: '#000', clipPath: 'inset(1px)' })
      for (const tag of this.tags) tag.hidden = true
    }
  }

  listen() {
    const stage = this.stage
    const pane = (event) => this.panes?.find((p) => p.contains(event.target))
    // The node may be drawn scaled: positions count in its own pixels.
    const at = (event, box) => {
      const r = box.getBoundingClientRect()
      return [((event.clientX - r.left) * box.clientWidth) / r.width, ((event.clientY - r.top) * box.clientHeight) / r.height]
    }
    let drag = null
    stage.addEventListener('wheel', (event) => {
      const box = pane(event)
      if (!box || document.activeElement !== stage) return // else the canvas zooms
      event.preventDefault()
      event.stopPropagation()
      const [x, y] = at(event, box)
      const zoom = Math.min(32, Math.max(1, this.zoom * 1.0015 ** -event.deltaY))
      this.x = x - ((x - this.x) * zoom) / this.zoom
      this.y = y - ((y - this.y) * zoom) / this.zoom
      this.zoom = zoom
      this.keepInside(box)
      this.place()
    }, { passive: false })
    stage.addEventListener('pointerdown', (event) => {
      const box = pane(event)
      if (!box || event.button) return
      event.stopPropagation()
      stage.focus({ preventScroll: true })
      stage.setPointerCapture(event.pointerId)
      drag = { box, from: at(event, box), x: this.x, y: this.y, moved: false }
    })
    stage.addEventListener('pointermove', (event) => {
      const box = drag?.box ?? pane(event)
      if (!box) return
      const [x, y] = at(event, box)
      if (drag && this.zoom > 1) {
        this.x = drag.x + x - drag.from[0]
        this.y = drag.y + y - drag.from[1]
        this.keepInside(box)
      }
      if (drag) drag.moved ||= Math.hypot(x - drag.from[0], y - drag.from[1]) > 3
      if (this.mode === 'slider' && !(drag && this.zoom > 1)) this.split = Math.min(1, Math.max(0, x / box.clientWidth))
      this.place()
    })
    stage.addEventListener('pointerup', () => {
      if (drag && !drag.moved && this.mode === 'flip') {
        this.flipped = !this.flipped
        this.place()
      }
      drag = null
    })
    stage.addEventListener('pointercancel', () => (drag = null))
    stage.addEventListener('dblclick', () => {
      if (!this.panes || this.mode === 'flip') return
      this.reset()
      this.place()
    })
    new ResizeObserver(() => this.panes && this.place()).observe(stage)
  }

  keepInside(box) {
    this.x = Math.min(0, Math.max(box.clientWidth * (1 - this.zoom), this.x))
    this.y = Math.min(0, Math.max(box.clientHeight * (1 - this.zoom), this.y))
  }
}

app.registerExtension({
  name: 'asdm.compare',
  nodeCreated(node) {
    if (!NODES.includes(node.constructor.comfyClass)) return
    const view = new CompareView()
    const widget = node.addDOMWidget('asdm_compare', 'asdm_compare', view.root, { serialize: false, hideOnZoom: false, getMinHeight: () => HEIGHT })
    widget.serializeValue = () => undefined
    // The properties panel writes its own width into the widgets it lists, and leaves it there.
    Object.defineProperty(widget, 'width', { get: () => undefined, set: () => {} })
    const [width, height] = node.size
    node.setSize([Math.max(width, 420), Math.max(height, 460)])
    const executed = node.onExecuted
    node.onExecuted = function (output) {
      executed?.apply(this, arguments)
      if (output?.asdm_compare?.length) view.show(output.asdm_compare[0])
    }
  },
  ...remembering(NODES)
})
