// Runs side by side. Value: what `app.views.compare.comparison_value` returns, or {names} alone with nothing to compare.
// A group is a run, or the runs that differ in their seed only; its runs share colour, dashes and dots.
const AXES = { step: 0, time: 1, tokens: 2 }; // the place of each in a point [step, seconds, tokens, loss]
const view = { data: null, across: "step", scale: null, hidden: new Set(), mark: null, cell: null, dark: isDark(), named: false };
const repaint = painter(element, paint);

function receive(value) {
  if (!value) return;
  view.data = value.groups ? value : null;
  $(".empty").hidden = Boolean(view.data);
  $(".views").hidden = !view.data;
  keepInAddress(value.names || []);
  if (!view.data) return;
  view.hidden = new Set([...view.hidden].filter((label) => value.groups.some((group) => group.label === label)));
  write();
  repaint();
}

// Keeps the compared runs in the address, so that a refresh or another browser shows the same.
function keepInAddress(names) {
  const url = new URL(window.location);
  const kept = names.length > 1 ? names.join(",") : null;
  if (url.searchParams.get("compare") === kept || (!kept && !view.named)) return;
  view.named = true;
  if (kept) url.searchParams.set("compare", kept);
  else url.searchParams.delete("compare");
  history.replaceState(null, "", url.href.replaceAll("%2C", ","));
}

function write() {
  const { groups, metrics, settings, notes, legend, names } = view.data;
  view.dark = isDark();
  $("h3").textContent = groups.length === names.length ? `${names.length} runs compared` : `${names.length} runs compared, in ${groups.length} groups`;
  $(".notes").replaceChildren(...notes.map((text) => make("li", { textContent: text })));
  $(".legend").textContent = `★ best. ${legend}`;
  $(".metrics").replaceChildren(table(metrics, true));
  $(".settings").replaceChildren(table(settings, false));
  $(".settings").hidden = !settings.rows.length;
  $(".same").hidden = settings.rows.length > 0;
  writeLines();
  writeRoutings();
}

function table({ head, rows }, samples) {
  let group = -1;
  const body = rows.map(({ cells, best, inner }) => {
    if (!inner) group += 1;
    const parts = cells[0].replace("n = ", "n\u00a0=\u00a0").split(/(?<=[._-])/).flatMap((part) => [part, make("wbr")]);
    const name = make("div", {}, ...(samples && !inner ? [sample(group, true)] : []), make("span", {}, ...parts));
    const values = cells.slice(1).map((text, i) => {
      const cell = make("td", { textContent: text, className: text === "–" ? "absent" : best.includes(i + 1) ? "best" : "" });
      if (best.includes(i + 1)) cell.setAttribute("aria-label", `${text}, best`);
      return cell;
    });
    return make("tr", { className: inner ? "inner" : "" }, make("th", { scope: "row" }, name), ...values);
  });
  const heads = make("tr", {}, ...head.map((text) => make("th", { scope: "col", textContent: text })));
  return make("table", {}, make("thead", {}, heads), make("tbody", {}, ...body));
}

function writeLines() {
  const focused = [...$(".lines").children].indexOf(document.activeElement);
  const buttons = view.data.groups.map((group, i) => {
    const text = group.mean ? `${group.label}, mean of ${group.counted}` : group.label;
    const button = make("button", { type: "button" }, sample(i, true), text);
    button.setAttribute("aria-pressed", String(!view.hidden.has(group.label)));
    button.addEventListener("click", () => {
      view.hidden[view.hidden.has(group.label) ? "delete" : "add"](group.label);
      writeLines();
      paint();
    });
    return button;
  });
  $(".lines").replaceChildren(...buttons);
  buttons[focused]?.focus();
}

// Curves ----------------------------------------------------------------------------------------------------

// The unit of the x axis, chosen so that its numbers stay short: [factor, name].
function unit(largest) {
  if (view.across === "time") return largest < 300 ? [1, "s"] : largest < 18000 ? [60, "min"] : [3600, "h"];
  if (view.across === "tokens") return largest < 1e4 ? [1, "tokens"] : largest < 1e7 ? [1e3, "k tokens"] : [1e6, "M tokens"];
  return [1, "steps"];
}

