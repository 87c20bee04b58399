// The page of a replay: each conversation, and beside it the studio's routing view, whose questions to the server are
// answered from the file.
const dark = matchMedia("(prefers-color-scheme: dark)");
const followTheme = () => document.body.classList.toggle("dark", dark.matches);
const bytesOf = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
const MOST_ALIKE = 5;

function textOf(bytes) {
  let text = "";
  for (let at = 0; at < bytes.length; at += 8192) text += String.fromCharCode(...bytes.subarray(at, at + 8192));
  return btoa(text);
}

function element(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

// What `app.services.routing_stream` answers, by the same names. The weights are tokens × projections × experts in bytes;
// empty if they were left out.
function answersOf({ routing, names, layers, projections }) {
  const { experts, prompt } = routing.meta;
  const [kept, width, count] = [bytesOf(projections), names.length * experts, routing.tokens.length];
  const complete = count > 0 && width > 0 && kept.length === count * width;
  const row = (token) => kept.subarray(token * width, (token + 1) * width);

  function fetch_projections([, token]) {
    const [first, last] = token === null ? [prompt, count] : [token, token + 1];
    if (!complete || last <= first) return null;
    const weights = new Float32Array(width);
    for (let at = first; at < last; at++) row(at).forEach((value, i) => (weights[i] += value / 255 / (last - first)));
    return { names, layers, weights: textOf(new Uint8Array(weights.buffer)) };
  }

  function fetch_router([, layer, name, start]) {
    const place = names.findIndex((other, i) => other === name && layers[i] === layer);
    if (!complete || place < 0) return null;
    const weights = new Uint8Array((count - start) * experts);
    for (let at = start; at < count; at++) weights.set(row(at).subarray(place * experts, (place + 1) * experts), (at - start) * experts);
    return { at: start, weights: textOf(weights) };
  }

  function fetch_similar([, token]) {
    if (!complete) return null;
    const length = (values) => Math.sqrt(values.reduce((sum, value) => sum + value * value, 0));
    const own = row(token);
    const cosine = (other) => row(other).reduce((sum, value, i) => sum + value * own[i], 0) / Math.max(length(row(other)) * length(own), 1e-9);
    const found = Array.from({ length: count }, (_, other) => [other, cosine(other)]).filter(([other]) => other !== token);
    return found.sort((one, other) => other[1] - one[1]).slice(0, MOST_ALIKE);
  }

  const later = (answer) => async (request) => answer(request);
  return { fetch_routing: later(() => null), fetch_projections: later(fetch_projections), fetch_router: later(fetch_router), fetch_similar: later(fetch_similar) };
}

function conversation({ title, system, turns }) {
  const said = (kind, text) => element("div", { className: `message ${kind}` }, text);
  const thought = (text) => element("details", {}, element("summary", {}, "Thought"), said("reply", text));
  const parts = turns.flatMap((turn) => [
    said("user", turn.user),
    ...(turn.note ? [element("p", { className: "note" }, turn.note)] : []),
    ...(turn.thought === null ? [] : [thought(turn.thought)]),
    ...(turn.answer === null ? [] : [said("reply", turn.answer)]),
  ]);
  return element("section", { ariaLabel: "Conversation" }, element("h2", {}, title), ...(system ? [said("system", system)] : []), ...parts);
}

// The view stands in a shadow tree, so that its styles are its own.
function routing(reply) {
  const card = element("div", {});
  const place = element("div", {});
  place.append(document.getElementById("view").content.cloneNode(true));
  card.attachShadow({ mode: "open" }).append(place);
  return [card, () => showRouting(place, { value: reply.routing }, answersOf(reply), () => {})];
}

followTheme();
dark.addEventListener("change", followTheme);
for (const reply of JSON.parse(document.getElementById("data").textContent)) {
  const [card, show] = routing(reply);
  document.getElementById("page").append(element("article", { className: "reply" }, conversation(reply), card));
  show(); // once it is on the page and has a size
}
