// A run as it goes. Its value is a delta: `status`, the new points of the curves, and the last routing statistics.
const $ = (selector) => element.querySelector(selector);
const view = { status: null, points: [], evals: [], routing: null, last: null };
const repaint = painter(element, paint);
const STATES = { queued: "queued", running: "training", finished: "finished", stopped: "stopped", interrupted: "interrupted", failed: "failed" };

function receive(value) {
  if (!value) return;
  if (!value.status) {
    view.status = null;
  } else {
    if (value.reset) Object.assign(view, { points: [], evals: [], routing: null, last: null });
    view.status = value.status;
    view.points.push(...value.points);
    view.evals.push(...value.evals);
    view.routing = value.routing || view.routing;
    view.last = value.last || view.last;
    write();
  }
  $(".empty").hidden = Boolean(view.status);
  $(".live").hidden = !view.status;
  if (view.status) keepInAddress(view.status.name);
  repaint();
}

function duration(seconds) {
  const s = Math.max(0, Math.round(seconds));
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${s % 60} s`;
  return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
}

// The run in the address: a refresh, or another browser, shows the same one.
function keepInAddress(name) {
  const url = new URL(window.location);
  if (element.offsetParent === null || url.searchParams.get("run") === name) return;
  url.searchParams.set("run", name);
  history.replaceState(null, "", url);
}

function put(selector, text) {
  if ($(selector).textContent !== text) $(selector).textContent = text;
}

function write() {
  const { status, last } = view;
  put(".name", status.name);
  put(".state", STATES[status.state] || status.state);
  $(".state").dataset.state = status.state;
  put(".about", status.about);
  const share = status.state === "finished" ? 1 : status.total_steps ? status.step / status.total_steps : 0;
  $(".bar i").style.width = `${100 * clamp(share)}%`;
  $(".bar").setAttribute("aria-valuenow", status.step);
  $(".bar").setAttribute("aria-valuemax", status.total_steps || 1);
  put(".progress", progressText(status, last));
  $(".trouble").hidden = !status.error;
  put(".trouble b", status.error || "");
  put(".trouble span", status.advice || "");
  put('[data-tile="loss"]', number(last && last.loss, 3));
  put('[data-tile="eval"]', number(view.evals.length ? view.evals[view.evals.length - 1][1] : NaN, 3));
  put('[data-tile="speed"]', number(last && last.tokens_per_second, 0));
  put('[data-tile="memory"]', last && last.memory_mb ? `${number(last.memory_mb / 1024, 1)} GB` : "–");
}

function progressText(status, last) {
  const steps = status.total_steps ? `Step ${status.step} of ${status.total_steps}` : status.step ? `Step ${status.step}` : "";
  const words = {
    queued: "Waiting for its turn on the device.",
    running: last && status.step >= status.total_steps ? `${steps} · measuring the held-out loss and saving …` : last ? `${steps} · about ${duration(last.eta_s || 0)} left` : status.note || "Loading the model and the data …",
    finished: `${steps} · done${status.seconds ? ` in ${duration(status.seconds)}` : ""}`,
  };
  return words[status.state] || steps;
}

// The range of a loss curve: the first steps of a training tower above all others, the 98th percentile does not.
function lossRange() {
  const values = [...view.points, ...view.evals].map((p) => p[1]).filter((v) => v !== null && Number.isFinite(v));
  return values.length ? niceRange(values) : null;
}

function paint() {
  if (!view.status) return;
  const look = theme(element);
  const last = Math.max(view.status.total_steps, ...view.points.slice(-1).map((p) => p[0]), 2);
  const series = [
    { points: view.points, colour: look.accent, area: true, range: lossRange() },
    { points: view.evals, colour: "#d55e00", dots: true, range: lossRange() },
  ];
  view.curve = drawCurves($(".curve"), 190, series, { x: [0, last], mark: view.mark ? view.mark[0] : null, xName: "step" });
  const data = loadData();
  $(".load").hidden = !data;
  if (!data) return;
  drawHeatmap($(".heatmap"), data, view.cell);
  drawScale($(".scale"), data.top, Math.max(...data.counts));
  const text = loadText(data);
  $(".heatmap").setAttribute("aria-label", `Heatmap of the load of ${data.experts} experts in ${data.layers} layers. ${text}`);
  if (!view.cell) put(".heat-readout", text);
}

function loadData() {
  const routing = view.routing;
  if (!routing || routing.experts < 2) return null;
  const top = Math.max(...routing.load.map((row) => Math.max(...row)));
  return {
    layers: routing.layers, experts: routing.experts, counts: routing.counts || routing.load.map(() => routing.experts),
    top: ceiling(top, routing.experts),
    weight: (layer, expert) => routing.load[layer][expert],
    entropy: (layer) => routing.entropy[layer],
    active: (layer) => routing.active[layer],
    dead: routing.dead,
  };
}

function loadText(data) {
  const layers = Array.from({ length: data.layers }, (_, layer) => layer);
  const mean = (pick) => layers.reduce((sum, layer) => sum + pick(layer), 0) / data.layers;
  const dead = layers.reduce((sum, layer) => sum + data.dead[layer], 0);
  return `Last step: mean entropy ${number(mean(data.entropy))}, ${number(mean(data.active), 1)} of ${number(mean((l) => data.counts[l]), 1)} experts active a token, ${dead ? `${dead} unused` : "none unused"}.`;
}

$(".curve").addEventListener("pointermove", (event) => {
  if (!view.curve || !view.points.length) return;
  const at = view.curve.at(event.clientX);
  view.mark = view.points.reduce((best, p) => (Math.abs(p[0] - at) < Math.abs(best[0] - at) ? p : best));
  const near = view.evals.find((p) => p[0] === view.mark[0]);
  put(".curve-readout", `Step ${view.mark[0]}: loss ${number(view.mark[1], 3)}${near ? `, held-out ${number(near[1], 3)}` : ""}`);
  repaint();
});
$(".curve").addEventListener("pointerleave", () => { view.mark = null; put(".curve-readout", ""); repaint(); });
$(".heatmap").addEventListener("pointermove", (event) => {
  view.cell = heatmapCell($(".heatmap"), event);
  const data = loadData();
  if (data && view.cell) put(".heat-readout", heatmapText(data, view.cell).replace("weight", "share"));
  repaint();
});
$(".heatmap").addEventListener("pointerleave", () => { view.cell = null; repaint(); });

watch("value", () => receive(props.value));
receive(props.value);
