// The routing of a reply. Value: what `RoutingRecord.since` returns: `meta` identifies the reply, the model and the shape,
// `at` is the number of the first token. Weights (tokens × layers × experts), entropy and active experts (tokens × layers)
// are bytes (0…255 for 0…1) in base64. Missed tokens (the tab was hidden, the component was mounted again) are fetched by
// their position; the weights of single projections are fetched when a layer is opened.
const INVITATION = "Send a message: for every token of the reply, this view shows which experts are active in each layer, and the entropy of the router.";
const PROJECTIONS_KEPT = 64;
const all = (selector) => element.querySelectorAll(selector);
const compact = $(".routing").classList.contains("compact");
const uid = Math.random().toString(36).slice(2); // several views may show the same reply on one page
const view = {};
const decode = (text) => Uint8Array.from(atob(text || ""), (c) => c.charCodeAt(0));

function reset(meta) {
  const size = meta.layers * meta.experts + 2 * meta.layers;
  Object.assign(view, {
    meta, tokens: [], weights: [], entropy: [], active: [], limits: [], hues: [], means: [], mean: new Float32Array(size), tops: {},
    chosen: -1, hovered: -1, follow: true, scope: compact ? "reply" : "token", mark: null, pinned: null, open: null, projection: null,
    router: null, likes: new Map(), marked: null, asking: false, speak: -1, earlier: null, projections: new Map(), fetchingProjections: false, fetching: false, wanted: 0, announced: false, atEnd: true,
  });
  view.even = meta.even || meta.counts.map((count) => 1 / Math.max(count, 1));
  begin(meta);
}

function receive(value) {
  if (!value) return;
  if (!value.meta) return reset({ id: "", layers: 0, experts: 0, counts: [], prompt: 0, note: INVITATION });
  if (!view.meta || value.meta.id !== view.meta.id) reset(value.meta);
  Object.assign(view.meta, value.meta);
  view.wanted = value.at + value.tokens.length;
  if (value.at === view.tokens.length) append(value);
  else if (view.wanted > view.tokens.length) fetchMissed();
  if (view.meta.against && !view.earlier) fetchEarlier(view.meta.against);
  if (view.meta.finished && view.tokens.length >= view.wanted) finish();
  repaint();
}

async function fetchMissed() {
  if (view.fetching) return;
  const { meta } = view;
  view.fetching = true;
  try {
    for (let more = true; more && view.tokens.length < view.wanted; ) {
      const missed = await server.fetch_routing([meta.id, view.tokens.length]);
      more = Boolean(missed) && view.meta === meta && missed.at === view.tokens.length && missed.tokens.length > 0;
      if (more) append(missed);
    }
  } finally {
    view.fetching = false;
  }
  if (view.meta.finished && view.meta === meta) finish();
  repaint();
}

// The mean of an earlier reply, to show the difference from it; only a model of the same shape can be compared.
async function fetchEarlier(id) {
  view.earlier = { mean: null };
  const { meta } = view;
  const record = await server.fetch_routing([id, 0]);
  const same = record && view.meta === meta && record.meta.layers === meta.layers && record.meta.experts === meta.experts;
  const count = record ? record.tokens.length - record.meta.prompt : 0;
  if (!same || count < 1) return;
  const [bytes, size] = [decode(record.weights), meta.layers * meta.experts];
  view.earlier.mean = new Float32Array(size);
  for (let i = record.meta.prompt * size; i < bytes.length; i++) view.earlier.mean[i % size] += bytes[i] / count;
  const button = $('[data-scope="earlier"]');
  button.hidden = false;
  button.title = `The mean over this reply minus that of ${earlierName()}`;
  repaint();
}

function earlierName() {
  return view.meta.against_label || "the earlier reply";
}

function append({ tokens, weights, entropy, active, limits, hues, strongest }) {
  const { layers, experts, prompt } = view.meta;
  if (!experts || !tokens.length) return;
  const [w, h, a, t, c, s] = [weights, entropy, active, limits, hues, strongest].map(decode);
  const size = layers * experts;
  tokens.forEach((text, i) => {
    const index = view.tokens.length;
    view.tokens.push(text);
    view.weights.push(w.subarray(i * size, (i + 1) * size));
    view.entropy.push(h.subarray(i * layers, (i + 1) * layers));
    view.active.push(a.subarray(i * layers, (i + 1) * layers));
    view.limits.push(t.subarray(i * layers, (i + 1) * layers));
    view.hues.push(c.subarray(2 * i, 2 * i + 2));
    view.means.push(tokenMeans(index, (s[i] || 0) / 255));
    if (index >= prompt) updateMean(index);
  });
  if (view.follow) view.chosen = view.tokens.length - 1;
}

