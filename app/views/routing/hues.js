// The colours of the tokens. By default: how a token was routed, over all layers and projections, as a place on the
// adapter's map: its hue is the direction from the map's centre, its colourfulness the distance. Or, of a router that was
// chosen, the strongest expert. In both, the fainter, the higher the entropy.
const MAP_KEY = "like hue: routed alike in all layers; greyer: usual; fainter: higher entropy";
const MAPLESS_KEY = "fainter: higher entropy";
const HUE_NAMES = ["pink", "orange", "yellow", "green", "teal", "blue", "violet", "purple"];

// From OKLCH (Ottosson 2020): equal steps of hue look equally far apart. What lies outside sRGB is clipped.
function oklch(lightness, chroma, turn) {
  const [a, b] = [chroma * Math.cos(2 * Math.PI * turn), chroma * Math.sin(2 * Math.PI * turn)];
  const l = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3;
  const m = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3;
  const s = (lightness - 0.0894841775 * a - 1.291485548 * b) ** 3;
  const linear = [4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s, -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s, -0.0041960863 * l - 0.7034186147 * m + 1.707614701 * s];
  return linear.map((v) => 255 * clamp(v <= 0.0031308 ? 12.92 * v : 1.055 * Math.max(v, 0) ** (1 / 2.4) - 0.055));
}

function mapColour([turn, distance], dark = isDark()) {
  return oklch(dark ? 0.68 : 0.72, 0.16 * distance, turn);
}

// The name of a hue, as hover text says it; near the centre a token has none.
function hueName([turn, distance]) {
  return distance < 0.2 ? "near the average" : HUE_NAMES[Math.round(turn * HUE_NAMES.length) % HUE_NAMES.length];
}

// A token's place on the map, [turn, distance] in 0…1; null if there is none.
function placeOf(index) {
  const bytes = view.hues[index];
  return bytes && bytes.length === 2 ? [bytes[0] / 256, bytes[1] / 255] : null;
}

// {fill, words, again}: the colour of a token, what it stands for, and whether its hue is that of another expert too.
function tokenColour(index) {
  const { entropy } = view.means[index];
  if (view.router) {
    const found = routerOf(index);
    if (!found) return { fill: faded([128, 128, 128], 1), words: view.router.gone ? "not kept" : "" };
    const words = found.strongest < 0 ? "no expert" : `expert ${found.strongest + 1}, weight ${number(found.weights[found.strongest] / 255, 3)}`;
    return { fill: found.strongest < 0 ? faded([128, 128, 128], 1) : chipFill(found.strongest, entropy), words, again: found.strongest >= HUES.light.length };
  }
  const place = placeOf(index);
  return place ? { fill: faded(mapColour(place), entropy), words: hueName(place) } : { fill: faded([128, 134, 140], entropy), words: "" };
}

// ---- One router: a layer and a projection, chosen below the strip

function routerOf(index) {
  const { experts } = view.meta;
  const row = view.router && view.router.rows[index];
  if (!row) return null;
  const strongest = row.indexOf(Math.max(...row));
  return { weights: row, strongest: row[strongest] ? strongest : -1, experts };
}

// The weights of the chosen router as shares of 0…1: of a token, or the mean over the reply.
function routerMeans(index) {
  const { experts, prompt } = view.meta;
  const rows = index === null ? view.router.rows.slice(prompt) : [view.router.rows[index]].filter(Boolean);
  return Array.from({ length: experts }, (_, e) => rows.reduce((sum, row) => sum + row[e] / 255, 0) / Math.max(rows.length, 1));
}

function offerRouters() {
  const { layers, routers } = view.meta;
  const option = (value, text) => make("option", { value: String(value) }, text);
  const shown = routers || [];
  const byLayer = Array.from({ length: layers }, (_, layer) => layer).filter((layer) => (shown[layer] || []).length);
  $(".by-layer").replaceChildren(option("", "Routing in all layers"), ...byLayer.map((layer) => option(layer, `Layer ${layer + 1}`)));
  $(".by-projection").replaceChildren();
  $(".by-projection").hidden = true;
  const { wish } = view; // a choice stays from reply to reply
  if (wish && (shown[wish.layer] || []).includes(wish.name)) chooseRouter(wish.layer, wish.name, false);
}

