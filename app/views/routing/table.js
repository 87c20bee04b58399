// The same numbers as tables: the heatmap, and every token's means over the layers.
function showTables(on) {
  view.table = on;
  $(".as-table").setAttribute("aria-pressed", String(on));
  $(".tables").hidden = !on;
  all(".pictures").forEach((part) => (part.hidden = on));
  $(".tokens tbody").replaceChildren();
  repaint();
}

function tableRow(values, kind = "td") {
  const scope = (place) => (kind === "th" ? "col" : place ? "" : "row");
  return make("tr", {}, ...values.map((value, place) => make(place ? kind : "th", { scope: scope(place) }, String(value))));
}

function paintTables(data) {
  if (data) paintCells(data);
  paintTokens();
}

function paintCells(data) {
  const { layers, experts, counts, diverging } = data;
  const value = (layer, e) => (e >= counts[layer] ? "–" : diverging ? signed(data.weight(layer, e)) : data.weight(layer, e).toFixed(3));
  const rows = Array.from({ length: layers }, (_, layer) => [
    `Layer ${layer + 1}`,
    ...Array.from({ length: experts }, (_, e) => value(layer, e)),
    ...(data.bare ? [] : [data.entropy(layer).toFixed(2), number(data.active(layer), 1)]),
  ]);
  put(".cells caption", `${heatTitle()}; even: ${evenText()}. ${isWhole() ? "" : tokenName(shownToken())}`);
  const names = Array.from({ length: experts }, (_, e) => `Expert ${e + 1}`);
  $(".cells thead").replaceChildren(tableRow(["", ...names, ...(data.bare ? [] : ["Entropy", "Active"])], "th"));
  $(".cells tbody").replaceChildren(...rows.map((row) => tableRow(row)));
}

function paintTokens() {
  const { prompt, limit } = view.meta;
  const body = $(".tokens tbody");
  const { router } = view;
  if (router && !router.gone && router.rows.length < view.tokens.length) return;
  const ofRouter = router ? [`Strongest expert of layer ${router.layer + 1}, ${router.name}`] : [];
  if (!body.childElementCount) $(".tokens thead").replaceChildren(tableRow(["Number", "Token", ...ofRouter, "Weight of the strongest", "Entropy", "Active", ...(limit ? ["τ"] : [])], "th"));
  $(".tokens thead tr").children[1].className = "text";
  for (let i = body.childElementCount; i < replyLength(); i++) {
    const means = view.means[prompt + i];
    const strongest = router ? [tokenColour(prompt + i).words] : [];
    const row = tableRow([i + 1, view.tokens[prompt + i], ...strongest, means.strongest.toFixed(3), means.entropy.toFixed(3), number(means.active, 1), ...(limit ? [means.threshold.toFixed(3)] : [])]);
    row.children[1].className = "text";
    row.dataset.index = prompt + i;
    body.append(row);
  }
  const row = body.children[shownToken() - prompt];
  if (row === view.row) return;
  if (view.row) view.row.removeAttribute("aria-current");
  view.row = row;
  if (row) row.setAttribute("aria-current", "true");
}
