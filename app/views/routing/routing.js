const repaint = painter(element, paint);

function begin(meta) {
  const routed = meta.experts > 0;
  $(".strip").replaceChildren();
  showPrompt(false);
  closeLayer();
  setScope(view.scope);
  $('[data-scope="earlier"]').hidden = true;
  $(".views").hidden = !routed;
  $(".as-table").hidden = !routed;
  $(".empty").hidden = routed;
  put(".empty", meta.note || "");
  put(".about", meta.about || "");
  put(".said", "");
  view.chip = null;
  offerRouters();
}

// The reply is complete: announced once to screen readers.
function finish() {
  if (view.announced || !view.meta.experts || !view.tokens.length) return;
  view.announced = true;
  if (replyLength() < 1) showPrompt(true);
  else announce(`Reply of ${replyLength()} tokens. ${meansText(replyMeans())}`);
}

function announce(text) {
  put(".said", text);
}

// ---- Tokens

// Adds the new tokens. Called once per frame, so that the browser lays out the strip once for any number of updates.
function addChips() {
  const strip = $(".strip");
  const from = strip.childElementCount;
  if (from === view.tokens.length) return;
  const fragment = document.createDocumentFragment();
  for (let index = from; index < view.tokens.length; index++) fragment.append(chip(index));
  strip.append(fragment);
  if (view.follow && view.atEnd) strip.scrollTop = strip.scrollHeight;
  $(".prompt").hidden = !view.meta.prompt;
  put(".prompt", `Prompt (${view.meta.prompt} tokens)`);
}

function chip(index) {
  const text = view.tokens[index].replace(/\n/g, "⏎\n").replace(/\t/g, "⇥") || "∅";
  const made = make("span", { id: `${uid}-${index}` }, text);
  made.dataset.index = index;
  made.setAttribute("role", "option");
  made.setAttribute("aria-selected", "false");
  if (index < view.meta.prompt) made.className = "from-prompt";
  colour(made, index);
  return made;
}

function colour(made, index) {
  const { fill, words, again } = tokenColour(index);
  made.title = words;
  made.classList.toggle("again", Boolean(again));
  if (index < view.meta.prompt) {
    made.style.borderBottom = `3px solid ${css(fill)}`;
    return;
  }
  made.style.background = css(fill);
  made.style.color = ink(fill);
}

function paintChosen() {
  const made = $(".strip").children[shownToken()];
  if (made === view.chip) return;
  if (view.chip) view.chip.setAttribute("aria-selected", "false");
  view.chip = made;
  if (!made) return;
  made.setAttribute("aria-selected", "true");
  $(".strip").setAttribute("aria-activedescendant", made.id);
}

// Underlines the tokens in which the marked expert had more than its even share.
function paintUse() {
  const { layers, experts } = view.meta;
  const cell = view.mark && view.mark.expert < experts && view.mark.layer < layers ? view.mark : null;
  const key = cell && `${cell.layer} ${cell.expert} ${view.tokens.length}`;
  if (key === view.used) return;
  view.used = key;
  const chips = $(".strip").children;
  for (let index = 0; index < chips.length; index++) {
    const share = cell ? view.weights[index][cell.layer * experts + cell.expert] / 255 : 0;
    chips[index].classList.toggle("uses", Boolean(cell) && share > view.even[cell.layer] + 1 / 510);
  }
}

// ---- Heatmap

function heatData() {
  const { layers, experts, counts, muted } = view.meta;
  const scope = scopedWeights(view.projection);
  if (!scope) return null;
  const size = layers * experts;
  const whole = isWhole();
  const index = shownToken();
  const entropy = whole ? view.mean.subarray(size, size + layers) : view.entropy[index];
  const active = whole ? view.mean.subarray(size + layers) : view.active[index];
  return {
    layers, experts, counts, muted, whole, open: view.open, even: view.even, bare: Boolean(view.projection),
    weight: scope.at, diverging: scope.diverging, top: scaleTop(scope),
    entropy: (layer) => entropy[layer] / 255,
    active: (layer) => (active[layer] / 255) * experts,
  };
}

// The top of the scale only grows during a reply, in a few steps, so that colours stay comparable.
function scaleTop({ at, diverging }) {
  const { layers, experts } = view.meta;
  let largest = 0;
  for (let layer = 0; layer < layers; layer++) for (let e = 0; e < experts; e++) largest = Math.max(largest, Math.abs(at(layer, e)));
  return scaleEnd(`${diverging} ${view.projection}`, largest, diverging);
}

function scaleEnd(kind, value, diverging) {
  const largest = (view.tops[kind] = Math.max(view.tops[kind] || 0, value));
  return diverging ? [0.05, 0.1, 0.25, 0.5].find((end) => largest <= end + 1e-6) || 1 : ceiling(largest, Math.max(...view.meta.counts));
}

