// The routing view beside a reply. Its value is a small delta: `meta` says which reply, model and shape it belongs to, `at`
// where its tokens start. Weights, entropy and active experts arrive as bytes (0…255 for 0…1) in base64. Whatever was missed
// (the tab was hidden, the component was mounted anew) is fetched by its position; what single projections did stays on the
// server until a layer is opened.
const INVITATION = "Send a message: for every token of the reply, this view shows which experts are active in each layer, and the entropy of the router.";
const CLOSER_KEPT = 64;
const all = (selector) => element.querySelectorAll(selector);
const compact = $(".routing").classList.contains("compact");
const uid = Math.random().toString(36).slice(2); // several views may show the same reply on one page
const view = {};
const decode = (text) => Uint8Array.from(atob(text || ""), (c) => c.charCodeAt(0));

function reset(meta) {
  const size = meta.layers * meta.experts + 2 * meta.layers;
  Object.assign(view, {
    meta, tokens: [], weights: [], entropy: [], active: [], limits: [], means: [], mean: new Float32Array(size), tops: {},
    chosen: -1, hovered: -1, follow: true, scope: compact ? "reply" : "token", mark: null, pinned: null, open: null, projection: null,
    earlier: null, closer: new Map(), asking: false, fetching: false, wanted: 0, told: false, atEnd: true,
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

// The mean of an earlier reply, to be subtracted; only a model of the same shape can be compared.
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

function append({ tokens, weights, entropy, active, limits }) {
  const { layers, experts, prompt } = view.meta;
  if (!experts || !tokens.length) return;
  const [w, h, a, t] = [weights, entropy, active, limits].map(decode);
  const size = layers * experts;
  tokens.forEach((text, i) => {
    const index = view.tokens.length;
    view.tokens.push(text);
    view.weights.push(w.subarray(i * size, (i + 1) * size));
    view.entropy.push(h.subarray(i * layers, (i + 1) * layers));
    view.active.push(a.subarray(i * layers, (i + 1) * layers));
    view.limits.push(t.subarray(i * layers, (i + 1) * layers));
    view.means.push(tokenMeans(index));
    if (index >= prompt) learn(index);
  });
  if (view.follow) view.chosen = view.tokens.length - 1;
}

// Keeps the mean over the reply up to date.
function learn(index) {
  const count = index - view.meta.prompt + 1;
  let place = 0;
  for (const part of [view.weights[index], view.entropy[index], view.active[index]]) {
    for (const value of part) view.mean[place] += (value - view.mean[place++]) / count;
  }
}

// A token's means over the layers: load by expert, entropy, active experts, AdaMoLE's threshold.
function tokenMeans(index) {
  const { layers, experts, limit } = view.meta;
  const load = new Array(experts).fill(0);
  let [entropy, active, threshold] = [0, 0, 0];
  for (let layer = 0; layer < layers; layer++) {
    for (let e = 0; e < experts; e++) load[e] += view.weights[index][layer * experts + e] / 255 / layers;
    entropy += view.entropy[index][layer] / 255 / layers;
    active += ((view.active[index][layer] / 255) * experts) / layers;
    threshold += (((view.limits[index][layer] || 0) / 255) * (limit || 0)) / layers;
  }
  return described(load, entropy, active, threshold);
}

function described(load, entropy, active, threshold = 0) {
  const strongest = load.indexOf(Math.max(...load));
  const total = load.reduce((sum, value) => sum + value, 0) || 1;
  return { load, entropy, active, threshold, strongest, shares: load.map((value) => value / total) };
}

// The same of the whole reply.
function replyMeans() {
  const { layers, experts, prompt, limit } = view.meta;
  const load = new Array(experts).fill(0);
  const tail = layers * experts;
  let [entropy, active, threshold] = [0, 0, 0];
  for (let layer = 0; layer < layers; layer++) {
    for (let e = 0; e < experts; e++) load[e] += view.mean[layer * experts + e] / 255 / layers;
    entropy += view.mean[tail + layer] / 255 / layers;
    active += ((view.mean[tail + layers + layer] / 255) * experts) / layers;
  }
  const reply = view.means.slice(prompt);
  if (limit) threshold = reply.reduce((sum, m) => sum + m.threshold, 0) / Math.max(reply.length, 1);
  return described(load, entropy, active, threshold);
}

function replyLength() {
  return view.tokens.length - view.meta.prompt;
}

// What a heatmap or a layer shows is a function (layer, expert) → 0…1: of a token, or of the mean over a reply (null), over
// all projections or of one. While a closer look is on its way there is none: nothing wrong is drawn meanwhile.
function lens(token, projection, reply = view.meta.id) {
  const { experts } = view.meta;
  if (projection) {
    const look = closer(token, reply);
    const rows = look && look.rows.get(projection);
    return rows ? (layer, e) => (rows[layer] === undefined ? 0 : look.weights[rows[layer] * experts + e]) : look && (() => 0);
  }
  const values = reply !== view.meta.id ? view.earlier.mean : token === null ? view.mean : view.weights[token];
  return values && ((layer, e) => values[layer * experts + e] / 255);
}

// Every projection's weights, from the server: kept once they are there, asked for one at a time.
function closer(token, reply) {
  const state = reply === view.meta.id && token === null ? `${view.tokens.length}` : "";
  const key = `${reply} ${token} ${state}`;
  if (view.closer.has(key)) return view.closer.get(key);
  if (!view.asking) askCloser(key, token, reply);
  return token === null ? view.closer.get(`${reply} latest`) : undefined;
}

async function askCloser(key, token, reply) {
  const { meta, closer } = view;
  view.asking = true;
  try {
    const found = await server.fetch_projections([reply, token]);
    if (view.meta !== meta) return;
    const look = found && unpacked(found);
    closer.set(key, look);
    if (token === null) closer.set(`${reply} latest`, look);
    while (closer.size > CLOSER_KEPT) closer.delete(closer.keys().next().value);
  } finally {
    if (view.meta === meta) view.asking = false;
  }
  repaint();
}

// `rows`: for every projection's name its row of weights in each layer.
function unpacked({ names, layers, weights }) {
  const rows = new Map();
  names.forEach((name, row) => {
    if (!rows.has(name)) rows.set(name, []);
    rows.get(name)[layers[row]] = row;
  });
  return { rows, weights: new Float32Array(decode(weights).buffer) };
}

// The chosen scope through a projection: {at(layer, expert), diverging}; null while it is on its way.
function scoped(projection) {
  const token = shown();
  const scope = view.scope === "reply" && view.hovered >= 0 ? "token" : view.scope;
  const from = lens(scope === "reply" || scope === "earlier" ? null : token, projection);
  if (scope === "token" || scope === "reply") return from && { at: from, diverging: false };
  const less = scope === "earlier" ? lens(null, projection, view.meta.against) : lens(null, projection);
  return from && less && { at: (layer, e) => from(layer, e) - less(layer, e), diverging: true };
}

function shown() {
  return view.hovered >= 0 ? view.hovered : view.chosen;
}

// Whether what is shown is about the whole reply, not about one token.
function isWhole() {
  return view.scope === "earlier" || (view.scope === "reply" && view.hovered < 0);
}
