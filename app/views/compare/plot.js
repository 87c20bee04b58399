// Lines over common axes, distinguished by colour, dashes and the shape of their dots.
const DASHES = [[], [7, 4], [2, 3], [10, 3, 2, 3], [14, 4], [4, 3, 1, 3], [1, 4], [10, 2, 2, 2, 2, 2]];
// The hues of Okabe and Ito, the most distinct ones first, each with a contrast of at least 3 : 1 against the page.
const LINES = {
  light: ["#0072b2", "#c44e00", "#007a5a", "#b0558b", "#8f6b00", "#2a8fc4", "#555f66", "#7a7000"],
  dark: ["#4da3e0", "#ff8a3d", "#2fc79a", "#e892c3", "#f0b93a", "#8fd0f5", "#b4bcc2", "#d3ca3c"],
};

// Colour, dashes and dots of line number `index`.
function stroke(index, dark) {
  const colours = LINES[dark ? "dark" : "light"];
  return { colour: colours[index % colours.length], dash: DASHES[index % DASHES.length], shape: index % 4 };
}

// Path of a dot: circle, square, triangle, diamond.
function dotPath(shape, x, y, r) {
  const path = new Path2D();
  if (shape === 0) path.arc(x, y, r, 0, 2 * Math.PI);
  else if (shape === 1) path.rect(x - 0.9 * r, y - 0.9 * r, 1.8 * r, 1.8 * r);
  else {
    const ends = shape === 2 ? [[0, -1.15], [1.05, 0.8], [-1.05, 0.8]] : [[0, -1.25], [1.1, 0], [0, 1.25], [-1.1, 0]];
    ends.forEach(([dx, dy], i) => (i ? path.lineTo(x + dx * r, y + dy * r) : path.moveTo(x + dx * r, y + dy * r)));
    path.closePath();
  }
  return path;
}

// 1, 2, 5 times powers of ten between `low` and `high`; evenly spaced ticks where these are too few.
function logTicks(low, high) {
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
    for (const m of [1, 2, 5]) found.push(Number((m * 10 ** power).toPrecision(3)));
  }
  const inside = found.filter((v) => v >= low * 0.999 && v <= high * 1.001);
  return inside.length > 2 ? inside : ticks(low, high, 4).filter((v) => v > 0);
}

// `lines`: [{points: [[x, y]], colour, dash, shape, width, alpha, dots}]. `bases`: [{y, text}], horizontal baselines.
// Returns the geometry: `xOf` pixel → value.
function plot(canvas, height, lines, { x: [x0, x1], y: [y0, y1], log = false, bases = [], mark = null, xName = "", whole = false }) {
  const style = theme(canvas);
  const { context, width } = surface(canvas, height);
  const box = { left: 46, right: width - 8, top: 10, bottom: height - 24 };
  const scale = log ? Math.log : (v) => v;
  const toX = (v) => box.left + ((v - x0) / (x1 - x0 || 1)) * (box.right - box.left);
  const toY = (v) => box.bottom - ((scale(v) - scale(y0)) / (scale(y1) - scale(y0) || 1)) * (box.bottom - box.top);
  context.font = `11px ${style.font}`;
  gridLines(context, style, box, log ? logTicks(y0, y1) : ticks(y0, y1, Math.max(2, Math.floor(height / 45))), toY);
  context.textAlign = "center";
  context.textBaseline = "alphabetic";
  const marks = ticks(x0, x1, Math.max(2, Math.floor(width / 90))).filter((v) => v <= x1 && (!whole || Number.isInteger(v)));
  marks.forEach((v, i) => {
    const text = i === marks.length - 1 && xName ? `${number(v)} ${xName}` : number(v);
    const half = context.measureText(text).width / 2;
    context.fillText(text, Math.min(Math.max(toX(v), box.left + half), box.right - half), height - 6);
  });
  context.save();
  context.beginPath();
  context.rect(box.left - 6, box.top - 6, box.right - box.left + 12, box.bottom - box.top + 12);
  context.clip();
  for (const line of lines) drawLine(context, line, toX, toY, log);
  context.restore();
  for (const base of bases) baseLine(context, style, box, base, toY);
  if (mark !== null) {
    context.strokeStyle = style.muted;
    context.lineWidth = 1;
    context.beginPath();
    context.moveTo(toX(mark), box.top);
    context.lineTo(toX(mark), box.bottom);
    context.stroke();
  }
  canvas.dataset.draws = String(Number(canvas.dataset.draws || 0) + 1);
  return { xOf: (clientX) => x0 + ((clientX - canvas.getBoundingClientRect().left - box.left) / (box.right - box.left)) * (x1 - x0) };
}

