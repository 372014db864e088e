// Heat maps across layers, training curves, measures.
"use strict";

// --- heat maps ----------------------------------------------------------------------------------------------------

// A table of coloured cells. `value(row, column)` gives a number or nothing; home cells are framed.
function heatTable({ rows, columns, rowName, columnName, corner, value, tipOf, digits = 3 }) {
  const values = rows.flatMap((row) => columns.map((column) => value(row, column))).filter((v) => Number.isFinite(v));
  const low = Math.min(...values), high = Math.max(...values);
  const home = rows.some((row) => columns.includes(row) && Number.isFinite(value(row, row)));
  const log = low > 0 && high / low > 20;
  const place = (v) => (high === low ? 50 : log ? (100 * Math.log(v / low)) / Math.log(high / low) : (100 * (v - low)) / (high - low));
  const body = rows.map((row, i) => element("tr", {}, element("th", { scope: "row" }, rowName(row)), columns.map((column, j) => {
    const v = value(row, column);
    if (!Number.isFinite(v)) return element("td.none", {}, "–");
    const p = place(v), first = i === 0 && j === 0;
    return element(`td${p > 55 ? ".deep" : ""}${row === column ? ".home" : ""}`,
      { "--p": p.toFixed(1), "data-tip": tipOf(row, column, v), tabindex: first ? 0 : -1, keydown: stepInTable }, columns.length > 18 ? "" : Math.abs(v) < 1000 && v !== 0 && Math.abs(v) >= 0.001 ? minus(v.toPrecision(digits)) : number(v, digits));
  })));
  const head = element("tr", {}, element("th", { scope: "col" }, corner), columns.map((column) => element("th", { scope: "col" }, columnName(column))));
  return element("div", {},
    element("div.scroll", {}, element("table.heat", {}, element("thead", {}, head), element("tbody", {}, body))),
    element("p.scale", {}, number(low, digits), element("i", { "aria-hidden": "true" }), number(high, digits), [log ? "logarithmic colours" : "", home ? "framed: an SAE at home" : ""].filter(Boolean).map((text) => element("span", {}, text))));
}

// Arrow keys go from cell to cell; only one cell is a tab stop.
function stepInTable(event) {
  const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
  if (!step) return;
  const cell = event.currentTarget, row = cell.parentElement;
  const next = row.parentElement.rows[row.sectionRowIndex + step[0]]?.cells[cell.cellIndex + step[1]];
  if (!next?.matches("td[tabindex]")) return;
  event.preventDefault();
  cell.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
}

const METHODS = saerelay.labels.methods;

saerelay.views.layers = async function (body, query) {
  const run = await saerelay.load("run");
  if (!run.has.matrix) {
    body.append(missing("Every SAE on every layer's activations has not been measured yet.", "saerelay matrix RUN"));
    return;
  }
  const matrix = await saerelay.load("matrix");
  const methods = [...new Set(matrix.cells.map((cell) => cell.method))];
  const metrics = Object.keys(run.metrics).filter((name) => matrix.cells.some((cell) => Number.isFinite(cell[name])));
  const ages = [...new Set(matrix.cells.filter((cell) => cell.snapshot).map((cell) => cell.tokens))].sort((a, b) => a - b);
  const chosen = { metric: metrics[0], method: methods[0], age: "" };
  const picture = element("div");

  function draw() {
    const wanted = (cell) => (chosen.age ? cell.snapshot && String(cell.tokens) === chosen.age : !cell.snapshot && run.standing.includes(cell.leg));
    const cells = new Map();
    for (const cell of matrix.cells.filter(wanted))
      if (cell.method === chosen.method || cell.source === cell.target) cells.set(`${cell.source},${cell.target}`, cell);
    const [name, definition] = run.metrics[chosen.metric];
    const mean = (offset) => {
      const there = [...cells.values()].filter((cell) => cell.target - cell.source === offset && Number.isFinite(cell[chosen.metric]));
      return there.length ? number(there.reduce((sum, cell) => sum + cell[chosen.metric], 0) / there.length) : "–";
    };
    picture.replaceChildren(
      element("p", {}, `On average, ${name}: ${mean(0)} at home, ${mean(1)} on the next layer (forward), ${mean(-1)} on the previous one (backward).`),
      heatTable({
        rows: matrix.layers, columns: matrix.layers, corner: "SAE ↓ on layer →", digits: 3,
        rowName: (layer) => `SAE of ${layer}`, columnName: (layer) => layer,
        value: (source, target) => cells.get(`${source},${target}`)?.[chosen.metric],
        tipOf: (source, target, v) => `${name} ${number(v, 4)}\nSAE of layer ${source} on layer ${target}${source === target ? " (home)" : `, ${METHODS[chosen.method] ?? chosen.method}`}`,
      }),
      element("p.caption", {}, element("bdi", {}, run.caption), ` These cells are over the first ${matrix.n_tokens.toLocaleString("en")} of those tokens, so the SAEs at home differ a little from the summary; maps fitted on ${matrix.map_tokens.toLocaleString("en")} training tokens; nothing was trained on the target. ${definition}.`));
  }
  body.append(
    element("p.lead", {}, "Each layer's SAE on every layer's activations, untrained there: how far a dictionary carries before fine-tuning."),
    element("div.controls", {},
      choice("Metric", metrics.map((name) => [name, run.metrics[name][0]]), chosen.metric, (v) => { chosen.metric = v; draw(); }),
      choice("Carried", methods.map((name) => [name, METHODS[name] ?? name]), chosen.method, (v) => { chosen.method = v; draw(); }),
      ages.length ? choice("SAE at", [["", "its end"], ...ages.map((age) => [age, `${count(age)} tokens`])], "", (v) => { chosen.age = v; draw(); }) : null),
    picture);
  draw();
};

