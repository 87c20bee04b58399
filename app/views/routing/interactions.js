// Pointer and keys: what is hovered or chosen in one part is highlighted in all of them.
const STEPS = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10, PageDown: 50, PageUp: -50, Home: -Infinity, End: Infinity };

function choose(index, reveal = true) {
  const first = $(".strip").classList.contains("with-prompt") ? 0 : view.meta.prompt;
  view.chosen = Math.max(first, Math.min(index, view.tokens.length - 1));
  view.follow = view.chosen === view.tokens.length - 1;
  view.hovered = -1;
  if (view.scope !== "difference") setScope("token");
  if (reveal) revealChip(view.chosen);
  view.speak = view.chosen;
  announce(`${tokenName(view.chosen)}. ${tokenColour(view.chosen).words}. ${meansText(view.means[view.chosen])}`);
  repaint();
}

function hover(index, reveal = false) {
  const known = index >= 0 && index < view.tokens.length ? index : -1;
  if (view.hovered === known) return;
  view.hovered = known;
  if (reveal && known >= 0) revealChip(known);
  repaint();
}

function revealChip(index) {
  const [strip, made] = [$(".strip"), $(".strip").children[index]];
  if (!made) return;
  if (made.offsetTop < strip.scrollTop || made.offsetTop > strip.scrollTop + strip.clientHeight - 30) strip.scrollTop = made.offsetTop - strip.clientHeight / 2;
}

function setScope(scope) {
  view.scope = scope;
  all("[data-scope]").forEach((button) => button.setAttribute("aria-pressed", String(button.dataset.scope === scope)));
  repaint();
}

function showPrompt(on) {
  $(".strip").classList.toggle("with-prompt", on);
  $(".prompt").setAttribute("aria-pressed", String(on));
}

function setMark(mark) {
  view.mark = mark;
  repaint();
}

function stepTokens(event) {
  if (!(event.key in STEPS) || !view.tokens.length) return;
  event.preventDefault();
  choose(Math.max(-1e9, Math.min(1e9, view.chosen + STEPS[event.key])));
}

function stepCells(event) {
  if (!view.meta || !view.meta.experts) return;
  const { layers, experts } = view.meta;
  const moves = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1], Home: [-layers, 0], End: [layers, 0] };
  const at = view.mark || { layer: 0, expert: 0 };
  if (event.key in moves) {
    const [right, down] = view.mark ? moves[event.key] : [0, 0];
    const within = (value, count) => Math.max(0, Math.min(value, count - 1));
    view.pinned = { layer: within(at.layer + right, layers), expert: within(at.expert + down, experts + (view.projection ? 0 : 1)) };
    setMark(view.pinned);
    const data = heatData();
    if (data) announce(heatmapText(data, view.pinned));
  } else if (event.key === "Enter" || event.key === " ") {
    openLayer(at.layer);
  } else if (event.key === "Escape") {
    view.pinned = null;
    setMark(null);
    closeLayer();
  } else return;
  event.preventDefault();
}

const tokenOf = (event) => (event.target.dataset && event.target.dataset.index !== undefined ? Number(event.target.dataset.index) : -1);
const on = (selector, type, handler) => $(selector).addEventListener(type, handler);
on(".strip", "pointerover", (event) => hover(tokenOf(event)));
on(".strip", "pointerleave", () => hover(-1));
on(".strip", "click", (event) => tokenOf(event) >= 0 && choose(tokenOf(event), false));
on(".strip", "keydown", stepTokens);
on(".strip", "scroll", ({ target }) => (view.atEnd = target.scrollHeight - target.scrollTop - target.clientHeight < 40));
on(".by-layer", "change", ({ target }) => chooseRouter(target.value === "" ? null : Number(target.value), view.router && view.router.name));
on(".by-projection", "change", ({ target }) => chooseRouter(view.router.layer, target.value));
on(".timeline", "pointermove", (event) => $(".timeline").token && hover(Math.max($(".timeline").token(event.clientX), view.meta.prompt), true));
on(".timeline", "pointerleave", () => hover(-1));
on(".timeline", "click", () => view.hovered >= 0 && choose(view.hovered));
on(".timeline", "keydown", stepTokens);
on(".heatmap", "pointermove", (event) => setMark(heatmapCell($(".heatmap"), event) || view.pinned));
on(".heatmap", "pointerleave", () => setMark(view.pinned));
on(".heatmap", "click", (event) => {
  const cell = heatmapCell($(".heatmap"), event);
  if (!cell || compact) return;
  view.pinned = cell;
  setMark(cell);
  openLayer(cell.layer);
});
on(".heatmap", "keydown", stepCells);
on(".layer", "click", ({ target }) => target.dataset.projection && chooseProjection(target.dataset.projection));
on(".layer", "keydown", (event) => event.key === "Escape" && (closeLayer(), $(".heatmap").focus(), repaint()));
on(".layer .all", "click", () => chooseProjection(null));
on(".layer .close", "click", () => (closeLayer(), repaint()));
on(".tokens tbody", "click", ({ target }) => target.closest("tr") && choose(Number(target.closest("tr").dataset.index)));
on(".prompt", "click", () => showPrompt(!$(".strip").classList.contains("with-prompt")));
on(".as-table", "click", () => showTables(!view.table));
all("[data-scope]").forEach((button) => button.addEventListener("click", () => setScope(button.dataset.scope)));

receive({ meta: null });
watch("value", () => receive(props.value));
receive(props.value);
