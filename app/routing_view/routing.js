// The routing view beside the chat. Its value is a small delta: `meta` says which reply, model and shape it belongs to,
// `at` where its tokens start. Weights, entropy and active experts arrive as bytes (0…255 for 0…1) in base64.
// Whatever was missed (the tab was hidden, the component was mounted anew) is fetched by its position from the server.
const INVITATION = "Send a message: for every token of the reply, this shows which experts were at work, in which layer, and how sure the router was.";
const $ = (selector) => element.querySelector(selector);
const view = { meta: null, tokens: [], weights: [], entropy: [], active: [], means: [], chosen: -1, follow: true, hovered: -1, scope: "token", top: 0, fetching: false, wanted: 0 };
const decode = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
const repaint = painter(element, paint);

function reset(meta) {
  Object.assign(view, { meta, tokens: [], weights: [], entropy: [], active: [], means: [], chosen: -1, hovered: -1, follow: true, top: 0 });
  view.mean = new Float32Array(meta.layers * meta.experts + 2 * meta.layers);
  $(".strip").replaceChildren();
  showPrompt(false);
  const routed = meta.experts > 0;
  $(".views").hidden = !routed;
  $(".scope").hidden = !routed;
  $(".empty").hidden = routed;
  $(".empty").textContent = meta.note || "";
  $(".about").textContent = meta.about || "";
  $(".heat-title").textContent = `Experts by layer (${meta.experts} × ${meta.layers})`;
}

function receive(value) {
  if (!value) return;
  if (!value.meta) return reset({ id: "", layers: 0, experts: 0, counts: [], prompt: 0, note: INVITATION });
  if (!view.meta || value.meta.id !== view.meta.id) reset(value.meta);
  Object.assign(view.meta, value.meta);
  view.wanted = value.at + value.tokens.length;
  if (value.at === view.tokens.length) append(value);
  else if (view.wanted > view.tokens.length) fetchMissed();
  if (value.meta.finished && view.tokens.length && view.tokens.length <= value.meta.prompt) showPrompt(true);
  repaint();
}

async function fetchMissed() {
  if (view.fetching) return;
  view.fetching = true;
  try {
    for (let more = true; more && view.tokens.length < view.wanted; ) {
      const missed = await server.routing([view.meta.id, view.tokens.length]);
      more = Boolean(missed) && missed.meta.id === view.meta.id && missed.at === view.tokens.length && missed.tokens.length > 0;
      if (more) append(missed);
    }
  } finally {
    view.fetching = false;
  }
  repaint();
}

function append({ tokens, weights, entropy, active }) {
  const { layers, experts, prompt } = view.meta;
  if (!experts || !tokens.length) return;
  const [w, h, a] = [decode(weights), decode(entropy), decode(active)];
  const size = layers * experts;
  const strip = $(".strip");
  const atEnd = strip.scrollHeight - strip.scrollTop - strip.clientHeight < 30;
  const fragment = document.createDocumentFragment();
  tokens.forEach((text, i) => {
    const index = view.tokens.length;
    view.tokens.push(text);
    view.weights.push(w.subarray(i * size, (i + 1) * size));
    view.entropy.push(h.subarray(i * layers, (i + 1) * layers));
    view.active.push(a.subarray(i * layers, (i + 1) * layers));
    view.means.push(tokenMeans(index));
    if (index >= prompt) learn(index);
    fragment.append(chip(text, index, index < prompt));
  });
  strip.append(fragment);
  if (view.follow) view.chosen = view.tokens.length - 1;
  if (atEnd && view.follow) strip.scrollTop = strip.scrollHeight;
  $(".prompt").hidden = !prompt;
  $(".prompt").textContent = `Prompt (${prompt} tokens)`;
}

// Keeps the mean over the reply up to date, and the colours' ceiling.
function learn(index) {
  const { layers, experts, prompt } = view.meta;
  const size = layers * experts;
  const count = index - prompt + 1;
  const values = [view.weights[index], view.entropy[index], view.active[index]];
  let place = 0;
  for (const part of values) for (const v of part) view.mean[place] += (v - view.mean[place++]) / count;
  for (let i = 0; i < size; i++) view.top = Math.max(view.top, view.weights[index][i] / 255);
}