function visible() {
  return view.data.groups.map((group, index) => ({ ...group, index })).filter((group) => !view.hidden.has(group.label));
}

function lossLines(groups, factor) {
  const line = (points, index, width, alpha, dots) => ({
    points: points.map((p) => [p[AXES[view.across]] / factor, p[3]]), ...stroke(index, isDark()), width, alpha, dots,
  });
  const several = (group) => group.runs.length > 1;
  return groups.flatMap((group) => [
    ...group.runs.map((run) => line(run.train, group.index, several(group) ? 0.9 : 1.5, several(group) ? 0.45 : 0.95, 0)),
    ...group.runs.map((run) => line(run.evals, group.index, several(group) ? 0 : 2.6, several(group) ? 0.5 : 1, several(group) ? 3 : 5)),
    ...(group.mean ? [line(group.mean.train, group.index, 2.4, 1, 0), line(group.mean.evals, group.index, 3, 1, 5)] : []),
  ]);
}

function paintCurves() {
  const groups = visible();
  const all = groups.flatMap((group) => group.runs.flatMap((run) => [...run.train, ...run.evals]));
  const [factor, xName] = unit(all.reduce((most, p) => Math.max(most, p[AXES[view.across]]), 0));
  const lines = lossLines(groups, factor);
  const losses = all.map((p) => p[3]).filter((v) => v > 0);
  const [low, high] = losses.reduce(([a, b], v) => [Math.min(a, v), Math.max(b, v)], [Infinity, 0]);
  const log = losses.length > 0 && (view.scale || (high > 10 * low ? "log" : "linear")) === "log";
  press("scale", log ? "log" : "linear");
  press("across", view.across);
  const right = Math.max(...lines.flatMap((line) => line.points.map((p) => p[0])), 1);
  view.axis = { factor, xName, right };
  view.curves = plot($(".curves"), 300, lines, {
    x: [0, right], y: log ? [low * 0.9, high * 1.1] : niceRange(all.map((p) => p[3])), log, xName, mark: view.mark, whole: view.across === "step",
  });
  $(".curves").setAttribute("aria-label", `Training and held-out loss of ${groups.map((group) => group.label).join(", ")} across ${view.across}; arrow keys read values. The numbers are in the table above.`);
  $(".curves-readout").textContent = view.mark === null ? "Thin lines: training. Dots: held-out. Point at the curves to read them." : readCurves(groups);
}

function readCurves(groups) {
  const { factor, xName } = view.axis;
  const read = groups.map((group) => {
    const points = group.mean ? group.mean.train : group.runs[0].train;
    const at = nearest(points, view.mark * factor);
    const held = at && nearest(group.mean ? group.mean.evals : group.runs[0].evals, at[AXES[view.across]]);
    return `${group.label} ${at ? number(at[3], 3) : "–"}${held && held[0] === at[0] ? ` (held-out ${number(held[3], 3)})` : ""}`;
  });
  return `${number(view.mark, 1)} ${xName}: ${read.join(" · ")}`;
}

// The point nearest to x; null after the end of the run.
function nearest(points, x) {
  const axis = AXES[view.across];
  const { right, factor } = view.axis;
  if (!points.length || x > points[points.length - 1][axis] + 0.02 * right * factor) return null;
  return points.reduce((best, p) => (!best || Math.abs(p[axis] - x) < Math.abs(best[axis] - x) ? p : best), null);
}

function press(of, to) {
  for (const button of element.querySelectorAll(`[data-of="${of}"] button`)) button.setAttribute("aria-pressed", String(button.dataset.to === to));
}

// Routing ---------------------------------------------------------------------------------------------------

// The runs whose routing is drawn, in order; a group without routing is represented by its first run.
function routed() {
  return view.data.groups.flatMap((group, index) => {
    const runs = group.runs.map((run) => ({ ...run, index }));
    return runs.some((run) => run.routing) ? runs : [{ ...runs[0], name: group.label }];
  });
}

