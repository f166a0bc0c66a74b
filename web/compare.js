// The view of A/B Compare and Compare Images: slider, flip, difference, side by side, zoom in step, one pair of the batch
// after the other, on the node or filling the window. A DOM widget, so that the old and the new node front end show the
// same. The pictures are ordinary <img> elements: the browser's own menu saves and copies them too.
import { app } from '../../scripts/app.js'
import { api } from '../../scripts/api.js'
import { endProgress, remembering, shows } from './outputs.js'
import { word } from './words.js'

const MODES = {
  slider: ['Slider', 'Move over the picture: A on the left, B on the right'],
  flip: ['Flip', 'Click the picture to change between A and B'],
  difference: ['Difference', 'What differs, so many times as bright; equal pixels are black'],
  side: ['Side by side', 'All of them, with one zoom']
}
const LETTERS = 'ABCDEFGH'
const HEIGHT = 320 // of the view, at least
const FARTHEST = 32 // zoom
const GAINS = [1, 2, 4, 8, 16, 32] // of the difference
const GRIP = 24 // px beside the slider's line that take it while zoomed in

const STYLE = `
.asdm-compare { display: flex; flex-direction: column; gap: 4px; width: 100%; height: 100%; min-height: ${HEIGHT}px; font: 12px sans-serif; color: var(--input-text, #ddd); box-sizing: border-box; }
.asdm-compare .asdm-bar { display: flex; flex-wrap: wrap; gap: 4px; align-items: center; flex: none; }
.asdm-compare button, .asdm-compare select { background: #353535; color: #ddd; border: 1px solid #555; border-radius: 4px; padding: 2px 7px; font: inherit; cursor: pointer; }
.asdm-compare button[aria-pressed=true] { background: #f4a261; border-color: #f4a261; color: #1c2330; }
.asdm-compare .asdm-title { font-weight: bold; }
.asdm-compare .asdm-turn { display: flex; gap: 4px; align-items: center; white-space: nowrap; }
.asdm-compare .asdm-gain { display: flex; gap: 4px; align-items: center; }
.asdm-compare .asdm-gain input { width: 70px; accent-color: #f4a261; }
.asdm-compare .asdm-zoom { min-width: 46px; font-variant-numeric: tabular-nums; }
.asdm-compare .asdm-fill { flex: 1; }
.asdm-compare .asdm-stage { position: relative; flex: 1; min-height: 0; display: flex; gap: 4px; touch-action: none; user-select: none; outline: none; }
.asdm-compare .asdm-stage:focus { box-shadow: 0 0 0 1px #f4a261; border-radius: 4px; }
.asdm-compare .asdm-pane { position: relative; flex: 1; overflow: hidden; background: #1a1a1a; border-radius: 4px; isolation: isolate; }
.asdm-compare img { position: absolute; inset: 0; width: 100%; height: 100%; object-fit: contain; transform-origin: 0 0; -webkit-user-drag: none; }
.asdm-compare .asdm-pixels img { image-rendering: pixelated; }
.asdm-compare .asdm-line { position: absolute; top: 0; bottom: 0; width: 2px; margin-left: -1px; background: #fff; box-shadow: 0 0 3px #000; pointer-events: none; }
.asdm-compare .asdm-tag { color: #ddd; position: absolute; top: 6px; max-width: 46%; padding: 2px 6px; background: #000a; border-radius: 4px; pointer-events: none; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.asdm-compare .asdm-hint { color: #ddd; position: absolute; bottom: 6px; left: 50%; transform: translateX(-50%); padding: 2px 8px; background: #000a; border-radius: 4px; pointer-events: none; white-space: nowrap; opacity: 0; transition: opacity .2s; }
.asdm-compare .asdm-stage:hover:not(:focus) .asdm-hint { opacity: 1; }
.asdm-compare .asdm-empty { margin: auto; color: var(--descrip-text, #888); }
dialog.asdm-compare { position: fixed; inset: 0; width: 100vw; height: 100vh; max-width: none; max-height: none; margin: 0; padding: 12px; border: 0; background: #111; color: #ddd; font-size: 14px; }
dialog.asdm-compare:not([open]) { display: none; }
`

function element(tag, attributes = {}, ...children) {
  const made = Object.assign(document.createElement(tag), attributes)
  made.append(...children)
  return made
}

function button(text, title, onclick) {
  return element('button', { type: 'button', textContent: text, title, onclick })
}

