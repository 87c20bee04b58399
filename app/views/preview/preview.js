// Rows of data as tokens. Value: counts, lengths, rejected rows, and some rows:
// {number, texts: [str], ids: [int], flags: "0…3" (1: carries loss, 2: special), dropped, cut, held_out, source}.
const FIRST = 200; // of a long row only the beginning and the end are drawn, the middle on request
const LAST = 500;
const view = { data: null, at: 0 };
const repaint = painter(element, paint);

function receive(value) {
  if (!value) return;
  if (value.stale) {
    $(".stale").hidden = false;
    return;
  }
  Object.assign(view, { data: value, at: 0 });
  $(".empty").hidden = true;
  $(".seen").hidden = false;
  $(".stale").hidden = true;
  $(".usable").hidden = !value.rows.length;
  writeRefused();
  if (!value.rows.length) return;
  write();
  turn(0);
  repaint();
}

function write() {
  const { data } = view;
  const weighted = data.sources.some((one) => one.weight !== 1);
  const share = Math.round((100 * data.learnt_tokens) / Math.max(data.tokens, 1));
  $(".about").textContent = `${data.complete ? "" : `The first ${plural(data.looked_at, "row")} of ${data.sources.length ? "larger files" : "a larger file"}. `}${data.source} as ${data.shape}, tokenised for ${data.model}: ${plural(data.tokens, "token")}${weighted ? " an epoch" : ""}, ${share} % of them carry loss.`;
  const tiles = { used: data.used, held: data.held_out, truncated: data.truncated, rejected: data.rejected };
  for (const [name, count] of Object.entries(tiles)) $(`[data-tile="${name}"]`).textContent = grouped(count);
  for (const kind of ["truncated", "rejected"]) $(`[data-kind="${kind}"]`).classList.toggle("warn", data[kind] > 0);
  $('[data-kind="used"] dt').textContent = weighted ? "Per epoch" : "Used";
  writeSources();
  $(".notices").replaceChildren(...data.notices.map((text) => make("li", {}, text)));
}

function writeSources() {
  const { sources } = view.data;
  $(".sources").hidden = !sources.length;
  $(".sources tbody").replaceChildren(...sources.map(({ name, shape, weight, used, held_out: held, rejected }) => {
    const cells = [`× ${weight}`, grouped(used), grouped(held), grouped(rejected)].map((text) => make("td", {}, text));
    return make("tr", {}, make("th", { scope: "row" }, name, make("span", {}, `as ${shape}`)), ...cells);
  }));
}

function writeRefused() {
  const { data } = view;
  $(".refused").classList.toggle("several", data.rejections.some((item) => item.source));
  $(".refused").hidden = !data.rejected;
  $(".refused-title").textContent = data.rejected > data.rejections.length ? `The first ${data.rejections.length} of ${plural(data.rejected, "rejected row")}` : plural(data.rejected, "rejected row");
  $(".refused tbody").replaceChildren(...data.rejections.map(({ row, reason, source }) => {
    return make("tr", {}, make("th", { scope: "row" }, source ? `${source}, ${grouped(row)}` : grouped(row)), make("td", {}, reason));
  }));
}

function turn(step) {
  const { data } = view;
  view.at = Math.max(0, Math.min(data.rows.length - 1, view.at + step));
  const row = data.rows[view.at];
  const learnt = [...row.flags].filter((flag) => flag & 1).length;
  $(".which").textContent = `${row.source ? `${row.source}, row` : "Row"} ${grouped(row.number)}${row.held_out ? ", held out" : ""} · ${plural(row.texts.length, "token")}, ${grouped(learnt)} carry loss · ${view.at + 1} of ${data.rows.length} shown`;
  $(".previous").disabled = view.at === 0;
  $(".next").disabled = view.at === data.rows.length - 1;
  $(".tokens").scrollTop = 0;
  drawRow(row, row.texts.length <= FIRST + LAST);
  $(".spoken").textContent = spoken(row);
}

function drawRow(row, whole) {
  const count = row.texts.length;
  const chips = (from, to) => Array.from({ length: to - from }, (_, i) => chip(row, from + i));
  const items = whole ? chips(0, count) : [...chips(0, FIRST), more(row, count - FIRST - LAST), ...chips(count - LAST, count)];
  if (row.dropped) items.unshift(make("span", { className: "cut" }, `… ${plural(row.dropped, "token")} of the prompt left out`));
  if (row.cut) items.push(make("span", { className: "cut" }, `… ${plural(row.cut, "token")} of the answer cut off`));
  $(".tokens").replaceChildren(...items);
}

