// What trains and waits. Value: {rows: [{name, state, device, place, last, step, total_steps, group}], locked}, in order.
// Events: `select` {name} shows a run; `apply` {name, action} with the action "up", "down" or "cancel".
const list = $("ol");
let pressed = null; // the run whose button was pressed last, to say what became of it

function about(row) {
  const steps = row.total_steps ? `step ${row.step} of ${row.total_steps}` : row.step ? `step ${row.step}` : "";
  const where = row.state === "running" ? `trains on ${row.device}` : `waits for ${row.device}`;
  return [where, row.state === "running" || row.step ? steps : "", row.group && `group ${row.group}`].filter(Boolean).join(" · ");
}

function control(action, text, label, disabled = false) {
  const button = make("button", { type: "button", title: label, disabled }, text);
  button.dataset.action = action;
  button.setAttribute("aria-label", label);
  return button;
}

function controls(row) {
  if (row.state !== "queued") return [control("cancel", "Stop", `Save ${row.name} and stop it`)];
  return [
    control("up", "↑", `Move ${row.name} up`, row.place === 1),
    control("down", "↓", `Move ${row.name} down`, row.last),
    control("cancel", "Cancel", `Take ${row.name} out of the queue`),
  ];
}

function item(row, locked) {
  const name = make("button", { type: "button", className: "run", title: `Show ${row.name}` }, row.name);
  name.dataset.action = "show";
  const place = make("span", { className: "place" }, row.state === "running" ? "●" : String(row.place));
  place.setAttribute("aria-hidden", "true");
  const words = make("div", {}, name, make("span", { className: "about" }, about(row)));
  const entry = make("li", {}, place, words, make("div", { className: "does" }, ...(locked ? [] : controls(row))));
  entry.dataset.run = row.name;
  entry.dataset.state = row.state;
  return entry;
}

// The list is built again each time. The keyboard focus stays where it was; if that button is disabled now, it moves to
// another button of the same run.
function receive(value) {
  if (!value) return;
  const focused = list.contains(document.activeElement) ? document.activeElement : null;
  const at = focused && { run: focused.closest("li").dataset.run, action: focused.dataset.action };
  list.replaceChildren(...value.rows.map((row) => item(row, value.locked)));
  announce(value.rows);
  if (!at) return;
  const row = [...list.children].find((entry) => entry.dataset.run === at.run);
  const buttons = row ? [...row.querySelectorAll("button:enabled")] : [];
  (buttons.find((button) => button.dataset.action === at.action) || buttons[0] || list.querySelector("button:enabled"))?.focus();
}

function announce(rows) {
  if (!pressed) return;
  const row = rows.find((entry) => entry.name === pressed);
  $(".said").textContent = row ? `${row.name}: ${row.state === "queued" ? `place ${row.place}` : row.state}` : `${pressed} left the queue`;
  pressed = null;
}

list.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  const name = button.closest("li").dataset.run;
  if (button.dataset.action === "show") return trigger("select", { name });
  pressed = name;
  trigger("apply", { name, action: button.dataset.action });
});
watch("value", () => receive(props.value));
receive(props.value);
