// Routing overrides of the next reply. Value: {fields: [{name, label, help, kind, min, max, step, trained, words}],
// experts, settings, muted, pinned}; the last three are what the person chose, experts counted from 0.
const NEXT = { "": "muted", muted: "pinned", pinned: "" };
const STATE_WORDS = { "": "as trained", muted: "muted", pinned: "pinned" };
const settings = $(".settings");
const chips = $(".chips");
let value = null;
let built = "";

function rounded(amount) {
  return String(Math.round(amount * 1000) / 1000);
}

// Only settings that differ from the trained ones are sent; one that is moved back is no change.
function change(changes) {
  value = { ...value, ...changes };
  props.value = value;
  show();
}

function set(field, chosen) {
  const kept = { ...value.settings };
  if (chosen === field.trained) delete kept[field.name];
  else kept[field.name] = chosen;
  change({ settings: kept });
}

function slider(field) {
  const input = make("input", { type: "range", min: field.min, max: field.max, step: field.step });
  const id = `steer-${field.name}`;
  input.id = id;
  input.setAttribute("aria-describedby", `${id}-help`);
  const tick = make("i");
  const share = (field.trained - field.min) / (field.max - field.min);
  tick.style.left = `calc(8px + ${share} * (100% - 16px))`;
  tick.title = `Trained with ${field.words}`;
  input.addEventListener("input", () => {
    // The trained value may lie between two steps: near it, exactly that value is taken.
    const near = Math.abs(input.valueAsNumber - field.trained) <= field.step * 0.6;
    set(field, near ? field.trained : input.valueAsNumber);
  });
  return make("div", { className: "setting" },
    make("label", { htmlFor: id }, make("span", { textContent: field.label }), make("output")),
    make("div", { className: "track" }, tick, input),
    make("small", { id: `${id}-help`, textContent: field.help }));
}

function checkbox(field) {
  const input = make("input", { type: "checkbox", id: `steer-${field.name}` });
  input.addEventListener("change", () => set(field, input.checked));
  return make("div", { className: "setting" },
    make("label", { className: "check" }, input, make("span", { textContent: field.label }), make("output")),
    make("small", { textContent: field.help }));
}

function chip(expert) {
  const [r, g, b] = hue(expert);
  const colour = make("i");
  colour.style.background = `rgb(${r},${g},${b})`;
  const made = make("button", { type: "button", className: "chip" }, colour, make("span", { textContent: expert + 1 }), make("b"));
  made.addEventListener("click", () => {
    const state = NEXT[stateOf(expert)];
    const without = (list) => list.filter((other) => other !== expert);
    const lists = { muted: without(value.muted), pinned: without(value.pinned) };
    if (state) lists[state] = [...lists[state], expert].sort((a, c) => a - c);
    change(lists);
  });
  return made;
}

function stateOf(expert) {
  return value.muted.includes(expert) ? "muted" : value.pinned.includes(expert) ? "pinned" : "";
}

function build() {
  const shape = JSON.stringify([value.fields, value.experts]);
  if (shape === built) return;
  built = shape;
  settings.replaceChildren(...value.fields.map((field) => (field.kind === "bool" ? checkbox(field) : slider(field))));
  chips.replaceChildren(...Array.from({ length: value.experts }, (_, expert) => chip(expert)));
}

function show() {
  value.fields.forEach((field, place) => {
    const box = settings.children[place];
    const input = box.querySelector("input");
    const changed = field.name in value.settings;
    const now = changed ? value.settings[field.name] : field.trained;
    if (field.kind === "bool") input.checked = now;
    else input.value = now;
    const words = field.kind === "bool" ? (now ? "on" : "off") : rounded(now);
    box.classList.toggle("changed", changed);
    box.querySelector("output").textContent = changed ? `${words} (trained ${field.words})` : `${field.words}, as trained`;
  });
  [...chips.children].forEach((made, expert) => {
    const state = stateOf(expert);
    made.dataset.state = state;
    made.querySelector("b").textContent = state;
    made.setAttribute("aria-label", `Expert ${expert + 1}: ${STATE_WORDS[state]}`);
    made.title = made.getAttribute("aria-label");
  });
  const count = Object.keys(value.settings).length + value.muted.length + value.pinned.length;
  const left = value.experts - value.muted.length;
  $(".said").textContent = left === 0 && value.experts
    ? "All experts are muted: only the base model is used."
    : count ? `${count} change${count > 1 ? "s" : ""} for the next reply.` : "";
  $(".reset").disabled = !count;
}

function receive(given) {
  value = given && given.fields ? { settings: {}, muted: [], pinned: [], ...given } : null;
  $(".steering").hidden = !value;
  if (!value) return;
  build();
  show();
}

$(".reset").addEventListener("click", () => change({ settings: {}, muted: [], pinned: [] }));
watch("value", () => { if (props.value !== value) receive(props.value); });
receive(props.value);
