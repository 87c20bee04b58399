// A run's jobs of a kind, newest first. Value: a list of `RecordedJob.status()`. Event: `select` {number} cancels one.
const body = $("tbody");
const noun = props.noun;
const SCORES = { accuracy: "accuracy", exact_match: "exact match" };

function line(item) {
  const alive = item.state === "running" || item.state === "queued";
  const data = make("td", { className: "data", title: `${item.data}, sha256 ${item.sha256}` }, item.data ? item.data.split("/").pop() : "");
  if (item.limit) data.append(make("small", {}, `the first ${item.limit}`));
  const rows = item.rows || (alive && item.total && noun === "evaluation" ? `${item.done} / ${item.total}` : "");
  const row = make("tr", {}, data, make("td", {}, item.checkpoint || ""), make("td", {}, String(rows)), result(item, alive), make("td", {}, when(item)));
  row.dataset.state = item.state;
  return row;
}

function result(item, alive) {
  const cell = make("td", { className: "result" });
  if (alive) cell.append(...progress(item));
  else if (item.state === "failed") cell.append(make("span", { className: "failed" }, item.error || "failed"));
  else if (item.state === "finished") cell.append(...(noun === "atlas" ? counted(item) : metrics(item.metrics)));
  else cell.append(item.state);
  return cell;
}

function progress(item) {
  const done = make("i"), bar = make("span", { className: "bar" }, done), cancel = make("button", { type: "button" }, "Cancel");
  done.style.width = `${item.total ? (100 * item.done) / item.total : 0}%`;
  bar.setAttribute("role", "progressbar");
  bar.setAttribute("aria-label", item.what || "Rows read");
  bar.setAttribute("aria-valuemax", item.total || 1);
  bar.setAttribute("aria-valuenow", item.done || 0);
  cancel.setAttribute("aria-label", `Cancel the ${noun} on ${item.data}`);
  cancel.addEventListener("click", () => { cancel.disabled = true; trigger("select", { number: item.number }); });
  const doing = noun === "atlas" ? `${item.what || "Reading"}: ${item.done} of ${item.total}` : "Evaluating";
  return [item.total ? doing : item.note || "Starting …", bar, cancel];
}

function metrics(values) {
  const scores = Object.entries(SCORES).filter(([key]) => key in values);
  const perplexity = `perplexity ${number(values.perplexity, 3)}`;
  if (!scores.length) return [make("b", {}, perplexity)];
  const score = ([key, name]) => make("span", {}, make("b", {}, `${(100 * values[key]).toFixed(1)} %`), ` ${name}`);
  return [...scores.map(score), make("small", {}, perplexity)];
}

function counted(item) {
  const by = (item.by || []).map(String).join(", ");
  return [make("b", {}, plural(item.tokens || 0, "token")), make("small", {}, [by && `by ${by}`, item.quick && "quick"].filter(Boolean).join(" · "))];
}

function when(item) {
  const date = new Date(item.date);
  const today = date.toDateString() === new Date().toDateString();
  return today ? date.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" }) : date.toLocaleDateString();
}

function receive(value) {
  const items = value || [];
  const focused = body.contains(document.activeElement);
  body.replaceChildren(...items.map(line));
  $("table").hidden = items.length === 0;
  if (focused) body.querySelector("button")?.focus();
}

$(".jobs").setAttribute("aria-label", `${noun === "atlas" ? "Atlases" : "Evaluations"} of this run`);
watch("value", () => receive(props.value));
receive(props.value);
