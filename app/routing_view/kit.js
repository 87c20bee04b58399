// Shared by the studio's canvas components: colours, text, heatmaps and curves. Token text only ever goes through
// textContent or canvas, never through innerHTML.

// Sequential, perceptually even and colour-blind-safe ("mako"): light pages run from pale to dark, dark ones back.
const MAKO = ["#0b0405", "#2e1e3b", "#413d7b", "#37659e", "#348fa7", "#40b7ad", "#8bdab2", "#def5e5"].map(rgb);
// Okabe-Ito: the hues of experts; after eight they start over, the number tells them apart.
const HUES = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#b8a800", "#8a8a8a"].map(rgb);

function rgb(hex) {
  const value = parseInt(hex.slice(1), 16);
  return [value >> 16, (value >> 8) & 255, value & 255];
}

function css(colour, alpha = 1) {
  return `rgba(${Math.round(colour[0])},${Math.round(colour[1])},${Math.round(colour[2])},${alpha})`;
}

function mix(from, to, share) {
  return [0, 1, 2].map((i) => from[i] + (to[i] - from[i]) * share);
}

function luminance(colour) {
  const [r, g, b] = colour.map((c) => {
    const s = c / 255;
    return s <= 0.03928 ? s / 12.92 : ((s + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

function isDark() {
  return document.body.classList.contains("dark");
}

// The page's colours as they are now; read at every draw, so that a change of theme needs only a redraw.
function theme(element) {
  const style = getComputedStyle(element);
  const dark = isDark();
  return {
    dark,
    text: style.getPropertyValue("--body-text-color").trim() || (dark ? "#eee" : "#222"),
    muted: style.getPropertyValue("--body-text-color-subdued").trim() || "#888",
    line: style.getPropertyValue("--border-color-primary").trim() || "#ccc",
    accent: style.getPropertyValue("--color-accent").trim() || "#0d7f86",
    panel: dark ? [22, 27, 32] : [255, 255, 255],
    empty: dark ? "rgba(255,255,255,.045)" : "rgba(0,0,0,.035)",
    font: style.fontFamily || "system-ui, sans-serif",
  };
}

// Heat of a value 0…1. The very ends are left out: they would vanish against the page.
function heat(share, dark) {
  const at = (dark ? 0.1 + 0.88 * clamp(share) : 0.99 - 0.87 * clamp(share)) * (MAKO.length - 1);
  const low = Math.min(Math.floor(at), MAKO.length - 2);
  return mix(MAKO[low], MAKO[low + 1], at - low);
}

function hue(expert) {
  return HUES[expert % HUES.length];
}

function clamp(value) {
  return Math.max(0, Math.min(1, value));
}

function number(value, digits = 2) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  if (size !== 0 && size < 0.001) return value.toExponential(1);
  return String(Number(value.toFixed(size < 0.1 ? Math.max(digits, 4) : digits)));
}

function percent(value) {
  return `${Math.round(value * 100)} %`;
}

// A canvas context in CSS pixels, sharp on every screen.
function surface(canvas, height) {
  const width = Math.max(canvas.clientWidth, 1);
  const ratio = window.devicePixelRatio || 1;
  const [w, h] = [Math.round(width * ratio), Math.round(height * ratio)];
  if (canvas.width !== w || canvas.height !== h) {
    canvas.width = w;
    canvas.height = h;
    canvas.style.height = `${height}px`;
  }
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return { context, width, height };
}

// Calls `draw` at most once a frame, again when the theme or the size changes, and not while nobody can see it.
function painter(element, draw) {
  let asked = false;
  const ask = () => {
    if (asked) return;
    asked = true;
    requestAnimationFrame(() => {
      asked = false;
      if (element.isConnected && element.offsetParent !== null) draw();
    });
  };
  new ResizeObserver(ask).observe(element);
  new MutationObserver(ask).observe(document.body, { attributes: true, attributeFilter: ["class"] });
  return ask;
}

// The smallest of a few fixed ceilings that holds `largest`: colours keep their meaning from one token to the next.
function ceiling(largest, experts) {
  return [2 / Math.max(experts, 1), 0.5, 1].filter((c) => c <= 1).find((c) => largest <= c + 1e-6) || 1;
}

const GUTTER = 30; // left of a plot, for its numbers

// Layer × expert heatmap: layers run right, experts down, and under it a row of entropy and one of active experts.
// `data`: {layers, experts, counts [layer], weight(layer, expert), entropy(layer), active(layer), top}.
function drawHeatmap(canvas, data, mark) {
  const { layers, experts } = data;
  const look = theme(canvas);
  const rowHeight = Math.max(3, Math.min(22, Math.floor(176 / experts)));
  const strip = 13;
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
      context.fillStyle = absent ? look.empty : css(heat(data.weight(layer, expert) / data.top, look.dark));
      const inset = absent ? 0.3 * rowHeight : 0;
      context.fillRect(x, expert * rowHeight + inset, w, rowHeight - gapY - 2 * inset);
    }
    [data.entropy(layer), data.active(layer) / Math.max(data.counts[layer], 1)].forEach((share, row) => {
      context.fillStyle = look.muted;
      context.globalAlpha = 0.06 + 0.74 * clamp(share);
      context.fillRect(x, bottom + 6 + row * strip, w, strip - 2);
      context.globalAlpha = 1;
    });
  }
  labelHeatmap(context, look, { layers, experts, cell, rowHeight, bottom, strip });
  if (mark && mark.layer < layers) {
    context.strokeStyle = look.text;
    context.lineWidth = 1.5;
    const high = mark.expert < experts ? [mark.expert * rowHeight, rowHeight] : [bottom + 5, 2 * strip];
    context.strokeRect(GUTTER + mark.layer * cell - 0.5, high[0] - 0.5, cell, high[1]);
  }
  canvas.dataset.draws = String(Number(canvas.dataset.draws || 0) + 1);
  canvas.geometry = { cell, rowHeight, bottom, layers, experts };
}

function labelHeatmap(context, look, { layers, experts, cell, rowHeight, bottom, strip }) {
  context.font = `11px ${look.font}`;
  context.fillStyle = look.muted;
  context.textBaseline = "middle";
  context.textAlign = "right";
  const every = Math.max(1, Math.ceil(13 / rowHeight));
  for (let expert = 0; expert < experts; expert += every) {
    context.fillText(String(expert + 1), GUTTER - 7, (expert + 0.5) * rowHeight);
  }
  context.fillText("H", GUTTER - 7, bottom + 6 + strip / 2 - 1);
  context.fillText("n", GUTTER - 7, bottom + 6 + strip * 1.5 - 1);
  context.textAlign = "center";
  const step = [1, 2, 5, 10, 20, 50].find((s) => s * cell >= 24) || 100;
  for (let layer = 0; layer < layers; layer++) {
    if (layer === 0 || (layer + 1) % step === 0) {
      const x = Math.min(GUTTER + (layer + 0.5) * cell, GUTTER + layers * cell - 7);
      context.fillText(String(layer + 1), x, bottom + 2 * strip + 19);
    }
  }
}

// The layer and expert under a pointer; an expert past the last one means the two strips below.
function heatmapCell(canvas, event) {
  const shape = canvas.geometry;
  if (!shape) return null;
  const box = canvas.getBoundingClientRect();
  const layer = Math.floor((event.clientX - box.left - GUTTER) / shape.cell);
  const y = event.clientY - box.top;
  if (layer < 0 || layer >= shape.layers || y > shape.bottom + 34) return null;
  return { layer, expert: Math.min(Math.floor(y / shape.rowHeight), shape.experts) };
}

function heatmapText(data, mark) {
  const where = `Layer ${mark.layer + 1}`;
  const sure = `entropy ${number(data.entropy(mark.layer))}, ${number(data.active(mark.layer), 1)} of ${data.counts[mark.layer]} experts active`;
  if (mark.expert >= data.experts) return `${where}: ${sure}`;
  if (mark.expert >= data.counts[mark.layer]) return `${where} has no expert ${mark.expert + 1}`;
  const weight = data.weight(mark.layer, mark.expert);
  return `${where}, expert ${mark.expert + 1}: weight ${number(weight, 3)} (even: ${number(1 / data.counts[mark.layer], 3)}); ${sure}`;
}

// The colour scale of a heatmap, with a tick where all experts share evenly.
function drawScale(canvas, top, experts) {
  const look = theme(canvas);
  const { context, width } = surface(canvas, 26);
  for (let x = 0; x < width; x++) {
    context.fillStyle = css(heat(x / width, look.dark));
    context.fillRect(x, 0, 1, 8);
  }
  const even = 1 / Math.max(experts, 1);
  context.fillStyle = look.muted;
  context.font = `11px ${look.font}`;
  context.textBaseline = "alphabetic";
  context.textAlign = "left";
  context.fillText("0", 0, 22);
  context.textAlign = "right";
  context.fillText(number(top), width, 22);
  if (experts > 1 && even < top * 0.85) {
    const x = (even / top) * width;
    context.fillRect(x - 0.5, 0, 1, 12);
    context.textAlign = "center";
    context.fillText("even", Math.max(x, 24), 22);
  }
}

// Round steps for an axis from `low` to `high`: at most `count` + 1 of them.
function ticks(low, high, count) {
  const raw = (high - low) / Math.max(count, 1) || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw - 1e-12);
  const found = [];
  for (let v = Math.ceil(low / step - 1e-9) * step; v <= high + step * 1e-9; v += step) found.push(Number(v.toPrecision(6)));
  return found;
}

function niceRange(values) {
  let [low, high] = [Infinity, -Infinity];
  for (const v of values) {
    if (v === null || !Number.isFinite(v)) continue;
    low = Math.min(low, v);
    high = Math.max(high, v);
  }
  if (low > high) return [0, 1];
  const pad = (high - low || Math.abs(high) || 1) * 0.08;
  return [low >= 0 ? Math.max(0, low - pad) : low - pad, high + pad];
}

// Curves over one axis. `series`: [{points: [[x, y]], colour, dots, area, range}]; returns the plot's geometry.
function drawCurves(canvas, height, series, { x: [x0, x1], mark = null, wholeX = true, xName = "" }) {
  const look = theme(canvas);
  const { context, width } = surface(canvas, height);
  const plot = { left: GUTTER + 8, right: width - 6, top: 8, bottom: height - 24 };
  const toX = (v) => plot.left + ((v - x0) / (x1 - x0 || 1)) * (plot.right - plot.left);
  const main = series[0].range || niceRange(series.filter((s) => !s.range).flatMap((s) => s.points.map((p) => p[1])));
  const toY = (v, [low, high] = main) => plot.bottom - ((v - low) / (high - low || 1)) * (plot.bottom - plot.top);
  context.font = `11px ${look.font}`;
  context.lineWidth = 1;
  context.textAlign = "right";
  context.textBaseline = "middle";
  for (const v of ticks(main[0], main[1], Math.max(2, Math.floor(height / 40)))) {
    context.strokeStyle = look.line;
    context.globalAlpha = 0.7;
    context.beginPath();
    context.moveTo(plot.left, Math.round(toY(v)) + 0.5);
    context.lineTo(plot.right, Math.round(toY(v)) + 0.5);
    context.stroke();
    context.globalAlpha = 1;
    context.fillStyle = look.muted;
    context.fillText(number(v, 3), plot.left - 7, toY(v));
  }
  context.textAlign = "center";
  context.textBaseline = "alphabetic";
  const marks = ticks(x0, x1, Math.max(2, Math.floor(width / 90))).filter((v) => !wholeX || Number.isInteger(v));
  for (const v of marks) context.fillText(`${xName && v === marks[marks.length - 1] ? xName + " " : ""}${v}`, Math.min(Math.max(toX(v), plot.left + 4), plot.right - 14), height - 6);
  for (const line of series) drawSeries(context, line, toX, (v) => toY(v, line.range || main), plot.bottom);
  if (mark !== null) {
    context.strokeStyle = look.muted;
    context.beginPath();
    context.moveTo(toX(mark), plot.top);
    context.lineTo(toX(mark), plot.bottom);
    context.stroke();
  }
  return { at: (clientX) => x0 + ((clientX - canvas.getBoundingClientRect().left - plot.left) / (plot.right - plot.left)) * (x1 - x0) };
}

function drawSeries(context, { points, colour, dots, area, dash }, toX, toY, bottom) {
  const known = points.filter((p) => p[1] !== null && Number.isFinite(p[1]));
  if (!known.length) return;
  context.strokeStyle = context.fillStyle = colour;
  context.lineWidth = 1.8;
  context.lineJoin = "round";
  context.setLineDash(dash || []);
  context.beginPath();
  known.forEach(([x, y], i) => (i ? context.lineTo(toX(x), toY(y)) : context.moveTo(toX(x), toY(y))));
  context.stroke();
  context.setLineDash([]);
  if (area) {
    context.lineTo(toX(known[known.length - 1][0]), bottom);
    context.lineTo(toX(known[0][0]), bottom);
    context.globalAlpha = 0.1;
    context.fill();
    context.globalAlpha = 1;
  }
  if (dots || known.length === 1) {
    for (const [x, y] of known) {
      context.beginPath();
      context.arc(toX(x), toY(y), 3.2, 0, 2 * Math.PI);
      context.fill();
    }
  }
}
