// The live view of a run. Value: what `app.services.live_updates.run_update` returns: `status`, the new rows of the curves,
// and what changed in the newest step. After a lost update everything is fetched again.
const NOTHING = { generation: 0, rows: [], columns: [], evals: [], marks: [], notices: [], last: null, newest: null, alarms: [], watched: false };
const view = { status: null, trouble: null, reading: null, mark: null, asking: false, ...NOTHING };
const repaint = painter(element, paint);
const STATES = { queued: "queued", running: "training", finished: "finished", stopped: "stopped", interrupted: "interrupted", failed: "failed", imported: "imported", unreadable: "cannot be read" };

function receive(value) {
  if (!value) return;
  if (!value.status) {
    view.status = null;
  } else {
    if (view.status && view.status.name !== value.status.name) stopScrubbing();
    if (value.reset) Object.assign(view, { ...NOTHING, generation: value.generation, trouble: null });
    Object.assign(view, { status: value.status, reading: value.reading });
    if (value.generation !== view.generation || value.rows.at > view.rows.length || value.evals.at > view.evals.length) askForAll();
    else take(value);
    write();
  }
  $(".empty").hidden = Boolean(view.status);
  $(".live").hidden = !view.status;
  if (view.status) keepInAddress(view.status.name);
  repaint();
}

function take(value) {
  view.columns = value.rows.columns;
  view.rows.length = value.rows.at;
  view.rows.push(...value.rows.rows);
  view.evals.length = value.evals.at;
  view.evals.push(...value.evals.rows);
  view.marks = value.marks || view.marks;
  view.notices = value.notices || view.notices;
  if ("trouble" in value) view.trouble = value.trouble;
  if (!("last" in value)) return;
  Object.assign(view, { last: value.last, newest: value.routing, alarms: value.alarms, watched: value.watched });
}

// After a lost update (two arrived at once, the page was suspended), fetches everything once.
async function askForAll() {
  if (view.asking) return;
  view.asking = true;
  const name = view.status.name;
  try {
    const whole = await server.fetch_run(name);
    if (whole && view.status && view.status.name === name) receive(whole);
  } finally {
    view.asking = false;
  }
}

// A column of the curves as points [step, value].
function points(column) {
  const at = view.columns.indexOf(column);
  return at < 0 ? [] : view.rows.map((row) => [row[0], row[at]]);
}

// Keeps the run in the address, so that a refresh or another browser shows the same one.
function keepInAddress(name) {
  const url = new URL(window.location);
  if (element.offsetParent === null || url.searchParams.get("run") === name) return;
  url.searchParams.set("run", name);
  history.replaceState(null, "", url);
}

function gigabytes(megabytes) {
  return megabytes ? `${number(megabytes / 1024, 1)} GB` : "–";
}

function write() {
  const { status, last, reading, trouble } = view;
  put(".name", status.name);
  put(".state", STATES[status.state] || status.state);
  $(".state").dataset.state = status.state;
  put(".about", status.about);
  const share = status.state === "finished" ? 1 : status.total_steps ? status.step / status.total_steps : 0;
  $(".bar i").style.width = `${100 * clamp(share)}%`;
  $(".bar").setAttribute("aria-valuenow", status.step);
  $(".bar").setAttribute("aria-valuemax", status.total_steps || 1);
  put(".progress", progressText(status, last));
  $(".reading").hidden = reading === null;
  put(".reading", reading === null ? "" : `Reading the history of this run: ${percent(reading)} …`);
  $(".trouble").hidden = !trouble;
  put(".cause", trouble ? trouble.cause : "");
  put(".advice", trouble ? trouble.advice : "");
  put(".trouble pre", trouble ? trouble.log : "");
  $(".trouble details").hidden = !(trouble && trouble.log);
  const held = view.evals.length ? view.evals[view.evals.length - 1][1] : NaN;
  const best = view.evals.reduce((least, p) => (p[1] !== null && (!least || p[1] < least[1]) ? p : least), null);
  put('[data-tile="loss"]', number(last && last.loss, 3));
  put('[data-tile="eval"]', number(held, 3));
  put('[data-tile="best"]', best ? number(best[1], 3) : "–");
  put(".best-at", best ? `Best held-out, step ${best[0]}` : "Best held-out");
  writeNotices();
  writeAlarms();
  announce();
}

function writeNotices() {
  const key = JSON.stringify(view.notices);
  if (view.noticed === key) return;
  view.noticed = key;
  $(".notices").replaceChildren(...view.notices.map((text) => make("li", {}, text)));
}

function progressText(status, last) {
  const steps = status.total_steps ? `Step ${status.step} of ${status.total_steps}` : status.step ? `Step ${status.step}` : "";
  const words = {
    queued: "Waiting for its turn on the device.",
    running: last && status.step >= status.total_steps ? `${steps} · measuring the held-out loss and saving …` : last ? `${steps} · about ${clockText(last.eta_s || 0)} left` : status.note || "Loading the model and the data …",
    finished: `${steps} · done${status.seconds ? ` in ${clockText(status.seconds)}` : ""}`,
  };
  return words[status.state] || steps;
}

// For screen readers: announces the progress when the state or the alarms change, and at each tenth of the run.
function announce() {
  const { status, last, alarms } = view;
  const tenth = status.total_steps ? Math.floor((10 * status.step) / status.total_steps) : 0;
  const key = [status.name, status.state, tenth, ...alarms.map((a) => a.kind)].join();
  if (view.announced === key || view.reading !== null) return;
  view.announced = key;
  const loss = last ? `, training loss ${number(last.loss, 3)}` : "";
  const found = alarms.length ? ` ${alarms.map((a) => `${a.title}.`).join(" ")}` : "";
  put(".summary", `Run ${status.name}, ${STATES[status.state]}. ${progressText(status, last)}${loss}.${found}`);
}

function paint() {
  if (!view.status) return;
  paintCurves(theme(element));
  paintRouting();
}
