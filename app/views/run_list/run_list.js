// The list of runs. Value: {reset, rows, gone, now, chosen}: new and changed rows, names of deleted runs; and optionally
// `marked`, the names of the compared runs.
// Events: `select` {name} opens a run; `input` {compare: [names]} carries the runs marked for comparison.
const list = $(".rows");
const runs = new Map(), items = new Map(), groups = new Map();
const view = { words: [], state: "", sort: "created", chosen: "", marked: new Set(), ahead: 0, order: "" };
const STATES = ["running", "queued", "finished", "stopped", "interrupted", "failed", "imported", "unreadable"];
const MANY = 100;
const SCORES = { exact_match: "exact match", accuracy: "accuracy" };

function receive(value) {
  if (!value) return;
  const first = value.reset;
  if (value.reset) runs.clear();
  view.ahead = value.now - Date.now() / 1000;
  value.rows.forEach((run) => runs.set(run.name, run));
  value.gone.forEach((name) => runs.delete(name));
  [...items.keys()].filter((name) => !runs.has(name)).forEach((name) => items.delete(name));
  value.rows.forEach(write);
  if (value.marked) {
    view.marked = new Set(value.marked);
    writeMarked();
  }
  const had = view.marked.size;
  view.marked.forEach((name) => runs.has(name) || view.marked.delete(name));
  if (view.marked.size !== had) tellMarked();
  choose(value.chosen);
  render();
  if (first) show(items.get(view.chosen));
}

// Order and filter --------------------------------------------------------------------------------------

function fits(run) {
  if (view.state && run.state !== view.state) return false;
  const text = `${run.name} ${run.router} ${run.model} ${run.group || ""}`.toLowerCase();
  return view.words.every((word) => text.includes(word));
}

// Evaluation scores rank before held-out losses, with which they cannot be compared.
function rank(run) {
  if (run.score) return 2 + run.score.value;
  return run.loss === null ? -1 : 1 / (1 + run.loss);
}

const ORDERS = {
  created: (a, b) => b.created - a.created || (a.name < b.name ? -1 : 1),
  name: (a, b) => a.name.localeCompare(b.name, undefined, { numeric: true }),
  metric: (a, b) => rank(b) - rank(a) || b.created - a.created,
};

function render() {
  const shown = [...runs.values()].filter(fits).sort(ORDERS[view.sort]);
  const order = shown.map((run) => `${run.group || ""}/${run.name}`).join();
  if (order !== view.order) arrange(shown);
  view.order = order;
  groups.forEach((group, name) => group.seen && writeGroup(name, group));
  $(".empty").hidden = runs.size > 0;
  $(".tools").hidden = runs.size === 0;
  $(".none").hidden = runs.size === 0 || shown.length > 0;
  writeStates();
  rove();
}

// Put the rows in order; a group takes the place of its first run.
function arrange(shown) {
  const focused = list.contains(document.activeElement) ? document.activeElement : null;
  const top = list.scrollTop;
  groups.forEach((group) => (group.seen = []));
  const nodes = [];
  for (const run of shown) {
    const group = run.group ? groupOf(run.group) : null;
    if (!group) nodes.push(items.get(run.name));
    else if (group.seen.push(run) === 1) nodes.push(group.item);
  }
  groups.forEach((group) => group.list.replaceChildren(...group.seen.map((run) => items.get(run.name))));
  list.replaceChildren(...nodes);
  list.classList.toggle("many", shown.length > MANY);  // then only visible rows are laid out and painted
  list.scrollTop = top;
  if (focused && list.contains(focused)) focused.focus({ preventScroll: true });
}

function groupOf(name) {
  if (groups.has(name)) return groups.get(name);
  const mark = make("input", { type: "checkbox", tabIndex: -1 }), about = make("span", { className: "about" }), rows = make("ul");
  mark.setAttribute("aria-label", `Compare all runs of ${name}`);
  const details = make("details", { open: true }, make("summary", {}, mark, make("b", {}, name), about), rows);
  const group = { item: make("li", { className: "group" }, details), list: rows, about, mark, seen: [] };
  group.item.dataset.group = name;
  details.addEventListener("toggle", rove);
  mark.addEventListener("change", () => setMarked(group.seen.map((run) => run.name), mark.checked));
  groups.set(name, group);
  return group;
}

