// The list of runs: one button a run; a click tells its name to the page. Value: {runs: [status], chosen: name}.
const list = element.querySelector("ul");

function row(run, chosen) {
  const made = document.createElement("button");
  const [name, state, about, when, bar, done] = ["b", "span", "span", "span", "span", "i"].map((tag) => document.createElement(tag));
  made.type = "button";
  made.dataset.run = run.name;
  made.setAttribute("aria-current", String(run.name === chosen));
  name.textContent = run.name;
  state.textContent = run.state;
  state.className = "state";
  state.dataset.state = run.state;
  about.textContent = `${run.router} · ${run.model}`;
  when.className = "when";
  when.textContent = `${run.total_steps ? `${run.step} / ${run.total_steps} · ` : ""}${age(run.created)}`;
  made.append(name, state, about, when);
  if (run.state === "running" || run.state === "queued") {
    bar.className = "bar";
    done.style.width = `${run.total_steps ? (100 * run.step) / run.total_steps : 0}%`;
    bar.append(done);
    made.append(bar);
  }
  const item = document.createElement("li");
  item.append(made);
  return item;
}

function age(created) {
  const seconds = Date.now() / 1000 - created;
  if (seconds < 60) return "just now";
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ago`;
  if (seconds < 86400) return `${Math.floor(seconds / 3600)} h ago`;
  return new Date(created * 1000).toLocaleDateString();
}

function receive(value) {
  if (!value) return;
  const focused = list.contains(document.activeElement) ? document.activeElement.dataset.run : null;
  list.replaceChildren(...value.runs.map((run) => row(run, value.chosen)));
  element.querySelector(".empty").hidden = value.runs.length > 0;
  if (focused) [...list.querySelectorAll("button")].find((b) => b.dataset.run === focused)?.focus();
}

list.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button) trigger("select", { name: button.dataset.run });
});
watch("value", () => receive(props.value));
receive(props.value);
