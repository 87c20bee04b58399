// The curves of a run: the losses with their marks, and the small multiples, all read at the same step.
const HELD_OUT = "#d55e00";
const MULTIPLES = {
  tokens_per_second: (v) => number(v, 0),
  memory_mb: gigabytes,
  learning_rate: (v) => (v ? v.toExponential(1) : "0"),
  grad_norm: (v) => number(v, 2),
};
const HINT = "Point at a curve, or press ← → on the large one, to read a step; click to see its routing below.";
const MARK_WORDS = { checkpoint: "checkpoint saved", resumed: "resumed here", stopped: "stopped here", failed: "failed here", interrupted: "interrupted here" };

function cell(row, column) {
  return row ? row[view.columns.indexOf(column)] : null;
}

function lossRange() {
  const values = [...points("loss"), ...view.evals].map((p) => p[1]).filter((v) => v !== null);
  return values.length ? niceRange(values) : null;
}

// For rows that are the mean of many steps: a band from the lowest to the highest loss, drawn as one zigzag line.
function band(range) {
  const [low, high] = [points("loss_low"), points("loss_high")];
  return low.flatMap(([step, least], i) => (least === null ? [] : [[step, Math.min(least, range[1])], [step, Math.min(high[i][1], range[1])]]));
}

function paintCurves(style) {
  const newest = view.last ? view.last.step : 0;
  const x = [0, Math.max(view.status.total_steps, newest, 2)];
  const mark = markedStep();
  const range = lossRange();
  const thinned = view.rows.some((row) => row[1] > 1);
  const series = [
    { points: points("loss"), colour: style.accent, area: !thinned, range },
    { points: view.evals, colour: HELD_OUT, dots: view.evals.length < 120, range },
  ];
  const faint = style.accent.startsWith("#") ? `${style.accent}59` : style.accent;
  if (thinned) series.unshift({ points: band(range), colour: faint, range });
  view.curve = drawCurves($(".curve"), 190, series, { x, mark, xName: "step" });
  drawMarks($(".curve"), style, x);
  $(".marks").hidden = !view.marks.some((m) => m[1] === "checkpoint");
  const row = mark === null ? view.rows[view.rows.length - 1] : rowAt(mark);
  for (const figure of element.querySelectorAll("figure")) {
    const name = figure.dataset.curve;
    const canvas = figure.querySelector("canvas");
    const scale = name === "memory_mb" ? 1 / 1024 : 1;
    const line = points(name).map(([step, v]) => [step, v === null ? null : v * scale]);
    const [value, words] = [cell(row, name), figure.querySelector("b")];
    words.textContent = value === null || value === undefined ? "–" : MULTIPLES[name](value);
    figure.hidden = !line.some((p) => p[1] !== null);
    if (figure.hidden) continue;
    canvas.setAttribute("aria-label", `${figure.querySelector("figcaption").firstChild.textContent.trim()} by step, now ${words.textContent}`);
    const range = [0, roundAbove(Math.max(...line.map((p) => p[1])))];
    drawCurves(canvas, 84, [{ points: line, colour: style.accent, area: true, range }], { x, mark });
  }
}

// The next round number for the end of an axis.
function roundAbove(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return value > 0 ? [1, 2, 5, 10].map((m) => m * power).find((top) => top >= value * (1 - 1e-9)) : 1;
}

// Checkpoints as triangles on the axis; dashed lines where the run stopped or was resumed.
function drawMarks(canvas, style, [x0, x1]) {
  const context = canvas.getContext("2d");
  const [left, right, bottom] = [GUTTER + 8, canvas.clientWidth - 6, 190 - 24];
  for (const [step, kind] of view.marks) {
    const x = left + ((step - x0) / (x1 - x0 || 1)) * (right - left);
    context.strokeStyle = context.fillStyle = style.muted;
    context.lineWidth = 1;
    context.beginPath();
    if (kind === "checkpoint") {
      [[x, bottom - 7], [x - 4, bottom], [x + 4, bottom]].forEach(([px, py], i) => (i ? context.lineTo(px, py) : context.moveTo(px, py)));
      context.fill();
    } else {
      context.setLineDash([3, 3]);
      context.moveTo(x, 8);
      context.lineTo(x, bottom);
      context.stroke();
      context.setLineDash([]);
    }
  }
}

// The step whose values are shown: the one under the pointer, else that of the scrubber.
function markedStep() {
  if (view.mark !== null) return view.mark;
  return scrub.follow || !scrub.shown ? null : scrub.shown.step;
}

// The row that contains a step: the first one that does not end before it.
function rowAt(step) {
  let [low, high] = [0, view.rows.length - 1];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (view.rows[middle][0] < step) low = middle + 1;
    else high = middle;
  }
  const [row, before] = [view.rows[low], view.rows[low - 1]];
  return row && before && row[1] === 1 && step - before[0] < row[0] - step ? before : row;
}

function readCurves(step) {
  const row = rowAt(step);
  if (!row) return;
  view.mark = row[0];
  const spread = row[1] > 1 ? ` (mean of ${row[1]} logged steps, ${number(cell(row, "loss_low"), 3)} to ${number(cell(row, "loss_high"), 3)})` : "";
  const held = view.evals.find((p) => p[0] === row[0]);
  const before = view.rows[view.rows.indexOf(row) - 1];
  const marks = view.marks.filter((m) => m[0] <= row[0] && m[0] > (before ? before[0] : -1)).map((m) => MARK_WORDS[m[1]]);
  put(".curve-readout", [`Step ${row[0]}: loss ${number(cell(row, "loss"), 3)}${spread}`, held ? `held-out ${number(held[1], 3)}` : "", ...new Set(marks)].filter(Boolean).join(" · "));
  repaint();
}

function leaveCurves() {
  view.mark = null;
  put(".curve-readout", HINT);
  repaint();
}

function watchCurves() {
  put(".curve-readout", HINT);
  const curve = $(".curve");
  for (const canvas of [curve, ...element.querySelectorAll("figure canvas")]) {
    canvas.addEventListener("pointermove", (event) => {
      if (!view.curve || !view.rows.length) return;
      const box = canvas.getBoundingClientRect();
      const [left, right] = [box.left + GUTTER + 8, box.right - 6];
      const last = Math.max(view.status.total_steps, view.last ? view.last.step : 0, 2);
      readCurves(((event.clientX - left) / (right - left)) * last);
    });
    canvas.addEventListener("pointerleave", leaveCurves);
  }
  curve.addEventListener("blur", leaveCurves);
  curve.addEventListener("click", () => view.mark !== null && scrubTo(view.mark));
  curve.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1, PageUp: 10, PageDown: -10, Home: -Infinity, End: Infinity }[event.key];
    if (!by || !view.rows.length) return;
    event.preventDefault();
    const at = view.mark === null ? view.rows.length - (by < 0 ? 0 : 1) : view.rows.indexOf(rowAt(view.mark));
    readCurves(view.rows[Math.max(0, Math.min(view.rows.length - 1, at + by))][0]);
  });
}