function tokenMeans(index) {
  const { layers, experts, counts } = view.meta;
  const load = new Array(experts).fill(0);
  let [entropy, active, full] = [0, 0, 0];
  for (let layer = 0; layer < layers; layer++) {
    for (let e = 0; e < experts; e++) load[e] += view.weights[index][layer * experts + e] / 255 / layers;
    entropy += view.entropy[index][layer] / 255 / layers;
    active += ((view.active[index][layer] / 255) * experts) / layers;
    full += counts[layer] / layers;
  }
  return { load, entropy, active, full, strongest: load.indexOf(Math.max(...load)) };
}

function chip(text, index, fromPrompt) {
  const made = document.createElement("span");
  made.textContent = text.replace(/\n/g, "⏎\n").replace(/\t/g, "⇥") || "∅";
  made.id = `token-${view.meta.id}-${index}`;
  made.dataset.index = index;
  made.setAttribute("role", "option");
  made.setAttribute("aria-selected", "false");
  if (fromPrompt) made.className = "from-prompt";
  colour(made, index);
  return made;
}

function colour(made, index) {
  const { strongest, entropy } = view.means[index];
  const fill = mix(isDark() ? [22, 27, 32] : [255, 255, 255], hue(strongest), 0.16 + 0.84 * (1 - entropy) ** 0.75);
  made.style.background = css(fill);
  made.style.color = luminance(fill) > 0.3 ? "#16191d" : "#ffffff";
}

function shown() {
  if (view.hovered >= 0) return view.hovered;
  return view.chosen;
}

// What the heatmap shows: one token, or the mean over the reply.
function heatData() {
  const { layers, experts, counts } = view.meta;
  const index = shown();
  const whole = view.scope === "reply" && view.hovered < 0;
  const size = layers * experts;
  const weights = whole ? view.mean : view.weights[index];
  const entropy = whole ? view.mean.subarray(size, size + layers) : view.entropy[index];
  const active = whole ? view.mean.subarray(size + layers) : view.active[index];
  return {
    layers, experts, counts, whole, top: ceiling(view.top, Math.max(...counts)),
    weight: (layer, expert) => weights[layer * experts + expert] / 255,
    entropy: (layer) => entropy[layer] / 255,
    active: (layer) => (active[layer] / 255) * experts,
  };
}

function paint() {
  if (!view.meta || !view.meta.experts || !view.tokens.length || shown() < 0) return;
  const data = heatData();
  drawHeatmap($(".heatmap"), data, view.mark);
  drawScale($(".scale"), data.top, Math.max(...data.counts));
  paintSummary(data);
  paintTimeline();
  paintChosen();
  if (view.dark !== isDark()) {
    view.dark = isDark();
    element.querySelectorAll(".strip span").forEach((made) => colour(made, Number(made.dataset.index)));
  }
}

function paintSummary(data) {
  const { layers, experts, prompt } = view.meta;
  const reply = view.tokens.length - prompt;
  let means = data.whole ? null : view.means[shown()];
  if (!means) {
    const load = Array.from({ length: experts }, (_, e) => {
      let sum = 0;
      for (let layer = 0; layer < layers; layer++) sum += data.weight(layer, e) / layers;
      return sum;
    });
    const mean = (pick) => Array.from({ length: layers }, (_, layer) => pick(layer)).reduce((x, y) => x + y, 0) / layers;
    means = { load, entropy: mean(data.entropy), active: mean(data.active), full: mean((l) => data.counts[l]), strongest: load.indexOf(Math.max(...load)) };
  }
  const total = means.load.reduce((x, y) => x + y, 0) || 1;
  const name = data.whole ? `Whole reply, ${reply} tokens` : `${shown() < prompt ? "Prompt token" : "Token"} ${(shown() < prompt ? shown() : shown() - prompt) + 1} “${view.tokens[shown()].trim() || "␣"}”`;
  const text = `${name}: strongest is expert ${means.strongest + 1} with ${percent(means.load[means.strongest] / total)}; entropy ${number(means.entropy)}; ${number(means.active, 1)} of ${number(means.full, 1)} experts active.`;
  if ($(".summary").textContent !== text) $(".summary").textContent = text;
  $(".heatmap").setAttribute("aria-label", `Heatmap of ${experts} experts in ${layers} layers. ${text}`);
  const key = $(".experts");
  if (key.childElementCount !== experts) {
    key.replaceChildren(...means.load.map((_, e) => {
      const [made, swatch, words] = ["span", "i", "b"].map((tag) => document.createElement(tag));
      swatch.style.background = css(hue(e));
      words.style.fontWeight = "400";
      made.append(swatch, words);
      return made;
    }));
  }
  means.load.forEach((load, e) => (key.children[e].lastChild.textContent = `${e + 1} · ${percent(load / total)}`));
}

