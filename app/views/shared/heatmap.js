// Layer × expert heatmaps and their scale, for the routing of a reply and for the load during training.
const SHADES = 256;
const shades = {};

// The colours of a scale as CSS, from its low end to its high end; computed once per theme.
function scaleColours(dark, diverging) {
  const key = `${dark}${diverging}`;
  const colour = diverging ? (share) => divergingColour(2 * share - 1, dark) : (share) => heat(share, dark);
  shades[key] = shades[key] || Array.from({ length: SHADES }, (_, i) => css(colour(i / (SHADES - 1))));
  return shades[key];
}

// Where a value lies on the scale, 0…1: differences have zero in the middle.
function onScale(value, { top, diverging }) {
  return clamp(diverging ? (value / top + 1) / 2 : value / top);
}

function cellColour(value, data, dark) {
  return scaleColours(dark, Boolean(data.diverging))[Math.round(onScale(value, data) * (SHADES - 1))];
}

// The top of the scale: the smallest of a few fixed values ≥ `largest`, so that colours mean the same from token to token.
function ceiling(largest, experts) {
  return [2 / Math.max(experts, 1), 0.5, 1].filter((c) => c <= 1).find((c) => largest <= c + 1e-6) || 1;
}

// Layers from left to right, experts from top to bottom, below them a row of entropy and one of active experts.
// `data`: {layers, experts, counts [layer], weight(layer, expert), entropy(layer), active(layer), top}, and optionally
// `diverging` (differences around zero), `bare` (without the two rows), `open` (a layer), `muted` [expert].
function drawHeatmap(canvas, data, mark) {
  const { layers, experts } = data;
  const style = theme(canvas);
  const rowHeight = Math.max(3, Math.min(22, Math.floor(176 / experts)));
  const strip = data.bare ? 0 : 13;
  const bottom = experts * rowHeight;
  const { context, width } = surface(canvas, bottom + 2 * strip + 28);
  const cell = (width - GUTTER) / layers;
  const gapX = cell > 5 ? 1 : 0;
  const gapY = rowHeight > 5 ? 1 : 0;
  for (let layer = 0; layer < layers; layer++) {
    const x = GUTTER + layer * cell;
    const w = Math.max(cell - gapX, 0.5);
    for (let expert = 0; expert < experts; expert++) {
      const absent = expert >= data.counts[layer];
      context.fillStyle = absent ? style.empty : cellColour(data.weight(layer, expert), data, style.dark);
      const inset = absent ? 0.3 * rowHeight : 0;
      context.fillRect(x, expert * rowHeight + inset, w, rowHeight - gapY - 2 * inset);
    }
    if (data.bare) continue;
    [data.entropy(layer), data.active(layer) / Math.max(data.counts[layer], 1)].forEach((share, row) => {
      context.fillStyle = style.muted;
      context.globalAlpha = 0.06 + 0.74 * clamp(share);
      context.fillRect(x, bottom + 6 + row * strip, w, strip - 2);
      context.globalAlpha = 1;
    });
  }
  const shape = { layers, experts, cell, rowHeight, bottom, strip };
  labelHeatmap(context, style, shape, data.muted || []);
  markHeatmap(context, style, shape, data, mark);
  canvas.dataset.draws = String(Number(canvas.dataset.draws || 0) + 1);
  canvas.geometry = shape;
}

function labelHeatmap(context, style, { layers, experts, cell, rowHeight, bottom, strip }, muted) {
  context.font = `11px ${style.font}`;
  context.fillStyle = style.muted;
  context.textBaseline = "middle";
  context.textAlign = "right";
  const every = Math.max(1, Math.ceil(13 / rowHeight));
  for (let expert = 0; expert < experts; expert += every) {
    const y = (expert + 0.5) * rowHeight;
    context.fillText(String(expert + 1), GUTTER - 7, y);
    if (muted.includes(expert)) context.fillRect(GUTTER - 9 - 6 * String(expert + 1).length, y - 1, 4 + 6 * String(expert + 1).length, 1);
  }
  if (strip) {
    context.fillText("H", GUTTER - 7, bottom + 6 + strip / 2 - 1);
    context.fillText("n", GUTTER - 7, bottom + 6 + strip * 1.5 - 1);
  }
  context.textAlign = "center";
  const step = [1, 2, 5, 10, 20, 50].find((s) => s * cell >= 24) || 100;
  for (let layer = 0; layer < layers; layer++) {
    if (layer === 0 || ((layer + 1) % step === 0 && layer * cell >= 20)) {
      const x = Math.min(GUTTER + (layer + 0.5) * cell, GUTTER + layers * cell - 7);
      context.fillText(String(layer + 1), x, bottom + 2 * strip + 19);
    }
  }
}