// Updates the running mean over the reply.
function updateMean(index) {
  const count = index - view.meta.prompt + 1;
  let place = 0;
  for (const part of [view.weights[index], view.entropy[index], view.active[index]]) {
    for (const value of part) view.mean[place] += (value - view.mean[place++]) / count;
  }
}

// A token's means over the layers: entropy, active experts, AdaMoLE's threshold, and the share of its router's weight that
// the strongest expert has. Not the weight by expert: expert 2 of one layer has nothing to do with expert 2 of another.
function tokenMeans(index, strongest) {
  const { layers, experts, limit } = view.meta;
  let [entropy, active, threshold] = [0, 0, 0];
  for (let layer = 0; layer < layers; layer++) {
    entropy += view.entropy[index][layer] / 255 / layers;
    active += ((view.active[index][layer] / 255) * experts) / layers;
    threshold += (((view.limits[index][layer] || 0) / 255) * (limit || 0)) / layers;
  }
  return { entropy, active, threshold, strongest };
}

// The same means over the whole reply.
function replyMeans() {
  const { layers, experts, prompt, limit } = view.meta;
  const tail = layers * experts;
  let [entropy, active, threshold] = [0, 0, 0];
  for (let layer = 0; layer < layers; layer++) {
    entropy += view.mean[tail + layer] / 255 / layers;
    active += ((view.mean[tail + layers + layer] / 255) * experts) / layers;
  }
  const reply = view.means.slice(prompt);
  const mean = (name) => reply.reduce((sum, m) => sum + m[name], 0) / Math.max(reply.length, 1);
  if (limit) threshold = mean("threshold");
  return { entropy, active, threshold, strongest: mean("strongest") };
}

function replyLength() {
  return view.tokens.length - view.meta.prompt;
}

// The weights to draw as a function (layer, expert) → 0…1: of a token, or of the mean over the reply (`token` null); over
// all projections, or of one. Undefined while they are being fetched, so that nothing wrong is drawn meanwhile.
function weightsOf(token, projection, reply = view.meta.id) {
  const { experts } = view.meta;
  if (projection) {
    const found = projectionWeights(token, reply);
    const rows = found && found.rows.get(projection);
    return rows ? (layer, e) => (rows[layer] === undefined ? 0 : found.weights[rows[layer] * experts + e]) : found && (() => 0);
  }
  const values = reply !== view.meta.id ? view.earlier.mean : token === null ? view.mean : view.weights[token];
  return values && ((layer, e) => values[layer * experts + e] / 255);
}

// The weights of every projection, fetched from the server one request at a time, and cached.
function projectionWeights(token, reply) {
  const state = reply === view.meta.id && token === null ? `${view.tokens.length}` : "";
  const key = `${reply} ${token} ${state}`;
  if (view.projections.has(key)) return view.projections.get(key);
  if (!view.fetchingProjections) fetchProjections(key, token, reply);
  return token === null ? view.projections.get(`${reply} latest`) : undefined;
}

async function fetchProjections(key, token, reply) {
  const { meta, projections } = view;
  view.fetchingProjections = true;
  try {
    const found = await server.fetch_projections([reply, token]);
    if (view.meta !== meta) return;
    const weights = found && unpacked(found);
    projections.set(key, weights);
    if (token === null) projections.set(`${reply} latest`, weights);
    while (projections.size > PROJECTIONS_KEPT) projections.delete(projections.keys().next().value);
  } finally {
    if (view.meta === meta) view.fetchingProjections = false;
  }
  repaint();
}

// `rows`: the row of weights in each layer, by the projection's name.
function unpacked({ names, layers, weights }) {
  const rows = new Map();
  names.forEach((name, row) => {
    if (!rows.has(name)) rows.set(name, []);
    rows.get(name)[layers[row]] = row;
  });
  return { rows, weights: new Float32Array(decode(weights).buffer) };
}

// The weights of the chosen scope: {at(layer, expert), diverging}; undefined while they are being fetched.
function scopedWeights(projection) {
  const token = shownToken();
  const scope = view.scope === "reply" && view.hovered >= 0 ? "token" : view.scope;
  const from = weightsOf(scope === "reply" || scope === "earlier" ? null : token, projection);
  if (scope === "token" || scope === "reply") return from && { at: from, diverging: false };
  const less = scope === "earlier" ? weightsOf(null, projection, view.meta.against) : weightsOf(null, projection);
  return from && less && { at: (layer, e) => from(layer, e) - less(layer, e), diverging: true };
}

function shownToken() {
  return view.hovered >= 0 ? view.hovered : view.chosen;
}

// Whether the view shows the whole reply instead of one token.
function isWhole() {
  return view.scope === "earlier" || (view.scope === "reply" && view.hovered < 0);
}