function chooseRouter(layer, name, aloud = true) {
  const names = layer === null ? [] : view.meta.routers[layer];
  const chosen = names.includes(name) ? name : names[0];
  if (aloud) view.wish = layer === null ? null : { layer, name: chosen };
  view.router = layer === null ? null : { layer, name: chosen, rows: [], gone: false, fetching: false };
  $(".by-layer").value = layer === null ? "" : String(layer);
  $(".by-projection").replaceChildren(...names.map((text) => make("option", { value: text }, text)));
  $(".by-projection").hidden = layer === null;
  if (layer !== null) $(".by-projection").value = chosen;
  $(".tokens tbody").replaceChildren();
  $(".experts").replaceChildren();
  recolour();
  if (aloud) announce(view.router ? `Tokens by the strongest expert of layer ${layer + 1}, ${chosen}.` : "Tokens by their routing in all layers.");
  repaint();
}

// Fetches what the chosen router did with the tokens that are new, one request at a time.
async function fetchRouter() {
  const { router, meta } = view;
  if (!router || router.fetching || router.gone || router.rows.length >= view.tokens.length) return;
  router.fetching = true;
  try {
    const found = await server.fetch_router([meta.id, router.layer, router.name, router.rows.length]);
    if (view.router !== router || view.meta !== meta) return;
    router.gone = !found;
    if (found && found.at === router.rows.length) {
      const bytes = decode(found.weights);
      for (let at = 0; at < bytes.length; at += meta.experts) router.rows.push(bytes.subarray(at, at + meta.experts));
      recolour(found.at);
    }
  } finally {
    router.fetching = false;
  }
  repaint();
}

function recolour(from = 0) {
  const chips = $(".strip").children;
  for (let index = from; index < chips.length; index++) colour(chips[index], index);
}

// ---- Tokens that were routed alike

// Asks for the tokens most like the one that is hovered or chosen; not for each that is generated meanwhile.
async function fetchSimilar() {
  const [index, { meta }] = [shownToken(), view];
  if (view.asking || isWhole() || (view.follow && view.hovered < 0 && !meta.finished) || view.likes.has(likeKey(index))) return;
  view.asking = true;
  const key = likeKey(index);
  try {
    const found = await server.fetch_similar([meta.id, index]);
    if (view.meta !== meta) return;
    view.likes.set(key, found);
    while (view.likes.size > PROJECTIONS_KEPT) view.likes.delete(view.likes.keys().next().value);
  } finally {
    if (view.meta === meta) view.asking = false;
  }
  repaint();
}

function likeKey(index) {
  return `${index} ${view.meta.finished ? "" : view.tokens.length >> 4}`;
}

function paintSimilar() {
  const index = shownToken();
  const found = isWhole() ? null : view.likes.get(likeKey(index));
  const known = (found || []).filter(([other]) => other < view.tokens.length);
  const names = known.map(([other, cosine]) => `“${view.tokens[other].trim() || "␣"}” (${other < view.meta.prompt ? "prompt " : ""}${position(other)}, ${number(cosine, 2)})`);
  put(".alike", names.length ? `Routed most alike: ${names.join(", ")}.` : "");
  const marked = new Set(known.map(([other]) => other));
  const before = view.marked || new Set();
  const chips = $(".strip").children;
  before.forEach((other) => !marked.has(other) && chips[other] && chips[other].classList.remove("like"));
  marked.forEach((other) => chips[other] && chips[other].classList.add("like"));
  view.marked = marked;
  if (names.length && view.speak === index) {
    view.speak = -1;
    announce(`${$(".said").textContent} ${$(".alike").textContent}`);
  }
}