// --- lines --------------------------------------------------------------------------------------------------------

function layerColour(layer, layers) {
  const hue = 255 + (170 * layers.indexOf(layer)) / Math.max(1, layers.length - 1);
  return `light-dark(oklch(0.52 0.14 ${hue}), oklch(0.78 0.12 ${hue}))`;
}

function ticks(low, high, log) {
  if (log) {
    const decades = Math.log10(high / low), marks = decades > 2 ? [1] : decades > 0.8 ? [1, 2, 5] : [1, 1.5, 2, 3, 4, 5, 7];
    const found = [];
    for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e++) for (const m of marks) found.push(m * 10 ** e);
    return found.filter((t) => t >= low * 0.999 && t <= high * 1.001);
  }
  const rough = (high - low) / 5 || 1, unit = 10 ** Math.floor(Math.log10(rough));
  const step = unit * [1, 2, 5, 10].find((m) => m * unit >= rough);
  const found = [];
  for (let t = Math.ceil(low / step) * step; t <= high + step / 1e6; t += step) found.push(Math.abs(t) < step / 1e6 ? 0 : t);
  return found;
}

// Lines over tokens. `lines` are {id, name, colour, dashed, points: [[x, y], …]}; the nearest one is named under the pointer.
function lineChart({ lines, xLabel, yLabel, log, label }) {
  const W = innerWidth < 640 ? 420 : 960, H = innerWidth < 640 ? 320 : 420, left = 58, right = 14, top = 26, bottom = 42;
  const all = lines.flatMap((line) => line.points);
  const xs = all.map((p) => p[0]), ys = all.map((p) => p[1]);
  const [x0, x1] = [Math.min(0, ...xs), Math.max(...xs)];
  let [y0, y1] = [log ? Math.min(...ys) : Math.min(0, ...ys), Math.max(...ys)];
  if (y0 === y1) y1 = y0 + 1;
  const X = (v) => left + ((v - x0) / (x1 - x0 || 1)) * (W - left - right);
  const Y = (v) => H - bottom - (log ? Math.log(v / y0) / Math.log(y1 / y0) : (v - y0) / (y1 - y0)) * (H - top - bottom);
  const svg = element("svg.chart", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": label });
  for (const t of ticks(y0, y1, log)) svg.append(
    element("line.grid", { x1: left, x2: W - right, y1: Y(t), y2: Y(t) }), element("text", { x: left - 8, y: Y(t) + 4, "text-anchor": "end" }, number(t)));
  for (const t of ticks(x0, x1)) svg.append(element("text", { x: X(t), y: H - bottom + 18, "text-anchor": "middle" }, Number.isInteger(t) ? minus(count(t)) : number(t)));
  svg.append(
    element("text", { x: (left + W - right) / 2, y: H - 6, "text-anchor": "middle" }, xLabel), element("text", { x: 4, y: 13 }, yLabel + (log ? ", logarithmic" : "")));
  const curves = new Map();
  for (const line of lines) {
    const points = line.points.map(([x, y]) => `${X(x).toFixed(1)},${Y(y).toFixed(1)}`).join(" ");
    const curve = element(`polyline.curve${line.dashed ? ".control" : ""}`, { points });
    curve.style.color = line.colour;
    curves.set(line.id, curve);
    svg.append(curve);
  }
  const light = (id) => { for (const [own, curve] of curves) curve.setAttribute("class", curve.getAttribute("class").replace(/ (dim|lit)/g, "") + (id === null ? "" : own === id ? " lit" : " dim")); };
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect(), px = ((event.clientX - box.left) * W) / box.width, py = ((event.clientY - box.top) * H) / box.height;
    let nearest = null, best = 30 ** 2;
    for (const line of lines) for (const [x, y] of line.points) {
      const distance = (X(x) - px) ** 2 + (Y(y) - py) ** 2;
      if (distance < best) [nearest, best] = [{ line, x, y }, distance];
    }
    if (nearest) svg.dataset.tip = `${nearest.line.name}\n${yLabel} ${number(nearest.y, 4)} at ${xLabel} ${Number.isInteger(nearest.x) ? count(nearest.x) : number(nearest.x)}`;
    else delete svg.dataset.tip;
    light(nearest ? nearest.line.id : pinned);
  });
  svg.addEventListener("pointerleave", () => light(pinned));
  let pinned = null;
  const swatches = lines.map((line) => {
    const mark = element("i", { "aria-hidden": "true" });
    mark.style.color = line.colour;
    return element(line.dashed ? "li.control" : "li", {}, element("button", {
      type: "button", "aria-pressed": "false",
      click: (event) => {
        pinned = pinned === line.id ? null : line.id;
        for (const button of event.currentTarget.closest("ul").querySelectorAll("button")) button.setAttribute("aria-pressed", "false");
        event.currentTarget.setAttribute("aria-pressed", String(pinned !== null));
        light(pinned);
      },
    }, mark, line.name));
  });
  return element("figure", {}, element("ul.swatches", {}, swatches), svg);
}