function heatTitle() {
  const { layers, experts } = view.meta;
  const what = { reply: "mean over the reply", difference: "difference from the reply’s mean", earlier: `difference from ${earlierName()}` };
  const scope = view.scope === "reply" && view.hovered >= 0 ? "token" : view.scope;
  return `${experts} experts × ${layers} layers${view.projection ? `, ${view.projection}` : ", mean of projections"}${what[scope] ? `: ${what[scope]}` : ""}`;
}

function evenText() {
  const values = [...new Set(view.even.map((value) => number(value, 3)))];
  return values.length > 1 ? `${values[values.length - 1]} to ${values[0]}` : values[0];
}

// ---- Texts

function tokenName(index) {
  const { prompt } = view.meta;
  return `${index < prompt ? "Prompt token" : "Token"} ${position(index)} “${view.tokens[index].trim() || "␣"}”`;
}

function position(index) {
  const { prompt } = view.meta;
  return index < prompt ? index + 1 : index - prompt + 1;
}

function meansText(means) {
  const { counts, threshold, limit } = view.meta;
  const full = counts.reduce((sum, count) => sum + count, 0) / counts.length;
  const sure = `entropy ${number(means.entropy)}${hasThreshold() ? ` (threshold ${number(threshold)})` : ""}`;
  const tau = limit ? `; τ ${number(means.threshold, 3)} (at most ${number(limit, 3)})` : "";
  return `Weight of the strongest expert, mean over the layers: ${number(means.strongest, 3)} (even: ${evenText()}); ${sure}; ${number(means.active, 1)} of ${number(full, 1)} experts active${tau}.`;
}

function hasThreshold() {
  const { threshold } = view.meta;
  return threshold !== null && threshold !== undefined && threshold < 1;
}

function paintWords() {
  const whole = isWhole();
  const means = whole ? replyMeans() : view.means[shownToken()];
  const name = whole ? `Whole reply, ${replyLength()} tokens` : tokenName(shownToken());
  put(".summary", `${name}. ${meansText(means)}`);
  put(".heat-title", compact ? "" : heatTitle());
  if (compact) return;
  paintSimilar();
  paintKey(whole);
}

// The legend: of the map in one line; of a chosen router, its experts and their weights.
function paintKey(whole) {
  const { router, meta } = view;
  const words = router ? `hue: the strongest expert of layer ${router.layer + 1}, ${router.name}${router.gone ? ": no longer kept" : ""}; fainter: higher entropy` : view.hues.some((place) => place.length) ? MAP_KEY : MAPLESS_KEY;
  put(".key-text", words);
  $(".key i").hidden = Boolean(router);
  const key = $(".experts");
  key.hidden = !router;
  if (!router) return;
  const experts = meta.counts[router.layer];
  if (key.childElementCount !== experts) key.replaceChildren(...Array.from({ length: experts }, expertKey));
  const shares = routerMeans(whole ? null : shownToken()).slice(0, experts);
  const [top, even] = [Math.max(0.5, ...shares), view.even[router.layer]];
  shares.forEach((share, e) => {
    const [, words, bar] = key.children[e].children;
    const text = `${e + 1} · ${percent(share)}`;
    if (words.textContent !== text) words.textContent = text;
    bar.style.setProperty("--share", `${Math.round((100 * share) / top)}%`);
    bar.style.setProperty("--even", `${Math.round((100 * even) / top)}%`);
  });
}

function expertKey(_, expert) {
  const swatch = make("i", { className: expert >= HUES.light.length ? "again" : "" });
  const key = make("span", {}, swatch, make("b"), make("em"));
  key.style.setProperty("--hue", css(hue(expert)));
  return key;
}

function paint() {
  if (!view.meta || !view.meta.experts || !view.tokens.length || shownToken() < 0) return;
  if (view.dark !== isDark()) {
    view.dark = isDark();
    [...$(".strip").children].forEach((made, index) => colour(made, index));
    $(".experts").replaceChildren();
  }
  const data = heatData();
  if (data && !view.table) {
    drawHeatmap($(".heatmap"), data, view.mark);
    drawScale($(".scale"), data.top, Math.max(...data.counts), { diverging: data.diverging, even: Math.min(...view.even) });
    $(".heatmap").data = data;
  }
  if (!compact) addChips();
  paintWords();
  paintReadout(data);
  if (compact) return;
  if (!view.table) paintTimeline();
  paintChosen();
  paintUse();
  paintLayer();
  if (view.table) paintTables(data);
  fetchRouter();
  fetchSimilar();
}

function paintReadout(data) {
  put(".readout", view.mark && data ? heatmapText(data, view.mark) : "");
  $(".axes").hidden = Boolean(view.mark);
  $(".heatmap").setAttribute("aria-label", `Heatmap: ${heatTitle()}. Arrow keys choose a layer and an expert, Enter opens the layer. ${$(".readout").textContent || $(".summary").textContent}`);
}
