// drawAtlas(page, { atlases, comparison }) fills an element with the tables of one atlas, or of two side by side. The
// file that `mole atlas --html` writes and the studio's Atlas tab both draw with it. Texts are only ever set as text.
function drawAtlas(page, data) {
  "use strict";
  const { atlases, comparison } = data;
  const state = { atlas: 0, variable: 0, projection: 0 };

  function element(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name === "onclick" || name === "onchange") made[name] = value;
      else if (name === "share") made.style.setProperty("--share", String(value));
      else made.setAttribute(name, value);
    }
    made.append(...children.filter((child) => child !== null));
    return made;
  }
  const text = (tag, words, attributes = {}) => element(tag, attributes, words);
  const percent = (share) => `${(100 * share).toFixed(share < 0.0995 && share > 0 ? 1 : 0)} %`;
  const shown = (token) => JSON.stringify(token).slice(1, -1).replaceAll('\\"', '"');
  const best = (values) => values.reduce((most, value, place) => (value > values[most] ? place : most), 0);
  const expertName = (number, experts) => (number === experts ? "none" : `expert ${number + 1}`);

  function table(caption, head, rows) {
    const made = element("table", {}, element("caption", {}, text("span", caption)));
    made.append(element("thead", {}, element("tr", {}, ...head.map((name) => text("th", name, { scope: "col", ...(WORDS.includes(name) ? { class: "text" } : {}) })))));
    const body = element("tbody");
    for (const [name, ...cells] of rows) body.append(element("tr", {}, text("th", name, { scope: "row" }), ...cells));
    made.append(body);
    return element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption }, made);
  }
  const WORDS = ["characteristic tokens", "contexts"];
  const cell = (words) => text("td", words);
  const shaded = (words, share, title) =>
    text("td", words, { class: "shaded", share: Math.min(1, Math.max(0, share)), ...(title ? { title } : {}) });
  const words = (...children) => element("td", { class: "text" }, ...children);

  function choice(label, names, chosen, change) {
    const select = element("select", { onchange: (event) => change(Number(event.target.value)) });
    names.forEach((name, place) => select.append(element("option", { value: String(place) }, name)));
    select.value = String(chosen);
    return element("label", {}, label, select);
  }

  // Rows are layers, columns the projections of a layer; `make(place)` is the cell of a projection.
  function byLayer(projections, caption, make) {
    const kinds = [...new Set(projections.map((one) => one.kind))];
    const layers = [...new Set(projections.map((one) => one.layer))].sort((a, b) => a - b);
    const at = new Map(projections.map((one, place) => [`${one.layer} ${one.kind}`, place]));
    return table(caption, ["layer", ...kinds], layers.map((layer) => [
      String(layer),
      ...kinds.map((kind) => (at.has(`${layer} ${kind}`) ? make(at.get(`${layer} ${kind}`)) : cell(""))),
    ]));
  }

  function facts(atlas) {
    const rejected = atlas.rejected ? `, ${atlas.rejected} left out` : "";
    return element("p", { class: "faint" },
      `${atlas.target}: router ${atlas.router}, up to ${atlas.experts} experts in ${atlas.projections.length} projections, ` +
      `on ${atlas.base}. ${atlas.rows} rows of ${atlas.data}${rejected}, ${atlas.tokens} tokens.`,
      ...atlas.notices.flatMap((notice) => [element("br"), notice]));
  }

  function specialisation(atlas) {
    const variable = atlas.variables[state.variable];
    const { bits, share, chance, deviation, excess, clear } = variable.specialisation;
    const most = Math.max(1e-9, ...excess);
    const caption = `Bits that the choice of experts tells of ${variable.name} above chance. Brackets: no more than chance gives.`;
    const part = element("section", {}, text("h2", "Specialisation"), text("p",
      "Mutual information between the experts chosen and what a token is, less what is left of it when each row's routing " +
      `is paired with another row's values (mean of ${atlas.shuffles}). Choose a cell to see that router.`));
    part.append(element("div", { class: "controls" }, choice("Look at", atlas.variables.map((one) => one.name), state.variable,
      (place) => { state.variable = place; draw("Look at"); })));
    const found = clear.filter(Boolean).length, where = best(excess);
    part.append(element("p", {}, found
      ? `Clear in ${found} of ${clear.length} routers, most in ${atlas.projections[where].name}: ${excess[where].toFixed(3)} bits. `
      : "No router tells more than chance gives. ",
      text("button", "See the chosen router", { class: "link", onclick: () => page.querySelector(".router").scrollIntoView({ behavior: "smooth" }) })));
    part.append(byLayer(atlas.projections, caption, (place) => {
      const value = excess[place].toFixed(3);
      const title = `${atlas.projections[place].name}: ${bits[place].toFixed(4)} bits, ${percent(share[place])} of the most ` +
        `there can be; by chance ${chance[place].toFixed(4)} ± ${deviation[place].toFixed(4)}`;
      const button = element("button", { title, "aria-label": title, "aria-pressed": String(place === state.projection),
        onclick: () => { state.projection = place; draw("router"); } }, clear[place] ? value : `(${value})`);
      return element("td", { class: "cell shaded", share: clear[place] ? excess[place] / most : 0 }, button);
    }));
    return part;
  }

  function router(atlas) {
    const projection = atlas.projections[state.projection];
    const part = element("section", { class: "router" }, text("h2", "One router"));
    part.append(element("div", { class: "controls" }, choice("Router", atlas.projections.map((one) => one.name),
      state.projection, (place) => { state.projection = place; draw("Router"); })));
    part.append(text("p", `A token uses ${projection.active.toFixed(2)} experts in the mean, and gives the strongest ` +
      `${percent(projection.strongest)} of its weight; entropy ${projection.entropy.toFixed(3)}` +
      (projection.idle > 0 ? `; ${percent(projection.idle)} of the tokens use none.` : ".")));
    part.append(table("Experts: their share of all weight, the tokens that use them, what is characteristic of them (lift, count), " +
      "and where they were strongest", ["expert", "weight", "used by", "characteristic tokens", "contexts"],
      projection.usage.map((usage, expert) => [
        String(expert + 1), shaded(percent(usage), usage), cell(percent(projection.used[expert])),
        words(...projection.vocabulary[expert].map((one) => element("span", { class: "word" },
          text("code", shown(one.token)), ` ×${one.lift} (${Math.round(one.count)})`))),
        words(...projection.contexts[expert].map((one) => element("div", { class: "quote", title: `row ${one.row}, weight ${one.weight}` },
          shown(one.before), text("mark", shown(one.token)), shown(one.after)))),
      ])));
    for (const variable of atlas.variables.filter((one) => one.matrix)) {
      const clear = variable.specialisation.clear[state.projection];
      const experts = variable.matrix[state.projection][0].length - 1;
      const used = [...Array(projection.experts).keys(), ...(projection.idle > 0 ? [experts] : [])];
      part.append(table(`${variable.name}: share of each expert in its tokens${clear ? "" : " (no more than chance gives)"}`,
        [variable.name, "tokens", ...used.map((expert) => expertName(expert, experts))],
        variable.values.map((value, place) => [value, cell(String(variable.tokens[place])),
          ...used.map((expert) => {
            const share = variable.matrix[state.projection][place][expert];
            return shaded(percent(share), share);
          })])));
    }
    part.append(table("Co-activation: of the tokens that use the expert of the row, how many use that of the column too",
      ["", ...projection.coactivation.map((_, expert) => expertName(expert, -1))],
      projection.coactivation.map((row, expert) => [expertName(expert, -1), ...row.map((share) => shaded(percent(share), share))])));
    const path = atlas.paths.find((one) => one.kind === projection.kind && one.from === projection.layer);
    if (path) part.append(paths(path));
    return part;
  }

  function paths(path) {
    const experts = path.tokens.length - 1;
    const rows = [...path.tokens.keys()].filter((expert) => path.tokens[expert].some((count) => count > 0));
    const columns = [...path.tokens.keys()].filter((expert) => path.tokens.some((row) => row[expert] > 0));
    return table(`Paths: strongest expert in layer ${path.from} (rows) and in layer ${path.to} (columns); one tells ` +
      `${percent(path.share)} of the other`, ["", ...columns.map((expert) => expertName(expert, experts))],
      rows.map((expert) => {
        const all = path.tokens[expert].reduce((sum, count) => sum + count, 0);
        return [expertName(expert, experts), ...columns.map((next) =>
          shaded(percent(path.tokens[expert][next] / all), path.tokens[expert][next] / all, `${path.tokens[expert][next]} tokens`))];
      }));
  }

  function saturation(atlas) {
    const { steps, by_k: numbers, rows } = atlas.saturation;
    const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
    return element("section", {}, text("h2", "Saturation"), text("p",
      "How many of the experts that a token has at the end of training it had already at a checkpoint (OLMoE, section 5)."),
      table(`Mean over all routers, on ${rows} rows`, ["checkpoint", ...Object.keys(numbers).map((k) => `strongest ${k}`), "this router"],
        steps.map((step, place) => [`step ${step}`,
          ...Object.values(numbers).map((values) => shaded(percent(mean(values[place])), mean(values[place]))),
          cell(Object.values(numbers).map((values) => percent(values[place][state.projection])).join(" · "))])));
  }

  function muting(atlas) {
    const { experts, rows, loss } = atlas.muting;
    const layers = [...new Set(experts.map((one) => one.layer))];
    const most = Math.max(1e-9, ...experts.map((one) => one.increase));
    const columns = Math.max(...experts.map((one) => one.expert)) + 1;
    return element("section", {}, text("h2", "How much each expert matters"), text("p",
      `The increase of the loss (${loss.toFixed(3)} nats a token) when one expert of a layer is muted, ± its standard error, on ${rows} rows.`),
      table("Increase in nats; brackets: less than six standard errors from 0, no more than chance gives", ["layer", ...[...Array(columns).keys()].map((expert) => expertName(expert, -1))],
        layers.map((layer) => [String(layer), ...[...Array(columns).keys()].map((expert) => {
          const one = experts.find((other) => other.layer === layer && other.expert === expert);
          if (!one) return cell("");
          const value = one.increase.toFixed(3);
          return shaded(one.clear ? value : `(${value})`, one.clear ? one.increase / most : 0, `${value} ± ${one.error.toFixed(4)}`);
        })])));
  }

  function sideBySide() {
    const { targets, projections, specialisation: variables, ...others } = comparison;
    const mean = (values) => values.reduce((sum, value) => sum + value, 0) / Math.max(1, values.length);
    const row = (name, values) => [name, ...values.map((one) => cell(mean(one).toFixed(4))), cell((mean(values[1]) - mean(values[0])).toFixed(4))];
    return element("section", {}, text("h2", "Side by side"), text("p",
      `Means over the ${projections.length} projections that both have. Experts are not matched: their numbers mean nothing outside their router.`),
      table("Bits above chance, and how sharply the routers choose", ["", ...targets, "difference"], [
        ...Object.entries(variables).map(([name, values]) => row(`bits: ${name}`, values)),
        ...Object.entries(others).map(([name, values]) => row({ entropy: "entropy", active: "experts used", strongest: "weight of the strongest" }[name], values)),
      ]));
  }

  function draw(focus) {
    const atlas = atlases[state.atlas];
    state.variable = Math.min(state.variable, atlas.variables.length - 1);
    state.projection = Math.min(state.projection, atlas.projections.length - 1);
    page.replaceChildren(...atlases.map(facts));
    if (comparison) {
      page.append(sideBySide(), element("div", { class: "controls" }, choice("Show", atlases.map((one) => one.target), state.atlas,
        (place) => { state.atlas = place; draw("Show"); })));
    }
    page.append(specialisation(atlas), router(atlas));
    if (atlas.saturation) page.append(saturation(atlas));
    if (atlas.muting) page.append(muting(atlas));
    if (focus === "router") page.querySelector('button[aria-pressed="true"]').focus({ preventScroll: true });
    else if (focus) [...page.querySelectorAll("label")].find((label) => label.firstChild.data === focus)?.querySelector("select").focus();
  }
  state.variable = Math.max(0, atlases[0].variables.findIndex((one) => one.kind === "column"));
  state.projection = best(atlases[0].variables[state.variable].specialisation.excess);
  draw();
}