function paintTimeline() {
  const { prompt, experts, threshold } = view.meta;
  const look = theme(element);
  const [entropy, active] = [[], []];
  for (let i = prompt; i < view.tokens.length; i++) {
    entropy.push([i - prompt + 1, view.means[i].entropy]);
    active.push([i - prompt + 1, view.means[i].active]);
  }
  if (!entropy.length) return;
  const last = Math.max(entropy.length, 2);
  const series = [
    { points: entropy, colour: look.accent, range: [0, 1.02] },
    { points: active, colour: look.muted, range: [0, Math.max(experts, 1) * 1.02], area: true },
  ];
  if (threshold && threshold < 1) series.push({ points: [[1, threshold], [last, threshold]], colour: look.muted, range: [0, 1.02], dash: [3, 4] });
  const mark = shown() >= prompt ? shown() - prompt + 1 : null;
  view.timeline = drawCurves($(".timeline"), 104, series, { x: [1, last], mark });
}

function paintChosen() {
  const strip = $(".strip");
  const index = String(shown());
  for (const old of strip.querySelectorAll('[aria-selected="true"]')) if (old.dataset.index !== index) old.setAttribute("aria-selected", "false");
  const made = strip.children[Number(index)];
  if (!made) return;
  made.setAttribute("aria-selected", "true");
  strip.setAttribute("aria-activedescendant", made.id);
}

function choose(index, reveal = true) {
  const first = $(".strip").classList.contains("with-prompt") ? 0 : view.meta.prompt;
  view.chosen = Math.max(first, Math.min(index, view.tokens.length - 1));
  view.follow = view.chosen === view.tokens.length - 1;
  view.hovered = -1;
  setScope("token");
  if (reveal && $(".strip").children[view.chosen]) {
    const [strip, made] = [$(".strip"), $(".strip").children[view.chosen]];
    const top = made.offsetTop - strip.offsetTop;
    if (top < strip.scrollTop + 8 || top > strip.scrollTop + strip.clientHeight - 30) strip.scrollTop = top - strip.clientHeight / 2;
  }
  repaint();
}

function setScope(scope) {
  view.scope = scope;
  element.querySelectorAll("[data-scope]").forEach((b) => b.setAttribute("aria-pressed", String(b.dataset.scope === scope)));
  repaint();
}

function showPrompt(on) {
  $(".strip").classList.toggle("with-prompt", on);
  $(".prompt").setAttribute("aria-pressed", String(on));
}

const tokenOf = (event) => (event.target.dataset && event.target.dataset.index !== undefined ? Number(event.target.dataset.index) : -1);
$(".strip").addEventListener("pointerover", (event) => { view.hovered = tokenOf(event); repaint(); });
$(".strip").addEventListener("pointerleave", () => { view.hovered = -1; repaint(); });
$(".strip").addEventListener("click", (event) => tokenOf(event) >= 0 && choose(tokenOf(event), false));
$(".strip").addEventListener("keydown", (event) => {
  const moves = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10, Home: -Infinity, End: Infinity };
  if (!(event.key in moves) || !view.meta) return;
  event.preventDefault();
  choose(Math.max(-1e9, Math.min(1e9, view.chosen + moves[event.key])));
});
$(".timeline").addEventListener("pointermove", (event) => {
  if (!view.timeline) return;
  const index = Math.round(view.timeline.at(event.clientX)) - 1 + view.meta.prompt;
  view.hovered = index >= view.meta.prompt && index < view.tokens.length ? index : -1;
  repaint();
});
$(".timeline").addEventListener("pointerleave", () => { view.hovered = -1; repaint(); });
$(".timeline").addEventListener("click", () => view.hovered >= 0 && choose(view.hovered));
$(".heatmap").addEventListener("pointermove", (event) => {
  view.mark = heatmapCell($(".heatmap"), event);
  $(".readout").textContent = view.mark && shown() >= 0 ? heatmapText(heatData(), view.mark) : "";
  $(".axes").hidden = Boolean(view.mark);
  repaint();
});
$(".heatmap").addEventListener("pointerleave", () => { view.mark = null; $(".readout").textContent = ""; $(".axes").hidden = false; repaint(); });
element.querySelectorAll("[data-scope]").forEach((b) => b.addEventListener("click", () => setScope(b.dataset.scope)));
$(".prompt").addEventListener("click", () => showPrompt(!$(".strip").classList.contains("with-prompt")));

$(".scope").hidden = true;
$(".empty").textContent = INVITATION;
watch("value", () => receive(props.value));
receive(props.value);