const CURVES = {
  fvu: ["FVU", "FVU on the training tokens of each block: E‖x − x̂‖² / E‖x − E x‖², lower is better", true],
  loss: ["loss", "Training loss: reconstruction error in normalised units, with the auxiliary terms", true],
  l0: ["L0", "L0: mean number of active latents per token", false],
  n_dead: ["dead latents", "Latents silent for longer than the leg's window (dead_after_tokens)", false],
  learning_rate: ["learning rate", "The optimiser's learning rate", false],
};

saerelay.views.training = async function (body) {
  const [run, training] = await Promise.all([saerelay.load("run"), saerelay.load("training")]);
  const legs = run.legs.filter((leg) => training[leg.id]).sort((a, b) => a.layer - b.layer || (a.role === "control") - (b.role === "control"));
  const layers = [...new Set(legs.map((leg) => leg.layer))];
  const names = Object.keys(CURVES).filter((name) => legs.some((leg) => training[leg.id][name].some(Number.isFinite)));
  const chosen = { metric: names[0], legs: "all" };
  const picture = element("div");

  function draw() {
    const [name, definition, log] = CURVES[chosen.metric];
    const shown = legs.filter((leg) => chosen.legs === "all" || (leg.role === "control") === (chosen.legs === "controls"));
    const lines = shown.map((leg) => ({
      id: leg.id, name: leg.id, colour: layerColour(leg.layer, layers), dashed: leg.role === "control",
      points: training[leg.id].age.map((age, i) => [age, training[leg.id][chosen.metric][i]]).filter(([, y]) => Number.isFinite(y) && (!log || y > 0)),
    })).filter((line) => line.points.length);
    picture.replaceChildren(
      lineChart({ lines, xLabel: "tokens of its own", yLabel: name, log, label: `${name} of every SAE over its own training tokens` }),
      element("p.caption", {}, element("bdi", {}, run.caption), ` ${definition}. A mean over each block; dashed: controls. Values within a run are not those of a shorter run: the learning rate has not decayed.`));
  }
  body.append(
    element("p.lead", {}, "Each SAE over its own tokens: transferred ones start where their parent's knowledge puts them."),
    element("div.controls", {},
      choice("Shown", names.map((name) => [name, CURVES[name][0]]), chosen.metric, (v) => { chosen.metric = v; draw(); }),
      legs.some((leg) => leg.role === "control") ? choice("SAEs", [["all", "all"], ["suite", "the suite"], ["controls", "controls"]], "all", (v) => { chosen.legs = v; draw(); }) : null),
    picture);
  draw();
};

// --- measures -----------------------------------------------------------------------------------------------------

// Rows of a document as a table; `columns` are [name in the rows, heading, how to write it].
function plainTable(rows, columns) {
  const head = element("tr", {}, columns.map(([, heading, write]) => element(write ? "th.n" : "th", { scope: "col" }, heading)));
  const body = rows.map((row) => element("tr", {}, columns.map(([name, , write]) => element(write ? "td.n" : "td", {}, write ? write(row[name]) : element("bdi", {}, String(row[name] ?? "–"))))));
  return element("div.scroll", {}, element("table", {}, element("thead", {}, head), element("tbody", {}, body)));
}

