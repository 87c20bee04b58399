// For views that draw: colours, sharp canvases, axes and curves.

// Sequential, perceptually uniform and colour-blind-safe ("mako"): pale to dark on light pages, reversed on dark ones.
const MAKO = ["#0b0405", "#2e1e3b", "#413d7b", "#37659e", "#348fa7", "#40b7ad", "#8bdab2", "#def5e5"].map(rgb);
// The hues of experts, after Okabe and Ito; from the ninth expert on they repeat, and the number tells them apart.
const HUES = {
  light: ["#0c3897", "#ffa000", "#307975", "#c039ff", "#77c0eb", "#733628", "#7a7703", "#b8a5a7"].map(rgb),
  dark: ["#0063d5", "#ab901a", "#27e09b", "#fc6ab0", "#b4bdff", "#9d522e", "#dffa0c", "#707874"].map(rgb),
};
// Differences, from zero outwards: negative ones are blue, positive ones orange.
const DIVERGING = {
  light: [["#f1f2f2", "#a9cbe6", "#4f93c8", "#155a9a", "#07325f"], ["#f1f2f2", "#f9cf9c", "#ec9440", "#b85c0c", "#6f3303"]].map((arm) => arm.map(rgb)),
  dark: [["#262d33", "#1f4f7d", "#2f7fc2", "#6fb4ee", "#c6e3ff"], ["#262d33", "#6b4215", "#b5701c", "#eda64a", "#ffe0b0"]].map((arm) => arm.map(rgb)),
};

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

// The colours of the current theme. Reading computed styles forces a layout, so each theme is read once.
const themes = {};
function theme(element) {
  const dark = isDark();
  if (themes[dark]) return themes[dark];
  const computed = getComputedStyle(element);
  const style = {
    dark,
    text: computed.getPropertyValue("--body-text-color").trim() || (dark ? "#eee" : "#222"),
    muted: computed.getPropertyValue("--body-text-color-subdued").trim() || "#888",
    line: computed.getPropertyValue("--border-color-primary").trim() || "#ccc",
    accent: computed.getPropertyValue("--color-accent").trim() || "#0d7f86",
    panel: dark ? [22, 27, 32] : [255, 255, 255],
    empty: dark ? "rgba(255,255,255,.045)" : "rgba(0,0,0,.035)",
    font: computed.fontFamily || "system-ui, sans-serif",
  };
  if (element.isConnected) themes[dark] = style;
  return style;
}

// The colour of a value 0…1. The ends of the map are left out, because they would vanish against the page's background.
function heat(share, dark) {
  const at = (dark ? 0.1 + 0.88 * clamp(share) : 0.99 - 0.87 * clamp(share)) * (MAKO.length - 1);
  const low = Math.min(Math.floor(at), MAKO.length - 2);
  return mix(MAKO[low], MAKO[low + 1], at - low);
}

function hue(expert, dark = isDark()) {
  const hues = HUES[dark ? "dark" : "light"];
  return hues[expert % hues.length];
}

// The colour of a difference −1…1: blue to orange, which are distinct for the colour-blind; zero is close to the background.
function divergingColour(share, dark) {
  const arm = DIVERGING[dark ? "dark" : "light"][share < 0 ? 0 : 1];
  const at = Math.min(Math.abs(share), 1) * (arm.length - 1);
  const low = Math.min(Math.floor(at), arm.length - 2);
  return mix(arm[low], arm[low + 1], at - low);
}

// Black or white, whichever has more contrast: at least 4.58 : 1 on any colour.
function ink(fill) {
  return luminance(fill) > 0.179 ? "#000000" : "#ffffff";
}

// A token's colour. Hue: the strongest expert. Saturation: the lower the entropy, the fuller.
function chipFill(expert, entropy, dark = isDark()) {
  return faded(hue(expert, dark), entropy, dark);
}

// The higher the entropy, the closer to the page.
function faded(colour, entropy, dark = isDark()) {
  return mix(dark ? [22, 27, 32] : [255, 255, 255], colour, 0.2 + 0.8 * (1 - clamp(entropy)) ** 0.5);
}

function clamp(value) {
  return Math.max(0, Math.min(1, value));
}

const widths = new WeakMap();
const widthsObserver = new ResizeObserver((entries) => entries.forEach(({ target, contentRect }) => widths.set(target, contentRect.width)));

// An element's width without forcing a layout in the middle of a frame: read once, then kept up to date by an observer.
function widthOf(element) {
  if (!widths.get(element)) {
    widths.set(element, element.clientWidth);
    widthsObserver.observe(element);
  }
  return Math.max(widths.get(element), 1);
}

// A canvas context in CSS pixels, sharp on every screen.
function surface(canvas, height) {
  const width = widthOf(canvas);
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

// Calls `draw` at most once per frame, also when the theme or the size changes, but not while the element is out of view.
function painter(element, draw) {
  let [asked, near] = [false, false];
  const ask = () => {
    if (asked || !near) return;
    asked = true;
    requestAnimationFrame(() => {
      asked = false;
      if (element.isConnected) draw();
    });
  };
  const onVisibility = ([entry]) => {
    near = entry.isIntersecting;
    ask();
  };
  new IntersectionObserver(onVisibility, { rootMargin: "2000px" }).observe(element);
  new ResizeObserver(ask).observe(element);
  new MutationObserver(ask).observe(document.body, { attributes: true, attributeFilter: ["class"] });
  return ask;
}

const GUTTER = 30; // left of a plot, for its numbers

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
  const style = theme(canvas);
  const { context, width } = surface(canvas, height);
  const plot = { left: GUTTER + 8, right: width - 6, top: 8, bottom: height - 24 };
  const toX = (v) => plot.left + ((v - x0) / (x1 - x0 || 1)) * (plot.right - plot.left);
  const main = series[0].range || niceRange(series.filter((s) => !s.range).flatMap((s) => s.points.map((p) => p[1])));
  const toY = (v, [low, high] = main) => plot.bottom - ((v - low) / (high - low || 1)) * (plot.bottom - plot.top);
  context.font = `11px ${style.font}`;
  context.lineWidth = 1;
  context.textAlign = "right";
  context.textBaseline = "middle";
  for (const v of ticks(main[0], main[1], Math.max(2, Math.floor(height / 40)))) {
    context.strokeStyle = style.line;
    context.globalAlpha = 0.7;
    context.beginPath();
    context.moveTo(plot.left, Math.round(toY(v)) + 0.5);
    context.lineTo(plot.right, Math.round(toY(v)) + 0.5);
    context.stroke();
    context.globalAlpha = 1;
    context.fillStyle = style.muted;
    context.fillText(number(v, 3), plot.left - 7, toY(v));
  }
  context.textAlign = "center";
  context.textBaseline = "alphabetic";
  const marks = ticks(x0, x1, Math.max(2, Math.floor(width / 90))).filter((v) => !wholeX || Number.isInteger(v));
  marks.forEach((v, i) => {
    const text = i === marks.length - 1 && xName ? `${xName} ${v}` : String(v);
    const half = context.measureText(text).width / 2;
    context.fillText(text, Math.min(Math.max(toX(v), plot.left + half), plot.right - half), height - 6);
  });
  for (const line of series) drawSeries(context, line, toX, (v) => toY(v, line.range || main), plot.bottom);
  if (mark !== null) {
    context.strokeStyle = style.muted;
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
