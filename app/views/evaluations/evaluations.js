// A run's evaluations, newest first. Value: a list of `Evaluation.status()`. Event: `select` {number} cancels one.
const body = $("tbody");
const SCORES = { accuracy: "accuracy", exact_match: "exact match" };

function line(item) {
  const alive = item.state === "running" || item.state === "queued";
  const data = make("td", { className: "data", title: `${item.data}, sha256 ${item.sha256}` }, item.data ? item.data.split("/").pop() : "");
  if (item.limit) data.append(make("small", {}, `the first ${item.limit}`));
  const rows = item.rows || (alive && item.total ? `${item.done} / ${item.total}` : "");
  const row = make("tr", {}, data, make("td", {}, item.checkpoint || ""), make("td", {}, String(rows)), result(item, alive), make("td", {}, when(item)));
  row.dataset.state = item.state;
  return row;
}

function result(item, alive) {
  const cell = make("td", { className: "result" });
  if (alive) cell.append(...progress(item));
  else if (item.state === "failed") cell.append(make("span", { className: "failed" }, item.error || "failed"));
  else if (item.state === "finished") cell.append(...metrics(item.metrics));
  else cell.append(item.state);
  return cell;
}

function progress(item) {
  const done = make("i"), bar = make("span", { className: "bar" }, done), cancel = make("button", { type: "button" }, "Cancel");
  done.style.width = `${item.total ? (100 * item.done) / item.total : 0}%`;
  bar.setAttribute("role", "progressbar");
  bar.setAttribute("aria-label", "Rows evaluated");
  bar.setAttribute("aria-valuemax", item.total || 1);
  bar.setAttribute("aria-valuenow", item.done || 0);
  cancel.setAttribute("aria-label", `Cancel the evaluation on ${item.data}`);
  cancel.addEventListener("click", () => { cancel.disabled = true; trigger("select", { number: item.number }); });
  return [item.total ? "Evaluating" : item.note || "Starting …", bar, cancel];
}

function metrics(values) {
  const scores = Object.entries(SCORES).filter(([key]) => key in values);
  const perplexity = `perplexity ${number(values.perplexity, 3)}`;
  if (!scores.length) return [make("b", {}, perplexity)];
  const score = ([key, name]) => make("span", {}, make("b", {}, `${(100 * values[key]).toFixed(1)} %`), ` ${name}`);
  return [...scores.map(score), make("small", {}, perplexity)];
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

watch("value", () => receive(props.value));
receive(props.value);