function markHeatmap(context, style, { layers, experts, cell, rowHeight, bottom, strip }, data, mark) {
  if (data.open !== undefined && data.open !== null && data.open < layers) {
    context.fillStyle = style.accent;
    context.fillRect(GUTTER + data.open * cell, bottom + 2 * strip + 8, Math.max(cell - 1, 2), 3);
  }
  if (!mark || mark.layer >= layers) return;
  context.strokeStyle = style.text;
  context.lineWidth = 1.5;
  const [y, high] = mark.expert < experts ? [mark.expert * rowHeight, rowHeight] : [bottom + 5, 2 * strip];
  context.strokeRect(GUTTER + mark.layer * cell - 0.5, y - 0.5, cell, high);
}

// The layer and expert under the pointer; an expert after the last one means the two rows below.
function heatmapCell(canvas, event) {
  const shape = canvas.geometry;
  if (!shape) return null;
  const box = canvas.getBoundingClientRect();
  const layer = Math.floor((event.clientX - box.left - GUTTER) / shape.cell);
  const y = event.clientY - box.top;
  if (layer < 0 || layer >= shape.layers || y < 0 || y > shape.bottom + 34) return null;
  return { layer, expert: Math.min(Math.floor(y / shape.rowHeight), shape.experts) };
}

function heatmapText(data, mark) {
  const where = `Layer ${mark.layer + 1}`;
  const count = data.counts[mark.layer];
  const sure = data.bare ? "" : `entropy ${number(data.entropy(mark.layer))}, ${number(data.active(mark.layer), 1)} of ${count} experts active`;
  if (mark.expert >= data.experts) return `${where}: ${sure}`;
  if (mark.expert >= count) return `${where} has no expert ${mark.expert + 1}`;
  const weight = data.weight(mark.layer, mark.expert);
  const even = data.even ? data.even[mark.layer] : 1 / count;
  const value = data.diverging ? `difference ${signed(weight)}` : `weight ${number(weight, 3)}`;
  return `${where}, expert ${mark.expert + 1}: ${value} (even: ${number(even, 3)})${sure && `; ${sure}`}`;
}

// The colour scale of a heatmap. A tick marks the even share of all experts; for differences, zero in the middle.
function drawScale(canvas, top, experts, { diverging = false, even = 1 / Math.max(experts, 1) } = {}) {
  const style = theme(canvas);
  const { context, width } = surface(canvas, 26);
  const colours = scaleColours(style.dark, diverging);
  for (let x = 0; x < width; x++) {
    context.fillStyle = colours[Math.round((x / Math.max(width - 1, 1)) * (SHADES - 1))];
    context.fillRect(x, 0, 1, 8);
  }
  context.fillStyle = style.muted;
  context.font = `11px ${style.font}`;
  context.textBaseline = "alphabetic";
  context.textAlign = "left";
  context.fillText(diverging ? signed(-top) : "0", 0, 22);
  context.textAlign = "right";
  context.fillText(diverging ? signed(top) : number(top), width, 22);
  if (!diverging && (experts < 2 || even > top * 0.85)) return;
  const x = diverging ? width / 2 : (even / top) * width;
  const words = diverging ? "0" : `even ${number(even, 3)}`;
  const half = context.measureText(words).width / 2;
  context.fillRect(x - 0.5, 0, 1, 12);
  context.textAlign = "center";
  context.fillText(words, Math.max(x, half + 12), 22);
}
