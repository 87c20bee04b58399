// What trains and waits. Value: {rows: [{name, state, device, place, last, step, total_steps, group}], locked}, in order;
// a name is shown with the event `select` {name}, a button asks with `apply` {name, action: "up" | "down" | "cancel"}.
const list = element.querySelector("ol");
const said = element.querySelector(".said");
let pressed = null;

function made(tag, text, name) {
  const item = document.createElement(tag);
  item.textContent = text;
  if (name) item.className = name;
  if (tag === "button") item.type = "button";
  return item;
}

function about(row) {
  const steps = row.total_steps ? `step ${row.step} of ${row.total_steps}` : row.step ? `step ${row.step}` : "";
  const where = row.state === "running" ? `trains on ${row.device}` : `waits for ${row.device}`;
  return [where, row.state === "running" || row.step ? steps : "", row.group && `group ${row.group}`].filter(Boolean).join(" · ");
}

function control(row, action, text, label, disabled) {
  const button = made("button", text);
  button.dataset.action = action;
  button.setAttribute("aria-label", label);
  button.title = label;
  button.disabled = Boolean(disabled);
  return button;
}

function item(row, locked) {
  const entry = made("li", "");
  entry.dataset.run = row.name;
  entry.dataset.state = row.state;
  const name = made("button", row.name, "run");
  name.dataset.action = "show";
  name.title = `Show ${row.name}`;
  const words = made("div", "");
  words.append(name, made("span", about(row), "about"));
  const does = made("div", "", "does");
  if (!locked && row.state === "queued") {
    does.append(control(row, "up", "↑", `Move ${row.name} up`, row.place === 1));
    does.append(control(row, "down", "↓", `Move ${row.name} down`, row.last));
    does.append(control(row, "cancel", "Cancel", `Take ${row.name} out of the queue`));
  } else if (!locked) {
    does.append(control(row, "cancel", "Stop", `Save ${row.name} and stop it`));
  }
  const place = made("span", row.state === "running" ? "●" : String(row.place), "place");
  place.setAttribute("aria-hidden", "true");
  entry.append(place, words, does);
  return entry;
}

// The list is made anew each time; the keyboard stays where it was, or on the run's other button at an end of the line.
function receive(value) {
  if (!value) return;
  const focused = list.contains(document.activeElement) ? document.activeElement : null;
  const at = focused && { run: focused.closest("li").dataset.run, action: focused.dataset.action };
  list.replaceChildren(...value.rows.map((row) => item(row, value.locked)));
  tell(value.rows);
  if (!at) return;
  const row = [...list.children].find((entry) => entry.dataset.run === at.run);
  const buttons = row ? [...row.querySelectorAll("button:enabled")] : [];
  (buttons.find((button) => button.dataset.action === at.action) || buttons[0] || list.querySelector("button:enabled"))?.focus();
}

function tell(rows) {
  if (!pressed) return;
  const row = rows.find((entry) => entry.name === pressed);
  said.textContent = row ? `${row.name}: ${row.state === "queued" ? `place ${row.place}` : row.state}` : `${pressed} left the queue`;
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