function writeGroup(name, group) {
  const counts = STATES.map((state) => [group.seen.filter((run) => run.state === state).length, state]);
  const words = counts.filter(([count]) => count).map(([count, state]) => `${count} ${state}`);
  put(group.about, `${group.seen.length} runs · ${words.join(", ")}`);
  const marked = group.seen.filter((run) => view.marked.has(run.name)).length;
  group.mark.checked = marked > 0 && marked === group.seen.length;
  group.mark.indeterminate = marked > 0 && marked < group.seen.length;
}

// A row --------------------------------------------------------------------------------------------------------

function itemOf(name) {
  if (items.has(name)) return items.get(name);
  const mark = make("input", { type: "checkbox", tabIndex: -1 }), part = (className) => make("span", { className });
  mark.setAttribute("aria-label", `Compare ${name}`);
  mark.addEventListener("change", () => setMarked([name], mark.checked));
  const open = make("button", { type: "button", tabIndex: -1 }, make("b", { title: name }, name), part("metric"), part("about"), part("when"));
  open.dataset.run = name;
  const item = make("li", { className: "run" }, make("label", { className: "mark" }, mark), open);
  items.set(name, item);
  return item;
}

function write(run) {
  const item = itemOf(run.name), at = (selector) => item.querySelector(selector);
  const state = make("span", { className: "state" }, run.state);
  state.dataset.state = run.state;
  at(".about").replaceChildren(state, ` · ${run.router} · ${short(run.model)}`);
  at(".about").title = `${run.router} · ${run.model}`;
  const [value, name] = metric(run);
  at(".metric").replaceChildren(value, ...(name ? [make("small", {}, ` ${name}`)] : []));
  writeWhen(run, item);
  const alive = run.state === "running" || run.state === "queued";
  if (!alive) at(".bar")?.remove();
  else if (!at(".bar")) item.lastChild.append(make("span", { className: "bar" }, make("i")));
  if (alive) at(".bar i").style.width = `${run.total_steps ? (100 * run.step) / run.total_steps : 0}%`;
}

function writeWhen(run, item) {
  const steps = run.total_steps && run.state !== "finished" ? `${run.step} / ${run.total_steps} · ` : "";
  const left = run.ends ? `${remaining(run.ends - now())} left` : age(run.created);
  put(item.querySelector(".when"), steps + (run.state === "queued" ? "waiting" : left));
}

function metric(run) {
  if (run.score) return [`${(100 * run.score.value).toFixed(1)} %`, SCORES[run.score.kind] || run.score.kind];
  return run.loss === null ? ["", ""] : [number(run.loss, 3), "held-out loss"];
}

function short(model) {
  return model.startsWith("/") ? model.split("/").filter(Boolean).pop() : model;
}

function now() {
  return Date.now() / 1000 + view.ahead;
}

function remaining(seconds) {
  const s = Math.max(0, seconds);
  if (s < 60) return `${Math.ceil(s)} s`;
  return s < 3600 ? `${Math.ceil(s / 60)} min` : `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
}

function age(created) {
  const seconds = now() - created;
  if (seconds < 60) return "just now";
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ago`;
  if (seconds < 86400) return `${Math.floor(seconds / 3600)} h ago`;
  return new Date(created * 1000).toLocaleDateString();
}

// Filter, marks, choice ----------------------------------------------------------------------------------------

function writeStates() {
  const counts = STATES.map((state) => [state, [...runs.values()].filter((run) => run.state === state).length]);
  const chips = [["", runs.size], ...counts.filter(([state, count]) => count || state === view.state)];
  const key = chips.join();
  if ($(".states").dataset.key === key) return;
  $(".states").dataset.key = key;
  const focused = $(".states").contains(document.activeElement);
  $(".states").replaceChildren(...chips.map(([state, count]) => {
    const input = make("input", { type: "radio", name: `${element.id}-state`, value: state, checked: state === view.state });
    return make("label", {}, input, state ? state[0].toUpperCase() + state.slice(1) : "All", make("span", {}, String(count)));
  }));
  if (focused) $(".states input:checked")?.focus();
}