saerelay.views.measures = async function (body) {
  const run = await saerelay.load("run");
  if (!run.has.measures) {
    body.append(missing("What dictionaries have in common (mean maximum cosine similarity, feature transferability, transfer scores, averages by layer offset, direct logit attribution) has not been measured yet.", "saerelay measures RUN"));
    return;
  }
  const measures = await saerelay.load("measures");
  const final = (rows) => (rows ?? []).filter((row) => !row.snapshot);
  const caption = (text) => element("p.caption", {}, element("bdi", {}, run.caption), ` ${text}`);
  const layerOf = Object.fromEntries(run.legs.map((leg) => [leg.id, leg.layer]));
  body.append(element("p.lead", {}, "What the dictionaries of different layers have in common, and what transfer brought, as measured by Ghilardi et al. 2024."));

  const pairs = final(measures.similarity).filter((row) => row.kind === "suite");
  if (pairs.length) {
    const picture = element("div");
    const draw = (name) => picture.replaceChildren(heatTable({
      rows: run.standing, columns: run.standing, corner: "from ↓ to →", rowName: (leg) => `layer ${layerOf[leg]}`, columnName: (leg) => layerOf[leg], digits: 2,
      value: (source, target) => pairs.find((row) => row.source === source && row.target === target)?.[name],
      tipOf: (source, target, v) => `${number(v, 4)}: latents of layer ${layerOf[source]} in layer ${layerOf[target]}`,
    }));
    draw("mmcs_folded");
    body.append(element("h2", {}, "Mean maximum cosine similarity"),
      element("div.controls", {}, choice("Compared", [["mmcs_folded", "folded through the map between the layers"], ["mmcs", "raw, as in the paper"]], "mmcs_folded", draw)), picture,
      caption("Mean over the source's alive latents of the largest cosine with a decoder row of the target's alive ones. Raw spaces of two layers are not comparable, hence the folded one."));
  }
  const transferability = final(measures.transferability);
  if (transferability.length) body.append(element("h2", {}, "Feature transferability"),
    plainTable(transferability, [["leg", "SAE"], ["parent", "from"], ["n_latents", "latents", (n) => n.toLocaleString("en")], ["top_logits", "promoted tokens", fixed], ["bottom_logits", "suppressed tokens", fixed], ["top_tokens", "firing tokens", fixed], ["transferability", "mean", fixed]]),
    caption("Shares of tokens that a latent and the one it came from have in common: among those it promotes, suppresses, and fires on; over latents alive in both."));
  const scores = final(measures.transfer_scores);
  if (scores.length) body.append(element("h2", {}, "Transfer score"),
    plainTable(scores, [["leg", "SAE"], ["parent", "from"], ["scratch", "against"], ["method", "zero-shot by"], ["fvu", "FVU", fixed], ["ce_loss_score", "CE score", fixed]]),
    caption("(transferred − zero-shot) / (from scratch − zero-shot): 0 is the parent carried over untrained, 1 the one from scratch; above 1 transfer did better. –: carried over untrained it is already as good as scratch. Each over the tokens of “Across layers”."));
  if (measures.offsets?.length) {
    const metrics = [...new Set(measures.offsets.map((row) => row.metric))];
    const picture = element("div");
    const draw = (metric) => {
      const rows = measures.offsets.filter((row) => row.metric === metric && !row.tokens && Number.isFinite(row.mean));
      const methods = [...new Set(rows.map((row) => row.method))];
      const positive = rows.every((row) => row.mean > 0);
      picture.replaceChildren(lineChart({
        xLabel: "target layer − source layer", yLabel: run.metrics[metric]?.[0] ?? metric, log: positive && metric !== "l0", label: `${metric} by layer offset`,
        lines: methods.map((method) => ({ id: method, name: METHODS[method] ?? method, colour: layerColour(method, methods), points: rows.filter((row) => row.method === method).map((row) => [row.offset, row.mean]).sort((a, b) => a[0] - b[0]) })),
      }));
    };
    draw(metrics[0]);
    body.append(element("h2", {}, "By distance between layers"),
      element("div.controls", {}, choice("Metric", metrics.map((name) => [name, run.metrics[name]?.[0] ?? name]), metrics[0], draw)), picture,
      caption("Means of the cells of “Across layers” by target minus source layer. (The paper's offsets have the other sign.)"));
  }
  if (measures.dla?.legs?.length) body.append(element("h2", {}, "Direct logit attribution"),
    plainTable(final(measures.dla.legs), [["leg", "SAE"], ["layer", "layer", number], ["mean", "mean", (v) => fixed(v, 1)], ["standard_error", "± standard error", (v) => fixed(v, 1)]]),
    caption(`Mean over ${measures.dla.n_prompts} prompts of the largest, over latents, of activation × decoder row · (unembedding of the correct − of the wrong token).`));
};