function writeRoutings() {
  const figures = routed().map((run) => {
    const caption = make("figcaption", {}, sample(run.index, true), run.name);
    if (!run.routing) return make("figure", {}, caption, make("p", { className: "none", textContent: run.no_routing }));
    caption.append(make("small", { textContent: `step ${run.routing.step}, ${run.routing.layers} layers` }));
    const canvas = make("canvas", { className: "heatmap" });
    canvas.setAttribute("role", "img");
    return make("figure", {}, caption, canvas, make("p", { className: "readout" }));
  });
  $(".routings").replaceChildren(...figures);
}

function loadData(routing, top) {
  return {
    layers: routing.layers, experts: routing.experts, counts: routing.counts, top,
    weight: (layer, expert) => routing.load[layer][expert],
    entropy: (layer) => routing.entropy[layer],
    active: (layer) => routing.active[layer],
  };
}

function paintRoutings() {
  const runs = routed().filter((run) => run.routing);
  $(".by-layer").hidden = $(".scale").hidden = !runs.length;
  if (!runs.length) return;
  const experts = [...new Set(runs.flatMap((run) => run.routing.counts))].sort((a, b) => b - a);
  const largest = Math.max(...runs.flatMap((run) => run.routing.load.flat()));
  const top = [0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75, 1].find((v) => largest <= v) || 1;
  drawSharedScale($(".scale"), top, experts);
  const canvases = element.querySelectorAll("figure canvas");
  runs.forEach((run, i) => {
    const data = loadData(run.routing, top);
    const mark = markIn(run.routing);
    drawHeatmap(canvases[i], data, mark);
    const mean = (values) => values.reduce((sum, v) => sum + v, 0) / values.length;
    const text = mark ? heatmapText(data, { ...mark, expert: Math.min(mark.expert, data.experts) }).replace("weight", "share")
      : `Mean entropy ${number(mean(run.routing.entropy))}, ${number(mean(run.routing.active), 1)} of ${number(mean(run.routing.counts), 1)} experts active per token.`;
    canvases[i].nextElementSibling.textContent = text;
    canvases[i].setAttribute("aria-label", `Heatmap of the load of ${data.experts} experts in ${data.layers} layers of ${run.name}. ${text}`);
  });
  paintByLayer(runs, experts);
}

// The cell under the pointer, for the heatmap of another run; null where that has no such cell.
function markIn({ layers, experts }) {
  const { layer, expert } = view.cell || { layer: Infinity };
  return layer < layers && (expert < experts || expert === Infinity) ? { layer, expert } : null;
}

function paintByLayer(runs, experts) {
  const line = (pick) => runs.map((run) => ({
    points: pick(run.routing).map((value, layer) => [layer + 1, value]), ...stroke(run.index, isDark()), width: 1.8, alpha: 0.95, dots: 0,
  }));
  const layers = Math.max(...runs.map((run) => run.routing.layers));
  const axis = { x: [1, Math.max(layers, 2)], xName: "layer", whole: true, mark: view.cell && view.cell.layer < layers ? view.cell.layer + 1 : null };
  const entropy = niceRange(runs.flatMap((run) => run.routing.entropy));
  const names = runs.map((run) => run.name).join(", ");
  plot($(".entropy"), 170, line((routing) => routing.entropy), { ...axis, y: [Math.max(0, entropy[0]), 1 + 0.16 * (1 - Math.max(0, entropy[0]))], bases: [{ y: 1, text: "even over all experts" }] });
  plot($(".active"), 170, line((routing) => routing.active), { ...axis, y: [0, experts[0] * 1.16], bases: experts.slice(0, 4).map((count) => ({ y: count, text: `all ${count}` })) });
  $(".entropy").setAttribute("aria-label", `Entropy of the router by layer, ${names}; 1 is even over all experts`);
  $(".active").setAttribute("aria-label", `Active experts per token by layer, ${names}`);
}