class CompareView {
  constructor() {
    this.mode = 'slider'
    this.index = 0
    this.pair = [0, 1]
    this.split = 0.5
    this.gain = 4
    this.flipped = false
    this.reset()
    this.bar = element('div', { className: 'asdm-bar' })
    this.stage = element('div', { className: 'asdm-stage', tabIndex: -1 })
    this.stage.dataset.captureWheel = true // the new front end leaves the wheel to a focused element marked so
    this.root = element('div', { className: 'asdm-compare' }, element('style', { textContent: STYLE }), this.bar, this.stage)
    this.stage.append(element('span', { className: 'asdm-empty', textContent: word('Run the workflow to compare') }))
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

  // The pictures on the stage: two, or all of them side by side.
  shown() {
    return this.mode === 'side' && this.payload.batches.length > 2 ? this.payload.batches.map((_, n) => n) : this.pair
  }

  picture(n) {
    const batch = this.payload.batches[n]
    return batch[Math.min(this.index, batch.length - 1)]
  }

  url(n) {
    return api.apiURL('/view?' + new URLSearchParams(this.picture(n)))
  }

  name(n) {
    return `${LETTERS[n]}  ${this.payload.labels[n]}`.trim()
  }

  turn(by) {
    const count = this.count()
    this.change({ index: (this.index + by + count) % count })
  }

  draw() {
    const { batches, likeness, title } = this.payload
    this.bar.replaceChildren()
    for (const [mode, [label, help]] of Object.entries(MODES)) {
      const made = button(word(label), word(help), () => this.change({ mode }))
      made.setAttribute('aria-pressed', mode === this.mode)
      this.bar.append(made)
    }
    const shown = this.shown()
    if (batches.length > 2 && this.mode !== 'side') {
      this.pair.forEach((chosen, i) => {
        const select = element('select', { title: word(`Which picture is on the ${i ? 'right' : 'left'}`) })
        batches.forEach((_, n) => select.append(new Option(this.name(n), n, false, n === chosen)))
        select.onchange = () => this.change({ pair: this.pair.map((n, j) => (j === i ? Number(select.value) : n)) })
        this.bar.append(select)
      })
    }
    const count = this.count()
    if (count > 1) {
      this.bar.append(element('span', { className: 'asdm-turn' },
        button('\u2039', word('The pair before') + ' (\u2190)', () => this.turn(-1)),
        element('span', { className: 'asdm-index', textContent: `${this.index + 1} ${word('of')} ${count}` }),
        button('\u203a', word('The next pair') + ' (\u2192)', () => this.turn(1))
      ))
    }
    if (this.mode === 'difference') {
      const says = element('span', { textContent: `\u00d7${this.gain}` })
      const range = element('input', { type: 'range', min: 0, max: GAINS.length - 1, step: 1, value: GAINS.indexOf(this.gain), title: word('Brightness of the difference') })
      range.oninput = () => {
        this.gain = GAINS[range.value]
        says.textContent = `\u00d7${this.gain}`
        this.place()
      }
      this.bar.append(element('label', { className: 'asdm-gain' }, range, says))
    }
    this.readout = button('', word('Zoom; click to reset'), () => {
      this.reset()
      this.place()
    })
    this.readout.className = 'asdm-zoom'
    this.enlarge = button(word(this.dialog?.open ? 'Close' : 'Enlarge'), word('Fill the window; Escape closes'), () => this.large())
    this.copier = button(word('Copy'), word('Copy what is shown'), () => this.copy())
    const [low, high] = [...this.pair].sort()
    const words = low === high ? ['identical'] : likeness[`${low}${high}`]
    this.bar.append(
      this.readout,
      button(word('Save'), word('Save the pictures shown, with the workflow in them'), () => this.save()),
      this.copier,
      this.enlarge,
      element('span', { className: 'asdm-fill' }),
      element('span', { className: 'asdm-title', textContent: title }),
      element('span', { className: 'asdm-likeness', textContent: shown.length > 2 ? '' : word(words[Math.min(this.index, words.length - 1)]) })
    )
    this.stage.replaceChildren()
    this.images = shown.map((n) => element('img', { src: this.url(n), alt: this.name(n), draggable: false }))
    for (const image of this.images) image.onload = () => this.place()
    this.tags = shown.map((n, i) => element('span', { className: 'asdm-tag', textContent: this.name(n), style: i && this.mode !== 'side' ? 'right: 6px' : 'left: 6px' }))
    this.line = element('div', { className: 'asdm-line', hidden: this.mode !== 'slider' })
    this.panes =
      this.mode === 'side'
        ? this.images.map((image, i) => element('div', { className: 'asdm-pane' }, image, this.tags[i]))
        : [element('div', { className: 'asdm-pane' }, ...this.images, this.line, ...this.tags)]
    this.stage.append(...this.panes, element('div', { className: 'asdm-hint', textContent: word('Click the picture, then turn the wheel to zoom') }))
    this.place()
  }

  change(what) {
    const beside = this.mode === 'side'
    Object.assign(this, what)
    if ((this.mode === 'side') !== beside) this.reset() // the panes change their width
    this.draw()
  }

  // Where the pictures lie: the same zoom and place for all. The slider is a clip in the pane, so it is undone for the zoom.
  place() {
    const [a, b] = this.images
    const { clientWidth: width, clientHeight: height } = this.panes[0]
    for (const image of this.images) image.style.transform = `translate(${this.x}px, ${this.y}px) scale(${this.zoom})`
    const fit = a.naturalWidth ? Math.min(width / a.naturalWidth, height / a.naturalHeight) : 1
    // Small pictures are drawn smoothly; who zooms in wants to see pixels.
    this.stage.classList.toggle('asdm-pixels', this.zoom > 1 && this.zoom * fit * (window.devicePixelRatio || 1) > 2)
    this.readout.textContent = `${this.zoom < 10 ? this.zoom.toFixed(1) : Math.round(this.zoom)}\u00d7`
    if (this.mode === 'side') return
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
    } else {
      b.style.mixBlendMode = 'difference'
      // At the very edge one picture can show by a fraction of a pixel.
      Object.assign(this.panes[0].style, { filter: `brightness(${this.gain})`, background: '#000', clipPath: 'inset(1px)' })
      for (const tag of this.tags) tag.hidden = true
    }
  }

