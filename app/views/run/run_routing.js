// The routing of a run: alarms, the load of layers by experts at any step of the training, entropy and active experts.
// `scrub.shown` is the routing on the screen: the newest while `scrub.follow`, else that of the chosen step.
const scrub = { follow: true, shown: null, wanted: null, fetching: false, kept: new Map(), playing: 0, cell: null, top: 0 };
const KEPT = 300;
const PLAY_MS = 90;
const PLAY_FRAMES = 80;
const SEVERITY = { serious: "Serious", warning: "Warning", note: "Note" };

function stopScrubbing() {
  clearInterval(scrub.playing);
  scrub.kept.clear();
  Object.assign(scrub, { follow: true, shown: null, wanted: null, playing: 0, top: 0 });
}

// The slider's position of a step: the number of its row.
function position(step) {
  return Math.max(0, view.rows.indexOf(rowAt(step)));
}

function scrubTo(step) {
  if (!view.rows.length) return;
  scrub.follow = step >= view.rows[view.rows.length - 1][0];
  scrub.wanted = scrub.follow ? null : step;
  if (scrub.kept.has(step)) scrub.shown = scrub.kept.get(step);
  else if (!scrub.follow) fetchRouting();
  repaint();
}

// One request at a time; of the steps the slider passes meanwhile, only the last is fetched.
async function fetchRouting() {
  if (scrub.fetching) return;
  scrub.fetching = true;
  try {
    while (scrub.wanted !== null && !scrub.kept.has(scrub.wanted)) {
      const [step, name, generation] = [scrub.wanted, view.status.name, view.generation];
      const found = await server.fetch_step_routing([name, step]);
      if (!view.status || view.status.name !== name) return;
      if (view.generation === generation || found) scrub.kept.set(step, found);
      if (scrub.kept.size > KEPT) scrub.kept.delete(scrub.kept.keys().next().value);
      if (found && !scrub.follow) scrub.shown = found;
      repaint();
    }
  } finally {
    scrub.fetching = false;
  }
  if (scrub.wanted !== null && scrub.kept.get(scrub.wanted)) scrub.shown = scrub.kept.get(scrub.wanted);
  repaint();
}

function play() {
  if (scrub.playing) return pause();
  const last = view.rows.length - 1;
  let at = scrub.follow ? 0 : Number($(".when").value);
  const by = Math.max(1, Math.round(last / PLAY_FRAMES));
  scrub.playing = setInterval(() => {
    if (scrub.fetching) return;
    at = Math.min(at + by, view.rows.length - 1);
    scrubTo(view.rows[at][0]);
    if (scrub.follow) pause();
  }, PLAY_MS);
  scrubTo(view.rows[Math.min(at, last)][0]);
}

function pause() {
  clearInterval(scrub.playing);
  scrub.playing = 0;
  repaint();
}

function writeScrubber() {
  const slider = $(".when");
  const last = Math.max(view.rows.length - 1, 0);
  slider.max = last;
  slider.value = scrub.follow ? last : position(scrub.wanted);
  const step = scrub.shown ? scrub.shown.step : 0;
  slider.setAttribute("aria-valuetext", `step ${step}`);
  slider.style.setProperty("--share", `${last ? (100 * slider.value) / last : 100}%`);
  put(".step", `Step ${step}`);
  $(".now").setAttribute("aria-pressed", String(scrub.follow));
  $(".play").dataset.playing = String(Boolean(scrub.playing));
  $(".play").setAttribute("aria-label", scrub.playing ? "Pause" : "Play the training");
  $(".scrubber").hidden = view.rows.length < 2;
}

function paintRouting() {
  if (scrub.follow) scrub.shown = view.newest;
  const data = loadData(scrub.shown);
  $(".load").hidden = !data;
  if (!data) return;
  writeScrubber();
  drawHeatmap($(".heatmap"), data, scrub.cell);
  drawScale($(".scale"), data.top, Math.max(...data.counts));
  drawProfile($(".profile"), data);
  const text = loadText(data);
  put(".load-title", `Load of each expert, by layer, at step ${scrub.shown.step}`);
  $(".heatmap").setAttribute("aria-label", `Heatmap of the load of ${data.experts} experts in ${data.layers} layers. ${text}`);
  $(".profile").setAttribute("aria-label", `Entropy and active experts of each layer. ${text}`);
  put(".heat-readout", scrub.cell ? heatmapText({ ...data, bare: false }, scrub.cell).replace("weight", "share") : text);
}