function more(row, hidden) {
  const button = make("button", { type: "button", className: "more" }, `… ${grouped(hidden)} more tokens`);
  button.tabIndex = -1; // what it shows is in the spoken text
  button.addEventListener("click", () => drawRow(row, true));
  return button;
}

function chip(row, index) {
  const flag = Number(row.flags[index]);
  const className = `chip${flag & 1 ? " learnt" : ""}${flag & 2 ? " special" : ""}`;
  return make("span", { className, title: `Token ${row.ids[index]}` }, ...visible(row.texts[index]));
}

// White space made visible: ␣ for a space, ⏎ for the end of a line, ⇥ for a tab, ∅ for part of a character.
function visible(text) {
  if (!text) return [make("span", { className: "mark" }, "∅")];
  const signs = { " ": "␣", "\n": "⏎\n", "\t": "⇥", "\r": "␍" };
  return text.split(/([ \n\t\r])/).filter(Boolean).map((part) => (signs[part] ? make("span", { className: "mark" }, signs[part]) : part));
}

function spoken(row) {
  const parts = [];
  row.texts.forEach((text, i) => {
    const kind = row.flags[i] & 1 ? "Carries loss" : "Read only";
    if (!parts.length || parts[parts.length - 1].kind !== kind) parts.push({ kind, text: "" });
    parts[parts.length - 1].text += text;
  });
  const cut = `${row.dropped ? `${plural(row.dropped, "token")} of the prompt left out. ` : ""}${row.cut ? `${plural(row.cut, "token")} of the answer cut off. ` : ""}`;
  return cut + parts.map(({ kind, text }) => `${kind}: ${text}`).join(" ");
}

function paint() {
  if (!view.data || !view.data.rows.length) return;
  const { lengths, max_length: limit } = view.data;
  const text = `longest ${grouped(lengths.longest)}, max_length ${grouped(limit)}`;
  $(".lengths-text").textContent = text;
  $(".lengths").setAttribute("aria-label", `Histogram of the rows' lengths in tokens: ${text}, ${plural(view.data.truncated, "row")} truncated.`);
  drawLengths($(".lengths"), lengths, limit);
}

// A histogram of lengths; rows longer than max_length have another colour, and max_length is a line where it fits.
function drawLengths(canvas, { width: step, counts, open }, limit) {
  const style = theme(canvas);
  const { context, width, height } = surface(canvas, 132);
  const plot = { left: GUTTER + 8, right: width - 6, top: 16, bottom: height - 22 };
  const end = counts.length * step;
  const far = limit > 1.5 * end;
  const last = far ? end : Math.max(end, limit * 1.04);
  const most = Math.max(...counts);
  const toX = (v) => plot.left + (v / last) * (plot.right - plot.left);
  const toY = (v) => plot.bottom - (v / most) * (plot.bottom - plot.top);
  counts.forEach((count, i) => {
    const [x, w] = [toX(i * step), Math.max(toX((i + 1) * step) - toX(i * step) - 1, 1)];
    context.fillStyle = i * step >= limit ? "#d55e00" : style.accent;
    if (count) context.fillRect(x, Math.min(toY(count), plot.bottom - 1.5), w, Math.max(plot.bottom - toY(count), 1.5));
  });
  context.font = `11px ${style.font}`;
  context.fillStyle = style.muted;
  context.fillRect(plot.left, plot.bottom, plot.right - plot.left, 1);
  context.textBaseline = "middle";
  context.textAlign = "right";
  for (const v of ticks(0, most, 2)) if (v && Number.isInteger(v)) context.fillText(grouped(v), plot.left - 7, toY(v));
  context.textAlign = "center";
  for (const v of ticks(0, last, Math.max(2, Math.floor(width / 80)))) {
    if (Number.isInteger(v)) context.fillText(grouped(v), Math.min(toX(v), plot.right - 12), height - 8);
  }
  context.textAlign = "right";
  if (open) context.fillText("and longer", plot.right, toY(counts[counts.length - 1]) - 8);
  context.fillStyle = style.text;
  const x = far ? plot.right : toX(limit);
  if (!far) context.fillRect(x - 0.75, plot.top - 8, 1.5, plot.bottom - plot.top + 8);
  context.textAlign = far || x > width / 2 ? "right" : "left";
  context.fillText(far ? `max_length ${grouped(limit)} →` : "max_length", x + (far ? 0 : x > width / 2 ? -6 : 6), plot.top - 6);
}

$(".previous").addEventListener("click", () => turn(-1));
$(".next").addEventListener("click", () => turn(1));
watch("value", () => receive(props.value));
receive(props.value);