function gridLines(context, style, box, values, toY) {
  context.textAlign = "right";
  context.textBaseline = "middle";
  context.lineWidth = 1;
  let free = Infinity; // y of the last label: the next one needs 13 px
  for (const v of values) {
    const y = toY(v);
    context.strokeStyle = style.line;
    context.globalAlpha = 0.7;
    context.beginPath();
    context.moveTo(box.left, Math.round(y) + 0.5);
    context.lineTo(box.right, Math.round(y) + 0.5);
    context.stroke();
    context.globalAlpha = 1;
    if (free - y < 13) continue;
    free = y;
    context.fillStyle = style.muted;
    context.fillText(number(v, 3), box.left - 7, y);
  }
}

function drawLine(context, { points, colour, dash, shape, width, alpha, dots }, toX, toY, log) {
  const known = points.filter(([x, y]) => Number.isFinite(x) && Number.isFinite(y) && (!log || y > 0));
  if (!known.length) return;
  context.strokeStyle = context.fillStyle = colour;
  context.globalAlpha = alpha;
  context.lineWidth = width;
  context.lineJoin = "round";
  context.setLineDash(dash);
  context.beginPath();
  known.forEach(([x, y], i) => (i ? context.lineTo(toX(x), toY(y)) : context.moveTo(toX(x), toY(y))));
  context.stroke();
  context.setLineDash([]);
  if (dots || known.length === 1) {
    for (const [x, y] of known) context.fill(dotPath(shape, toX(x), toY(y), dots || 3));
  }
  context.globalAlpha = 1;
}

function baseLine(context, style, box, { y, text }, toY) {
  context.strokeStyle = context.fillStyle = style.text;
  context.setLineDash([3, 3]);
  context.lineWidth = 1;
  context.beginPath();
  context.moveTo(box.left, Math.round(toY(y)) + 0.5);
  context.lineTo(box.right, Math.round(toY(y)) + 0.5);
  context.stroke();
  context.setLineDash([]);
  context.textAlign = "right";
  context.textBaseline = "bottom";
  context.fillText(text, box.right, toY(y) - 3);
}

// A sample of a line for a legend, as SVG.
function sample(index, dots) {
  const make = (name, values) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(values)) node.setAttribute(key, value);
    return node;
  };
  const { colour, dash, shape } = stroke(index, isDark());
  const svg = make("svg", { width: 30, height: 12, "aria-hidden": "true" });
  svg.append(make("line", { x1: 0, y1: 6, x2: 30, y2: 6, stroke: colour, "stroke-width": 2.4, "stroke-dasharray": dash.join(" ") }));
  const shapes = [["circle", { cx: 15, cy: 6, r: 4 }], ["rect", { x: 11.4, y: 2.4, width: 7.2, height: 7.2 }], ["path", { d: "M15 1.4 L19.2 9.2 L10.8 9.2 Z" }], ["path", { d: "M15 1 L19.4 6 L15 11 L10.6 6 Z" }]];
  if (dots) svg.append(make(shapes[shape][0], { ...shapes[shape][1], fill: colour }));
  return svg;
}