function loadData(routing) {
  if (!routing || routing.experts < 2) return null;
  // The top of the scale only grows, so that colours stay comparable from step to step.
  scrub.top = Math.max(scrub.top, ...routing.load.map((row) => Math.max(...row)));
  return {
    layers: routing.layers, experts: routing.experts, counts: routing.counts || routing.load.map(() => routing.experts),
    top: ceiling(scrub.top, routing.experts), bare: true, threshold: routing.threshold,
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
  return `Step ${scrub.shown.step}: mean entropy ${number(mean(data.entropy))}, ${number(mean(data.active), 1)} of ${number(mean((l) => data.counts[l]), 1)} experts active per token, ${dead ? `${dead} unused` : "none unused"}.`;
}

// Two rows of bars below the heatmap, one bar per layer: mean entropy (0…1, with DynMoLE's threshold), and active experts.
function drawProfile(canvas, data) {
  const style = theme(canvas);
  const [high, gap, most] = [34, 20, Math.max(...data.counts)];
  const { context, width } = surface(canvas, 2 * (high + gap));
  const size = (width - GUTTER) / data.layers;
  const rows = [
    { name: "Entropy", top: 1, value: data.entropy, line: data.threshold, format: (v) => number(v) },
    { name: "Active experts per token", top: most, value: data.active, line: null, format: (v) => number(v, 1) },
  ];
  context.font = `11px ${style.font}`;
  rows.forEach(({ name, top, value, line }, i) => {
    const base = (i + 1) * (high + gap) - 2;
    const y = (v) => base - clamp(v / top) * high;
    context.fillStyle = style.muted;
    context.textBaseline = "alphabetic";
    context.textAlign = "left";
    context.fillText(name, GUTTER, base - high - 5);
    context.textAlign = "right";
    context.textBaseline = "middle";
    context.fillText(String(top), GUTTER - 7, y(top) + 4);
    context.fillText("0", GUTTER - 7, base - 4);
    context.fillStyle = style.empty;
    context.fillRect(GUTTER, base - high, width - GUTTER, high);
    context.fillStyle = style.accent;
    for (let layer = 0; layer < data.layers; layer++) {
      const chosen = scrub.cell && scrub.cell.layer === layer;
      context.globalAlpha = chosen ? 1 : 0.62;
      context.fillRect(GUTTER + layer * size, y(value(layer)), Math.max(size - (size > 5 ? 1 : 0), 0.5), base - y(value(layer)));
    }
    context.globalAlpha = 1;
    if (line === null || line === undefined || line >= top) return;
    context.strokeStyle = style.text;
    context.setLineDash([4, 3]);
    context.beginPath();
    context.moveTo(GUTTER, y(line));
    context.lineTo(width, y(line));
    context.stroke();
    context.setLineDash([]);
    context.fillStyle = style.muted;
    context.textAlign = "right";
    context.textBaseline = "alphabetic";
    context.fillText(`┄ threshold ${number(line)}`, width, base - high - 5);
  });
}

function writeAlarms() {
  const key = JSON.stringify(view.alarms);
  const verdict = view.alarms.length ? "" : view.watched ? "no alarms" : "checked once ten steps are logged";
  put(".verdict", verdict);
  if (view.alarmed === key) return;
  view.alarmed = key;
  $(".alarms").replaceChildren(...view.alarms.map(alarmItem));
}

function alarmItem(alarm) {
  const part = (tag, className, text) => make(tag, { className }, text);
  const item = make("li", {},
    part("span", "severity", SEVERITY[alarm.severity]),
    part("b", "title", alarm.title),
    part("span", "where", alarm.where),
    part("p", "meaning", alarm.meaning),
    part("p", "try", `Try: ${alarm.advice}`));
  item.dataset.severity = alarm.severity;
  item.dataset.kind = alarm.kind;
  return item;
}

function watchRouting() {
  const heatmap = $(".heatmap");
  for (const canvas of [heatmap, $(".profile")]) {
    canvas.addEventListener("pointermove", (event) => {
      const cell = heatmapCell(heatmap, { clientX: event.clientX, clientY: canvas === heatmap ? event.clientY : heatmap.getBoundingClientRect().bottom - 1 });
      scrub.cell = cell && canvas !== heatmap ? { layer: cell.layer, expert: heatmap.geometry.experts } : cell;
      repaint();
    });
    canvas.addEventListener("pointerleave", () => { scrub.cell = null; repaint(); });
  }
  $(".when").addEventListener("input", (event) => { pause(); scrubTo(view.rows[Number(event.target.value)][0]); });
  $(".play").addEventListener("click", play);
  $(".now").addEventListener("click", () => { pause(); scrubTo(Infinity); });
}

watchCurves();
watchRouting();
watch("value", () => receive(props.value));
receive(props.value);
