// An opened layer: its projections × experts in the chosen scope. Choosing a projection shows it in the heatmap above.
function openLayer(layer) {
  view.open = Math.max(0, Math.min(layer, view.meta.layers - 1));
  repaint();
}

function closeLayer() {
  Object.assign(view, { open: null, projection: null, drawn: "" });
  $(".layer").hidden = true;
  $(".layer tbody").replaceChildren();
}

function chooseProjection(name) {
  view.projection = view.projection === name ? null : name;
  repaint();
}

function paintLayer() {
  if (view.open === null) return;
  const found = projectionWeights(isWhole() ? null : shownToken(), view.meta.id);
  $(".layer").hidden = false;
  $(".layer .all").hidden = !view.projection;
  put(".layer-title", `Layer ${view.open + 1}: ${isWhole() ? "whole reply" : tokenName(shownToken())}`);
  if (found === null) put(".layer-title", `Layer ${view.open + 1}: the projections of this reply are no longer kept`);
  if (!found) return;
  const names = [...found.rows.keys()].filter((name) => found.rows.get(name)[view.open] !== undefined);
  buildLayer(names, view.meta.counts[view.open]);
  names.forEach((name, row) => {
    const seen = scopedWeights(name);
    const [head, ...cells] = $(".layer tbody").children[row].children;
    head.firstChild.setAttribute("aria-pressed", String(name === view.projection));
    if (seen) cells.forEach((_, expert) => scaleEnd(`layer ${seen.diverging}`, Math.abs(seen.at(view.open, expert)), seen.diverging));
    if (seen) cells.forEach((cell, expert) => fillCell(cell, seen.at(view.open, expert), seen.diverging, expert));
  });
}

function buildLayer(names, experts) {
  const built = `${view.open} ${names} ${experts}`;
  if (view.drawn === built) return;
  view.drawn = built;
  const heading = (text, scope) => make("th", { scope }, text);
  const opener = (name) => {
    const button = make("button", { type: "button", title: `Show ${name} in every layer` }, name);
    button.dataset.projection = name;
    return button;
  };
  const numbers = Array.from({ length: experts }, (_, e) => heading(String(e + 1), "col"));
  $(".layer thead").replaceChildren(make("tr", {}, heading("Expert", "col"), ...numbers));
  $(".layer tbody").replaceChildren(...names.map((name) => make("tr", {}, heading(opener(name), "row"), ...numbers.map(() => make("td")))));
  $(".layer table").classList.toggle("narrow", ($(".layer").clientWidth - 116) / experts < 32);
}

function fillCell(cell, value, diverging, expert) {
  const top = scaleEnd(`layer ${diverging}`, Math.abs(value), diverging);
  const fill = diverging ? divergingColour(value / top, isDark()) : heat(value / top, isDark());
  const text = diverging ? fixed(value) : value.toFixed(2);
  if (cell.textContent !== text) cell.textContent = text;
  cell.title = `Expert ${expert + 1}: ${diverging ? signed(value) : number(value, 3)} (even: ${number(view.even[view.open], 3)})`;
  cell.dataset.value = value;
  cell.style.background = css(fill);
  cell.style.color = ink(fill);
}
