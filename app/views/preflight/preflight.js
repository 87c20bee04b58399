// Memory and time of a run. Value: {estimate, measurement, state}, each null or as `mole.preflight.job` writes it.
const COLOURS = { "base model": "#0072b2", "experts and optimizer": "#e69f00", activations: "#009e73", logits: "#cc79a7", libraries: "#8a8a8a" };
const FITS = { yes: "Fits", tight: "Borderline", no: "Does not fit", unknown: "Unknown" };
const FINAL = ["done", "busy", "cancelled", "no_memory", "failed"];

function count(value) {
  return value >= 1e9 ? `${(value / 1e9).toFixed(2)} B` : value >= 1e6 ? `${(value / 1e6).toFixed(1)} M` : grouped(value);
}

function receive(value) {
  const { estimate = null, measurement = null, state = null } = value || {};
  progress(state);
  $(".hint").hidden = Boolean(estimate || measurement || (state && state.phase));
  $(".result").hidden = !estimate && !measurement;
  element.dataset.phase = (state && state.phase) || "";
  if (estimate) draw(estimate, measurement, state);
  measured(measurement);
}

function progress(state) {
  const going = Boolean(state && state.phase && !FINAL.includes(state.phase));
  $(".going").hidden = !going;
  if (going) {
    $(".doing").textContent = `${state.kind === "measurement" ? "Measuring: " : ""}${state.text}`;
    $(".track").setAttribute("aria-valuenow", Math.round(100 * state.share));
    $(".track i").style.width = `${100 * state.share}%`;
  }
  const words = {
    failed: state && state.text,
    no_memory: state && `Measured: it does not fit. ${state.text}`,
    busy: state && `${state.text} Measuring now would slow both down.`,
  };
  const text = (state && words[state.phase]) || "";
  $(".trouble").hidden = !text;
  $(".trouble").textContent = text;
}

function draw(estimate, measurement, state) {
  const outgrown = Boolean(state && state.phase === "no_memory");
  const fits = measurement ? verdictOf(measurement, estimate) : outgrown ? "no" : estimate.fits;
  $(".chip").textContent = FITS[fits];
  $(".chip").dataset.fits = fits;
  $(".verdict span").textContent = sentence(fits, estimate, measurement);
  bar(estimate);
  const share = (100 * estimate.trainable_parameters) / estimate.total_parameters;
  tiles($(".result > .tiles"), [
    ["Trainable parameters", grouped(estimate.trainable_parameters), `${share.toPrecision(3)} % of ${count(estimate.total_parameters)}`],
    ["Optimizer steps", grouped(estimate.total_steps), passes(estimate.epochs, estimate.rows)],
    ["Time, roughly", estimate.seconds ? durationText(estimate.seconds) : "–", estimate.seconds ? `${durationText(estimate.seconds_per_step)} a step` : "measure to know"],
    ["Longest row", `${estimate.longest} tokens`, `mean ${Math.round(estimate.typical)}`],
  ]);
  suggest(estimate.ways ?? [], fits); // an estimate of an earlier version has none
  $(".notes").replaceChildren(...estimate.notes.map((note) => make("li", {}, note)));
}

function passes(epochs, rows) {
  const number = Number(epochs.toPrecision(2));
  return `${number} ${number === 1 ? "pass" : "passes"} over ${grouped(rows)} rows`;
}

function verdictOf(measurement, estimate) {
  if (!estimate.available) return "unknown";
  return measurement.peak > estimate.available ? "no" : measurement.peak > 0.9 * estimate.available ? "tight" : "yes";
}

function sentence(fits, estimate, measurement) {
  const where = `on ${estimate.device} in ${estimate.dtype}`;
  const free = estimate.available ? ` of ${bytesText(estimate.available)} free` : "";
  const peak = measurement ? `Measured: ${bytesText(measurement.peak)}${free} ${where}.` : estimate.peak ? `About ${bytesText(estimate.peak)}${free} ${where}; an estimate.` : "";
  const more = { no: " You can still start the run; most likely it runs out of memory.", tight: " Measure it to be sure." };
  return peak + (measurement && fits === "tight" ? "" : more[fits] || "");
}

function bar(estimate) {
  const parts = Object.entries(estimate.memory);
  $(".memory").hidden = !parts.length;
  const whole = Math.max(estimate.peak, estimate.available || 0);
  $(".stack").replaceChildren(
    ...parts.map(([name, size]) => {
      const piece = make("i", { title: `${name}: ${bytesText(size)}` });
      piece.style.width = `${(100 * size) / whole}%`;
      piece.style.background = COLOURS[name];
      return piece;
    }),
  );
  const items = parts.map(([name, size]) => legend(name, bytesText(size), (mark) => (mark.style.background = COLOURS[name])));
  if (estimate.available) {
    const limit = make("b"), short = estimate.peak > estimate.available;
    limit.style.left = `${(100 * estimate.available) / whole}%`;
    if (short) $(".stack").append(limit);
    items.push(legend(short ? "free now (line)" : "free now (bar)", bytesText(estimate.available), (mark) => (mark.className = short ? "line" : "whole")));
  }
  $(".parts").replaceChildren(...items);
  $(".stack").setAttribute("aria-label", `Estimated memory: ${parts.map(([name, size]) => `${name} ${bytesText(size)}`).join(", ")}.`);
}

function legend(name, size, paint) {
  const item = make("li"), mark = make("i");
  paint(mark);
  item.append(mark, make("span", {}, name), make("span", {}, size));
  return item;
}

function tiles(list, rows) {
  list.replaceChildren(
    ...rows.map(([name, value, more]) => {
      const tile = make("div", {}, make("dt", {}, name), make("dd", {}, value));
      if (more) tile.append(make("small", {}, more));
      return tile;
    }),
  );
}

function measured(values) {
  $(".measured").hidden = !values;
  if (!values) return;
  tiles($(".measured .tiles"), [
    ["Peak memory", bytesText(values.peak), `${values.device}, ${values.dtype}`],
    ["Step, longest rows", durationText(values.longest_seconds), `${values.longest} tokens a row`],
    ["Step, random rows", durationText(values.typical_seconds), `${grouped(Math.round(values.tokens_per_second))} tokens/s`],
    ["The whole run", durationText(values.seconds), `${grouped(values.total_steps)} steps`],
  ]);
}

function suggest(suggestions, fits) {
  $(".suggestions").hidden = !suggestions.length || fits === "yes";
  $(".suggestions ul").replaceChildren(
    ...suggestions.map((change, at) => {
      const chip = make("b", { className: "chip" }, FITS[change.fits]);
      chip.dataset.fits = change.fits;
      const part = (className, text) => make("span", { className }, text);
      const button = make("button", { type: "button" }, part("label", change.label), part("size", bytesText(change.peak)), chip, part("effect", change.effect));
      button.addEventListener("click", () => trigger("select", { at }));
      return make("li", {}, button);
    }),
  );
}

watch("value", () => receive(props.value));
receive(props.value);
