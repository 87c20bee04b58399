// Over the reply: lanes over one axis of tokens. Every lane has its own scale, and names its threshold or even share.
const LANE = 50;

function paintTimeline() {
  const { prompt } = view.meta;
  const canvas = $(".timeline");
  const lanes = timelineLanes();
  const style = theme(canvas);
  const { context, width } = surface(canvas, lanes.length * LANE + 18);
  const count = Math.max(replyLength(), 1);
  const plot = { left: GUTTER, width: width - GUTTER - 2 };
  const toX = (i) => plot.left + ((i + 0.5) / count) * plot.width;
  context.font = `11px ${style.font}`;
  lanes.forEach((lane, place) => drawLane(context, style, lane, place * LANE, plot, toX));
  const chosen = shownToken() - prompt;
  if (chosen >= 0) {
    context.fillStyle = style.text;
    context.globalAlpha = 0.7;
    lanes.forEach((_, place) => context.fillRect(Math.round(toX(chosen)), place * LANE + 16, 1, LANE - 21));
    context.globalAlpha = 1;
  }
  context.fillStyle = style.muted;
  context.textAlign = "center";
  context.textBaseline = "alphabetic";
  const marks = ticks(1, count, Math.max(2, Math.floor(width / 70))).filter(Number.isInteger);
  for (const mark of marks) context.fillText(String(mark), Math.min(Math.max(toX(mark - 1), plot.left + 3), width - 10), lanes.length * LANE + 14);
  canvas.lanes = lanes;
  canvas.token = (clientX) => Math.floor(((clientX - canvas.getBoundingClientRect().left - plot.left) / plot.width) * count) + prompt;
  canvas.setAttribute("aria-valuemin", 1);
  canvas.setAttribute("aria-valuemax", count);
  canvas.setAttribute("aria-valuenow", Math.max(chosen + 1, 1));
  canvas.setAttribute("aria-valuetext", $(".summary").textContent);
}

// {name, values, top, line, lineName, colour(i)}
function timelineLanes() {
  const { prompt, experts, threshold, limit } = view.meta;
  const means = view.means.slice(prompt);
  const cell = view.mark && view.mark.expert < experts ? view.mark : null;
  const own = cell || view.router;
  const even = own ? view.even[own.layer] : view.even.reduce((sum, value) => sum + value, 0) / view.even.length;
  const lanes = [
    { name: "Entropy", values: means.map((m) => m.entropy), top: 1, line: hasThreshold() ? threshold : null, lineName: `threshold ${number(threshold)}` },
    { name: "Active experts", values: means.map((m) => m.active), top: Math.max(...view.meta.counts), line: null },
    cell
      ? { name: `Weight of expert ${cell.expert + 1} in layer ${cell.layer + 1}`, colour: () => css(hue(cell.expert)), values: means.map((_, i) => view.weights[prompt + i][cell.layer * experts + cell.expert] / 255) }
      : strongestLane(means),
  ];
  const last = lanes[2];
  Object.assign(last, { line: even, lineName: `even ${number(even, 3)}`, top: ceiling(Math.max(even, ...last.values), 1 / even) });
  if (limit) lanes.push({ name: "Threshold τ", values: means.map((m) => m.threshold), top: limit, line: null });
  return lanes;
}

// Of the chosen router, in its experts' colours; else the mean over all.
function strongestLane(means) {
  const { router, meta } = view;
  if (!router) return { name: "Weight of the strongest expert", values: means.map((m) => m.strongest) };
  const found = means.map((_, i) => routerOf(meta.prompt + i));
  const known = (i) => found[i] && found[i].strongest >= 0;
  return {
    name: `Strongest expert of layer ${router.layer + 1}, ${router.name}`,
    colour: (i) => (known(i) ? css(hue(found[i].strongest)) : "transparent"),
    values: found.map((one, i) => (known(i) ? one.weights[one.strongest] / 255 : 0)),
  };
}

function drawLane(context, style, lane, y, plot, toX) {
  const [top, bottom] = [y + 16, y + LANE - 5];
  const toY = (value) => bottom - clamp(value / lane.top) * (bottom - top);
  context.textBaseline = "alphabetic";
  context.fillStyle = style.muted;
  context.textAlign = "left";
  const tag = lane.line === null ? "" : `– – ${lane.lineName}`;
  context.fillText(lane.name, plot.left, y + 11, plot.width - context.measureText(tag).width - 10); // narrower if it must
  context.textAlign = "right";
  context.fillText(number(lane.top), plot.left - 7, top + 6);
  context.fillText("0", plot.left - 7, bottom + 2);
  context.fillStyle = style.empty;
  context.fillRect(plot.left, top, plot.width, bottom - top);
  context.strokeStyle = style.accent;
  context.lineWidth = 1.6;
  context.lineJoin = "round";
  if (!lane.colour) {
    context.beginPath();
    lane.values.forEach((value, i) => (i ? context.lineTo(toX(i), toY(value)) : context.moveTo(toX(i), toY(value))));
    context.stroke();
  }
  const step = toX(1) - toX(0);
  if (lane.colour || lane.values.length === 1) {
    const wide = Math.max(1, step - (step > 4 ? 1 : 0));
    lane.values.forEach((value, i) => {
      context.fillStyle = lane.colour ? lane.colour(i) : style.accent;
      context.fillRect(toX(i) - wide / 2, toY(value), wide, Math.max(bottom - toY(value), 1));
    });
  }
  if (lane.line === null) return;
  context.strokeStyle = style.text;
  context.lineWidth = 1;
  context.setLineDash([4, 3]);
  context.beginPath();
  context.moveTo(plot.left, Math.round(toY(lane.line)) + 0.5);
  context.lineTo(plot.left + plot.width, Math.round(toY(lane.line)) + 0.5);
  context.stroke();
  context.setLineDash([]);
  context.fillStyle = style.muted;
  context.textAlign = "right";
  context.fillText(tag, plot.left + plot.width, y + 11);
}