  // The view fills the window, or goes back to its node.
  large() {
    if (this.dialog?.open) return this.dialog.close()
    this.dialog ??= element('dialog', { className: 'asdm-compare' })
    document.body.append(this.dialog)
    this.dialog.append(element('style', { textContent: STYLE }), this.bar, this.stage)
    this.dialog.onclose = () => {
      this.root.append(this.bar, this.stage)
      this.dialog.replaceChildren()
      this.dialog.remove()
      this.reset()
      this.draw()
    }
    // The front end has shortcuts of its own for these keys.
    this.dialog.onkeydown = (event) => {
      event.stopPropagation()
      this.key(event)
    }
    this.dialog.showModal()
    this.reset()
    this.draw()
    this.stage.focus({ preventScroll: true })
  }

  key(event) {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key]
    if (!by || !this.payload || event.target.tagName === 'INPUT' || event.target.tagName === 'SELECT') return
    event.preventDefault()
    event.stopPropagation()
    this.turn(by)
  }

  save() {
    for (const n of this.shown()) {
      const { filename } = this.picture(n)
      element('a', { href: this.url(n), download: filename }).click()
    }
  }

  // What is shown, at the size of the pictures.
  drawn() {
    const images = this.mode === 'flip' ? [this.images[this.flipped ? 1 : 0]] : this.images
    const width = Math.max(...images.map((image) => image.naturalWidth))
    const height = Math.max(...images.map((image) => image.naturalHeight))
    const beside = this.mode === 'side' ? images.length : 1
    const canvas = element('canvas', { width: beside * width, height })
    const paper = canvas.getContext('2d')
    images.forEach((image, i) => {
      paper.save()
      if (this.mode === 'slider' && i) {
        paper.beginPath()
        paper.rect(this.split * width, 0, width, height)
        paper.clip()
      }
      if (this.mode === 'difference' && i) paper.globalCompositeOperation = 'difference'
      paper.drawImage(image, beside > 1 ? i * width : 0, 0, width, height)
      paper.restore()
    })
    if (this.mode !== 'difference' || this.gain === 1) return canvas
    const bright = element('canvas', { width: canvas.width, height })
    const over = bright.getContext('2d')
    over.filter = `brightness(${this.gain})`
    over.drawImage(canvas, 0, 0)
    return bright
  }

  async copy() {
    let said = 'Copied'
    try {
      if (this.images.some((image) => !image.naturalWidth)) throw new Error('gone')
      const blob = new Promise((resolve) => this.drawn().toBlob(resolve))
      await navigator.clipboard.write([new ClipboardItem({ 'image/png': blob })])
    } catch (error) {
      said = error.message === 'gone' ? 'The pictures are gone; run again' : 'Copying needs https or localhost'
    }
    this.copier.textContent = word(said)
    const copier = this.copier
    setTimeout(() => (copier.textContent = word('Copy')), 2000)
  }

  listen() {
    const stage = this.stage
    const pane = (event) => this.panes?.find((p) => p.contains(event.target))
    // The node may be drawn scaled: positions count in its own pixels.
    const at = (event, box) => {
      const r = box.getBoundingClientRect()
      return [((event.clientX - r.left) * box.clientWidth) / r.width, ((event.clientY - r.top) * box.clientHeight) / r.height]
    }
    const zoomTo = (zoom, [x, y], box) => {
      zoom = Math.min(FARTHEST, Math.max(1, zoom))
      this.x = x - ((x - this.x) * zoom) / this.zoom
      this.y = y - ((y - this.y) * zoom) / this.zoom
      this.zoom = zoom
      this.keepInside(box)
    }
    let drag = null
    const fingers = new Map() // pointer id -> where it is
    stage.addEventListener('keydown', (event) => this.key(event))
    stage.addEventListener('wheel', (event) => {
      const box = pane(event)
      if (!box || document.activeElement !== stage) return // else the canvas zooms
      event.preventDefault()
      event.stopPropagation()
      zoomTo(this.zoom * 1.0015 ** -event.deltaY, at(event, box), box)
      this.place()
    }, { passive: false })
    stage.addEventListener('pointerdown', (event) => {
      const box = pane(event)
      if (!box || event.button) return
      event.stopPropagation()
      stage.focus({ preventScroll: true })
      stage.setPointerCapture(event.pointerId)
      const from = at(event, box)
      fingers.set(event.pointerId, from)
      const onLine = this.mode === 'slider' && Math.abs(from[0] - this.split * box.clientWidth) < GRIP
      drag = { box, from, x: this.x, y: this.y, moved: fingers.size > 1, onLine: onLine && event.pointerType === 'touch' }
    })
    stage.addEventListener('pointermove', (event) => {
      const box = drag?.box ?? pane(event)
      if (!box) return
      const [x, y] = at(event, box)
      if (drag && fingers.size === 2 && fingers.has(event.pointerId)) {
        // Two fingers zoom, about the middle between them.
        const apart = () => {
          const [p, q] = [...fingers.values()]
          return { far: Math.hypot(p[0] - q[0], p[1] - q[1]), middle: [(p[0] + q[0]) / 2, (p[1] + q[1]) / 2] }
        }
        const before = apart()
        fingers.set(event.pointerId, [x, y])
        const after = apart()
        this.x += after.middle[0] - before.middle[0]
        this.y += after.middle[1] - before.middle[1]
        if (before.far > 0) zoomTo((this.zoom * after.far) / before.far, after.middle, box)
        this.place()
        return
      }
      if (fingers.has(event.pointerId)) fingers.set(event.pointerId, [x, y])
      const panning = drag && this.zoom > 1 && !drag.onLine
      if (panning && !drag.pinched) {
        this.x = drag.x + x - drag.from[0]
        this.y = drag.y + y - drag.from[1]
        this.keepInside(box)
      }
      if (drag) drag.moved ||= Math.hypot(x - drag.from[0], y - drag.from[1]) > 3
      if (this.mode === 'slider' && !panning) this.split = Math.min(1, Math.max(0, x / box.clientWidth))
      if (this.panes) this.place()
    })
    const up = (event) => {
      fingers.delete(event.pointerId)
      if (event.type === 'pointerup' && drag && !drag.moved && this.mode === 'flip') {
        this.flipped = !this.flipped
        this.place()
      }
      if (drag && fingers.size) drag.pinched = true // the finger that stays does not make the picture jump
      else drag = null
    }
    stage.addEventListener('pointerup', up)
    stage.addEventListener('pointercancel', up)
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
    if (shows(node) !== 'comparison') return
    const view = new CompareView()
    const widget = node.addDOMWidget('asdm_compare', 'asdm_compare', view.root, { serialize: false, hideOnZoom: false, getMinHeight: () => HEIGHT + 20 }) // with the front end's margin
    widget.serializeValue = () => undefined
    // The properties panel writes its own width into the widgets it lists, and leaves it there.
    Object.defineProperty(widget, 'width', { get: () => undefined, set: () => {} })
    const [width, height] = node.size
    node.setSize([Math.max(width, 420), Math.max(height, 460, node.computeSize()[1])])
    const executed = node.onExecuted
    node.onExecuted = function (output) {
      executed?.apply(this, arguments)
      endProgress(this)
      if (output?.asdm_compare?.length) view.show(output.asdm_compare[0])
    }
    const removed = node.onRemoved
    node.onRemoved = function () {
      if (view.dialog?.open) view.dialog.close()
      removed?.apply(this, arguments)
    }
  },
  ...remembering('comparison')
})