function setMarked(names, on) {
  names.forEach((name) => (on ? view.marked.add(name) : view.marked.delete(name)));
  tellMarked();
  groups.forEach((group, name) => writeGroup(name, group));
}

function tellMarked() {
  writeMarked();
  trigger("input", { compare: [...view.marked] });
}

function writeMarked() {
  items.forEach((item, name) => (item.querySelector("input").checked = view.marked.has(name)));
  const count = view.marked.size;
  $(".marked").hidden = count === 0;
  $(".marked input").checked = count > 0;
  put($(".marked span"), count === 1 ? "1 run marked for comparison; mark another" : `${count} runs marked for comparison`);
  $(".see").hidden = count < 2;
}

function choose(name) {
  view.chosen = name;
  items.forEach((item, run) => item.lastChild.setAttribute("aria-current", String(run === name)));
}

// A run opened by the person is a history entry, so that Back undoes it; other updates only replace the address.
function open(name) {
  const url = new URL(window.location);
  if (url.searchParams.get("run") !== name) {
    url.searchParams.set("run", name);
    history.pushState(null, "", url);
  }
  choose(name);
  trigger("select", { name });
}

function show(item) {
  if (!item || !list.contains(item)) return;
  const below = item.offsetTop + item.offsetHeight - list.offsetTop - list.clientHeight;
  if (below > list.scrollTop) list.scrollTop = below + 12;
}

// Keyboard: one stop in the tab order, arrow keys inside ----------------------------------------------------

function stops() {
  return [...list.querySelectorAll("button, summary")].filter((stop) => stop.tagName === "SUMMARY" || !stop.closest("details:not([open])"));
}

function rove(to) {
  const all = stops();
  const stop = to instanceof Element ? to : all.find((one) => one.tabIndex === 0 && one === document.activeElement) || all.find((one) => one.dataset.run === view.chosen) || all[0];
  all.forEach((one) => (one.tabIndex = one === stop ? 0 : -1));
}

function move(event) {
  const all = stops(), at = all.indexOf(document.activeElement);
  const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: all.length - 1 }[event.key];
  if (to === undefined || !all[to]) return;
  event.preventDefault();
  rove(all[to]);
  all[to].focus();
}

list.addEventListener("keydown", (event) => {
  const name = event.target.dataset.run;
  if (event.key === " " && name) {
    event.preventDefault();
    setMarked([name], !view.marked.has(name));
  } else {
    move(event);
  }
});
list.addEventListener("keyup", (event) => event.key === " " && event.target.dataset.run && event.preventDefault());
list.addEventListener("focusin", (event) => event.target.matches("button, summary") && rove(event.target));
list.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button) open(button.dataset.run);
});
$(".search").addEventListener("input", (event) => {
  view.words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
  render();
});
$(".search").addEventListener("keydown", (event) => event.key === "ArrowDown" && move(event));
$(".sort").addEventListener("change", (event) => { view.sort = event.target.value; render(); list.scrollTop = 0; });
$(".states").addEventListener("change", (event) => { view.state = event.target.value; render(); });
$(".see").addEventListener("click", () => document.getElementById("compare")?.scrollIntoView({ behavior: "smooth", block: "start" }));
$(".marked").addEventListener("change", () => setMarked([...view.marked], false));
window.addEventListener("popstate", () => {
  const name = new URL(window.location).searchParams.get("run");
  if (element.offsetParent !== null && name !== view.chosen && runs.has(name)) trigger("select", { name });
});
setInterval(() => element.offsetParent !== null && runs.forEach((run, name) => writeWhen(run, items.get(name))), 15_000);
watch("value", () => receive(props.value));
receive(props.value);