// One scale for all heatmaps, with a tick at the even share of each number of experts.
function drawSharedScale(canvas, top, experts) {
  const style = theme(canvas);
  const { context, width } = surface(canvas, 26);
  for (let x = 0; x < width; x++) {
    context.fillStyle = css(heat(x / width, style.dark));
    context.fillRect(x, 0, 1, 8);
  }
  context.fillStyle = style.muted;
  context.font = `11px ${style.font}`;
  context.textAlign = "left";
  context.fillText("0", 0, 22);
  context.textAlign = "right";
  context.fillText(number(top), width, 22);
  context.textAlign = "center";
  let free = 12; // where the next label may begin
  for (const count of experts.filter((n) => n > 1)) {
    const x = width / count / top;
    const text = experts.length > 1 ? `even of ${count}` : "even";
    const half = context.measureText(text).width / 2;
    if (x > width - 1) continue;
    context.fillRect(x - 0.5, 0, 1.5, 12);
    if (x - half < free || x + half > width - 26) continue;
    context.fillText(text, x, 22);
    free = x + half + 6;
  }
}

function paint() {
  if (!view.data) return;
  if (view.dark !== isDark()) write();
  paintCurves();
  paintRoutings();
}

// Pointer and keys -----------------------------------------------------------------------------------------------------

for (const name of ["across", "scale"]) {
  $(`[data-of="${name}"]`).addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    Object.assign(view, { [name]: button.dataset.to, mark: null });
    paint(); // immediately, because the next key press uses the axis that painting sets
  });
}

function mark(at) {
  view.mark = at === null ? null : Math.max(0, Math.min(view.axis.right, at));
  repaint();
}

$(".curves").addEventListener("pointermove", (event) => view.curves && mark(view.curves.xOf(event.clientX)));
for (const leave of ["pointerleave", "blur"]) $(".curves").addEventListener(leave, () => mark(null));
$(".curves").addEventListener("keydown", (event) => {
  const way = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!way || !view.axis) return;
  event.preventDefault();
  const step = view.across === "step" ? Math.max(1, Math.round(view.axis.right / 50)) : view.axis.right / 50;
  mark((view.mark ?? 0) + way * step);
});
$(".routings").addEventListener("pointermove", (event) => {
  const canvas = event.target.closest("canvas");
  const cell = canvas && heatmapCell(canvas, event);
  view.cell = cell && { ...cell, expert: cell.expert >= canvas.geometry.experts ? Infinity : cell.expert };
  repaint();
});
$(".routings").addEventListener("pointerleave", () => { view.cell = null; repaint(); });

$(".copy").addEventListener("click", async () => {
  const text = view.data.markdown;
  try {
    await navigator.clipboard.writeText(text);
  } catch { // no clipboard over plain http from another machine
    const area = make("textarea", { value: text });
    element.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  confirm($(".copy"), "Copied");
});

$(".save").addEventListener("click", () => {
  const rows = [["group", "run", "seed", "kind", "step", "seconds", "tokens", "loss"]];
  for (const group of view.data.groups) {
    for (const run of group.runs) {
      for (const kind of ["train", "evals"]) {
        for (const point of run[kind]) rows.push([group.label, run.name, run.seed ?? "", kind === "train" ? "training" : "held-out", ...point]);
      }
    }
  }
  const quoted = (value) => (/[",\n]/.test(value) ? `"${String(value).replaceAll('"', '""')}"` : value);
  const file = URL.createObjectURL(new Blob([rows.map((row) => row.map(quoted).join(",")).join("\n") + "\n"], { type: "text/csv" }));
  make("a", { href: file, download: "curves.csv" }).click();
  URL.revokeObjectURL(file);
  confirm($(".save"), "Saved");
});

function confirm(button, text) {
  const before = button.dataset.text || (button.dataset.text = button.textContent);
  button.textContent = text;
  setTimeout(() => { button.textContent = before; }, 1600);
}

watch("value", () => receive(props.value));
receive(props.value);
