// Features: what became of them over depth, the list, a feature's page, the same feature side by side.
"use strict";

const FATES = saerelay.labels.fates;
const SORTS = {
  match: ["best match", (a, b) => b.hits - a.hits || b.fired - a.fired],
  id: ["number", (a, b) => a.latent - b.latent],
  often: ["fires most often", (a, b) => b.fired - a.fired],
  rarely: ["fires most rarely", (a, b) => a.fired - b.fired],
  strong: ["strongest", (a, b) => b.max - a.max],
  changed: ["changed most", (a, b) => (a.cosine ?? 2000) - (b.cosine ?? 2000)],
};
const DENSITIES = [["", "any"], ["0", "never"], ["0.0000001-0.0001", "under 0.01 %"], ["0.0001-0.001", "0.01 to 0.1 %"], ["0.001-0.01", "0.1 to 1 %"], ["0.01-0.1", "1 to 10 %"], ["0.1-1", "over 10 %"]];
const PAGE = 60;

// --- reading ------------------------------------------------------------------------------------------------------

async function readFeature(legId, latent) {
  const run = await saerelay.load("run");
  const leg = run.legs.find((one) => one.id === legId);
  if (!leg || !(Number.isInteger(latent) && latent >= 0 && latent < leg.n_latents)) throw new Error(`No feature ${latent} in ${legId}.`);
  const chunk = await saerelay.load(`features/${legId}/${Math.floor(latent / run.chunk)}`);
  const pairs = (flat, unit) => Array.from({ length: flat.length / 2 }, (_, i) => [flat[2 * i], flat[2 * i + 1] / unit]);
  const feature = { leg, latent };
  for (const [name, column] of Object.entries(chunk)) feature[name] = column[latent % run.chunk];
  for (const [name, unit] of [["top", 100], ["bottom", 100], ["above", 1000], ["below", 1000]]) if (feature[name]) feature[name] = pairs(feature[name], unit);
  return feature;
}

function linkOf(run, kind, source, target) {
  return run.links.findIndex((link) => link.kind === kind && link.source === source && link.target === target);
}

// One step of a link from latent i: where it leads, and what became of it. Latents of one root keep their number.
async function step(number, i) {
  const link = await saerelay.load(`links/${number}`);
  const to = link.partner ? link.partner[i] : i;
  return { to: to < 0 ? null : to, status: link.status[i], decoder: link.decoder_cosine[i], encoder: link.encoder_cosine[i], correlation: link.correlation[i] };
}

async function stepBack(number, j) {
  const link = await saerelay.load(`links/${number}`);
  const from = link.partner ? link.partner.indexOf(j) : j;
  return from < 0 ? null : from;
}

// A latent through all layers: for each SAE that stands for its layer, which latent it is there, and the step onwards.
async function thread(legId, latent) {
  const run = await saerelay.load("run"), legs = run.standing, here = legs.indexOf(legId);
  if (here < 0) return [];
  const stops = legs.map((leg) => ({ leg, latent: null, step: null }));
  stops[here].latent = latent;
  for (let c = here; c > 0 && stops[c].latent !== null; c--) {
    const link = linkOf(run, "depth", legs[c - 1], legs[c]);
    if (link >= 0) stops[c - 1].latent = await stepBack(link, stops[c].latent);
  }
  for (let c = 0; c + 1 < legs.length; c++) {
    const link = linkOf(run, "depth", legs[c], legs[c + 1]);
    if (link < 0 || stops[c].latent === null) continue;
    stops[c].step = await step(link, stops[c].latent);
    if (c >= here) stops[c + 1].latent = stops[c].step.to;
  }
  return stops;
}

const layerName = (run, legId) => `layer ${run.legs.find((leg) => leg.id === legId).layer}`;
const tell = (s) => `${FATES[s.status]}: decoder cosine ${cosine(s.decoder)}, encoder ${cosine(s.encoder)}, correlation of activations ${cosine(s.correlation)}`;

function fate(status) {
  return element(`span.fate.${status.replace("-", "x")}`, {}, FATES[status]);
}

// The thread as a row of stops; each links to the feature there.
async function strand(stops, current) {
  const run = await saerelay.load("run"), vocabulary = await saerelay.load("vocabulary"), tokens = await saerelay.load("tokens");
  const items = [];
  for (const stop of stops) {
    const layer = layerName(run, stop.leg), s = stop.step;
    const classes = ["li", current === stop.leg ? "here" : "", s && s.to !== null ? "" : "gone"].filter(Boolean).join(".");
    if (stop.latent === null) {
      items.push(element("li.gone", {}, element("div.link.x"), element("span.at.soft", {}, layer), element("small", {}, "no partner")));
      continue;
    }
    const feature = await readFeature(stop.leg, stop.latent);
    const peaks = feature.examples.slice(0, 3).map((e) => chip(vocabulary[tokens[e[0]][e[1]]]));
    items.push(element(classes, {},
      element(`div.link.${s ? s.status.replace("-", "x") : "x"}`, s ? { "data-tip": tell(s) } : {}),
      s && s.to !== null ? element("span.cos", { "data-tip": tell(s) }, cosine(s.decoder)) : null,
      element("a.at", { href: featureAddress(stop.leg, stop.latent), "aria-current": current === stop.leg ? "true" : null }, layer, ` #${stop.latent}`),
      element("small", {}, feature.fired ? `fires on ${percent(feature.fired / feature.leg.features.n_tokens)}` : "silent"),
      element("span.chips", {}, peaks.slice(0, 1))));
  }
  return element("ol.strand", { "aria-label": "This feature over depth" }, items);
}

// --- lineage: a flow over depth -----------------------------------------------------------------------------------

saerelay.views.lineage = async function (body) {
  const run = await saerelay.load("run"), legs = run.standing;
  const numbers = legs.slice(0, -1).map((leg, c) => linkOf(run, "depth", leg, legs[c + 1]));
  if (!numbers.length || numbers.every((n) => n < 0)) {
    body.append(element("p.note", {}, "This run has one layer only: there is nothing to follow."));
    return;
  }
  const list = element("div", { "aria-live": "polite" }), holder = element("div.scroll");
  const drawing = flow(run, numbers, (c, status) => listBand(run, numbers[c], status, list, (latent) => drawing.trace(legs[c], latent)));
  holder.append(drawing.svg);
  const { kept_above, replaced_below, alive_above, n_tokens, map_tokens } = run.lineage;
  const key = ["k", "d", "r", "x", "b"].map((s) => element(`span.key.${s}`, {}, FATES[s]));
  body.append(
    element("p.lead", {}, "What became of each feature from one layer to the next. Click a band to list its features; choose one to see its way through all layers."),
    inherited(run, numbers), holder, element("p.legend", {}, key),
    element("p.caption", {}, element("bdi", {}, run.caption), ` Kept: the cosine of its decoder row, folded through the affine map between the layers, with that in the next layer is over ${kept_above}; drifted: not over it; replaced: under ${replaced_below}, the place has another meaning now; died, born: alive on one side only (alive: it fired${alive_above ? ` more than ${alive_above} times` : ""} in ${n_tokens.toLocaleString("en")} tokens). Maps fitted on ${map_tokens.toLocaleString("en")} training tokens. A column's height is its number of alive features.`),
    list);
  if (drawing.first) drawing.first();
};

// What the bands mean: transferred SAEs start as their parents. How much independent training finds again says the rest.
function inherited(run, numbers) {
  if (!numbers.some((n) => n >= 0 && run.links[n].by === "index")) return element("p.wide", {}, "These SAEs were trained independently: features were matched one to one, by the largest sum of decoder cosines.");
  const controls = run.links.filter((link) => link.kind === "control").map((link) => {
    const alive = Object.values(link.counts).reduce((a, b) => a + b, 0) - link.counts["-"];
    return `${percent(link.counts.k / Math.max(1, alive))} (${link.target})`;
  });
  return element("p.wide", {}, "Transferred SAEs start as their parents, and a feature keeps its number: what is kept here was inherited, and training did not undo it. Neighbours in this picture need not be parent and child. ",
    controls.length ? `Of an SAE trained independently at the same layer, matched one to one, this much is the same: ${controls.join(", ")}.` : "Without controls, this run does not say how much independent training would find again.");
}

function flow(run, numbers, onBand) {
  const legs = run.standing, columns = legs.length, gap = 138, left = 34, bar = 9, top = 34, H = 250;
  const W = left * 2 + gap * (columns - 1) + bar, bottom = top + H + 62;
  const counts = numbers.map((n) => (n < 0 ? { k: 0, d: 0, r: 0, x: 0, b: 0 } : run.links[n].counts));
  const alive = legs.map((_, c) => (c < counts.length ? counts[c].k + counts[c].d + counts[c].r + counts[c].x : counts[c - 1].k + counts[c - 1].d + counts[c - 1].r + counts[c - 1].b));
  const most = Math.max(1, ...alive, ...counts.map((n) => n.k + n.d + n.r + n.b)), scale = H / most;
  const svg = element("svg.chart.flow", { viewBox: `0 0 ${W} ${bottom}`, role: "group", "aria-label": "Features from layer to layer" });
  const x = (c) => left + gap * c;
  const bandAt = (c, status) => { // [source y, target y, height, height shown]
    const n = counts[c], h = n[status] * scale, shown = n[status] ? Math.max(2, h) : 0;
    if (status === "k") return [top, top, h, shown];
    if (status === "d") return [top + n.k * scale, top + n.k * scale, h, shown];
    const above = n.k + n.d + (status === "r" ? 0 : n.r);
    return [top + above * scale, top + above * scale, h, shown];
  };
  let chosen = null, first = null;

  legs.slice(0, -1).forEach((leg, c) => {
    const from = x(c) + bar, to = x(c + 1), middle = (from + to) / 2;
    for (const status of ["k", "d", "r", "x", "b"]) {
      const n = counts[c][status];
      if (!n) continue;
      const [y0, y1, , h] = bandAt(c, status), end = top + H + 22;
      const shape = {
        k: `M${from} ${y0} H${to} v${h} H${from} z`,
        d: `M${from} ${y0} H${to} v${h} H${from} z`,
        r: `M${from} ${y0} H${to} v${h} H${from} z`,
        x: `M${from} ${y0} C${from + 22} ${y0} ${middle - 16} ${y0 + 6} ${middle - 14} ${end} C${middle - 24} ${y0 + h + 8} ${from + 16} ${y0 + h} ${from} ${y0 + h} z`,
        b: `M${to} ${y1} C${to - 22} ${y1} ${middle + 16} ${y1 + 6} ${middle + 14} ${end} C${middle + 24} ${y1 + h + 8} ${to - 16} ${y1 + h} ${to} ${y1 + h} z`,
      }[status];
      const label = `${n.toLocaleString("en")} ${FATES[status]} from ${layerName(run, leg)} to ${layerName(run, legs[c + 1])}`;
      const choose = () => {
        chosen?.setAttribute("aria-pressed", "false");
        chosen = band;
        band.setAttribute("aria-pressed", "true");
        onBand(c, status);
      };
      const band = element(`path.band.${status}`, {
        d: shape, role: "button", tabindex: 0, "aria-pressed": "false", "aria-label": label, "data-tip": label, click: choose,
        keydown: (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); choose(); } },
      });
      svg.append(band);
      if ("dr".includes(status) && !first) first = choose;
      if (h > 15 && "kdr".includes(status)) svg.append(element(`text.share.${status}`, { x: middle, y: y0 + h / 2 + 4, "text-anchor": "middle" }, percent(n / (alive[c] || 1))));
      if ("xb".includes(status)) svg.append(element("text", { x: middle + (status === "x" ? -14 : 14), y: end + 14, "text-anchor": status === "x" ? "end" : "start" }, `${n} ${FATES[status]}`));
    }
  });
  legs.forEach((leg, c) => svg.append(
    element("rect.node", { x: x(c), y: top, width: bar, height: Math.max(1, alive[c] * scale), rx: 2 }),
    element("text", { x: x(c) + bar / 2, y: 14, "text-anchor": "middle" }, layerName(run, leg)),
    element("text", { x: x(c) + bar / 2, y: bottom - 4, "text-anchor": "middle", "font-size": 11 }, alive[c].toLocaleString("en"))));

  async function trace(legId, latent) {
    const stops = await thread(legId, latent);
    const middle = (c) => { const s = stops[c].step, [y, , h] = bandAt(c, s.status); return y + h / 2; };
    const height = (c) => (stops[c].step && stops[c].step.status !== "-" ? middle(c) : c > 0 && stops[c - 1].step && stops[c - 1].step.status !== "-" ? middle(c - 1) : top + H);
    for (const old of svg.querySelectorAll(".halo, .trace, .stop, .cosine")) old.remove();
    svg.classList.add("tracing");
    const here = stops.map((stop, c) => ({ ...stop, c })).filter((stop) => stop.latent !== null);
    const points = here.map((stop) => `${x(stop.c) + bar / 2},${height(stop.c)}`).join(" ");
    svg.append(element("polyline.halo", { points }), element("polyline.trace", { points }));
    for (const stop of here) {
      svg.append(element("circle.stop", { cx: x(stop.c) + bar / 2, cy: height(stop.c), r: 4.5 }));
      if (stop.step?.to !== null && stop.step) svg.append(element("text.cosine", { x: x(stop.c) + bar / 2 + gap / 2, y: (height(stop.c) + height(Math.min(stop.c + 1, columns - 1))) / 2 - 8, "text-anchor": "middle" }, cosine(stop.step.decoder)));
    }
    return stops;
  }
  return { svg, trace, first };
}

// The features of a band, those that changed most first.
async function listBand(run, number, status, list, trace) {
  const about = run.links[number];
  const [link, index, vocabulary] = await Promise.all([saerelay.load(`links/${number}`), saerelay.load(`index/${about.source}`), saerelay.load("vocabulary")]);
  const latents = [...link.status].map((s, i) => [s, i]).filter(([s]) => s === status).map(([, i]) => i);
  latents.sort((a, b) => link.decoder_cosine[a] - link.decoder_cosine[b]);
  const target = await saerelay.load(`index/${about.target}`);
  const rows = element("tbody"), chosen = element("div");
  const more = element("button.button", { type: "button", click: () => extend(PAGE) }, "Show more");
  const to = (i) => (link.partner ? link.partner[i] : i);
  let shown = 0;

  async function follow(i, button) {
    for (const other of rows.querySelectorAll("button")) other.setAttribute("aria-pressed", "false");
    button?.setAttribute("aria-pressed", "true");
    chosen.replaceChildren(element("h3", {}, `Feature ${i} of ${layerName(run, about.source)} through all layers`), await strand(await trace(i), about.source));
  }
  function extend(n) {
    for (const i of latents.slice(shown, shown + n)) {
      const peaks = index.peaks[i].length ? index.peaks[i] : target.peaks[to(i)] ?? [];
      rows.append(element("tr", {},
        element("td", {}, element("button.quiet", { type: "button", "aria-pressed": "false", "aria-label": `Trace feature ${i}`, click: (event) => follow(i, event.currentTarget) }, String(i))),
        element("td", {}, element("div.chips", {}, [...new Set(peaks)].slice(0, 4).map((id) => chip(vocabulary[id])))),
        element("td.n", {}, cosine(link.decoder_cosine[i])), element("td.n", {}, cosine(link.encoder_cosine[i])), element("td.n", {}, cosine(link.correlation[i])),
        element("td.n", {}, element("a", { href: featureAddress(about.source, i) }, `#${i}`)),
        element("td.n", {}, to(i) >= 0 ? element("a", { href: featureAddress(about.target, to(i)) }, `#${to(i)}`) : "–")));
    }
    shown += n;
    more.hidden = shown >= latents.length;
  }
  const heads = ["Trace", "Fires on", "Decoder cosine", "Encoder cosine", "Correlation", layerName(run, about.source), layerName(run, about.target)];
  const title = element("h2", {}, `${latents.length.toLocaleString("en")} ${FATES[status]}, ${layerName(run, about.source)} → ${layerName(run, about.target)}`);
  list.replaceChildren(title, chosen,
    element("div.scroll", {}, element("table.wide", {}, element("thead", {}, element("tr", {}, heads.map((h, i) => element(i > 1 ? "th.n" : "th", { scope: "col" }, h)))), rows)), more);
  extend(PAGE / 4);
}

// --- the list -----------------------------------------------------------------------------------------------------

// What the list knows of each feature of a leg: its index, and its fate on the way to the next layer (or from its parent).
async function readIndex(run, legId) {
  const leg = run.legs.find((one) => one.id === legId), index = await saerelay.load(`index/${legId}`);
  const onward = run.links.findIndex((link) => link.kind === "depth" && link.source === legId);
  const link = onward >= 0 ? await saerelay.load(`links/${onward}`) : null;
  return index.fired.map((fired, latent) => ({
    leg, latent, fired, density: fired / leg.features.n_tokens, max: index.max[latent], peaks: index.peaks[latent], top: index.top?.[latent] ?? [],
    status: link?.status[latent], cosine: link?.decoder_cosine[latent], hits: 0,
  }));
}

saerelay.views.features = async function (body, ...rest) {
  const query = rest.pop(), run = await saerelay.load("run"), vocabulary = await saerelay.load("vocabulary");
  const state = { leg: rest[0] ?? run.standing[Math.floor(run.standing.length / 2)], q: query.get("q") ?? "", density: query.get("density") ?? "", fate: query.get("fate") ?? "", sort: query.get("sort") ?? "match" };
  const words = Object.entries(vocabulary).map(([id, text]) => [Number(id), text.toLowerCase()]);
  const results = element("div", { "aria-live": "polite" });
  let features = [];

  async function read() {
    features = (await Promise.all((state.leg === "all" ? run.standing : [state.leg]).map((leg) => readIndex(run, leg)))).flat();
    draw();
  }

  function found() {
    const q = state.q.toLowerCase(), wanted = /^#?\d+$/.test(q.trim()) ? Number(q.trim().replace("#", "")) : null;
    const trimmed = q.trim();
    const exact = new Set(trimmed ? words.filter(([, text]) => text.trim() === trimmed).map(([id]) => id) : []);
    const partly = new Set(q ? words.filter(([, text]) => text.includes(q)).map(([id]) => id) : []);
    const [low, high] = state.density.split("-").map(Number);
    const kept = features.filter((f) => {
      if (wanted !== null && f.latent === wanted) { f.hits = Infinity; return true; }
      if (state.fate && f.status !== state.fate) return false;
      if (state.density && (state.density === "0" ? f.fired > 0 : f.density < low || f.density >= high)) return false;
      if (!q) return f.fired > 0 || state.fate || state.density;
      const score = (ids, weight) => ids.reduce((sum, id) => sum + (exact.has(id) ? 3 * weight : partly.has(id) ? weight : 0), 0);
      f.hits = score(f.peaks, 2) + score(f.top, 1);
      return f.hits > 0;
    });
    const [, order] = SORTS[state.sort === "match" && !q ? "id" : state.sort] ?? SORTS.id;
    return [kept.sort(order), new Set([...exact, ...partly])];
  }

  function draw() {
    const [kept, hits] = found();
    const list = element("ol.list", { "aria-label": "Features" }, element("li.head", { "aria-hidden": "true" }, ["Feature", "Fires most on", "Promotes", "Density", "Strongest", "Next layer"].map((t) => element("span", {}, t))));
    let shown = 0;
    const more = element("button.button", { type: "button", click: () => extend() }, "Show more");
    const chips = (ids) => {
      const unique = [...new Set(ids)].sort((a, b) => hits.has(b) - hits.has(a)).slice(0, 6);
      return element("span.chips", {}, unique.map((id) => chip(vocabulary[id], hits.has(id))));
    };
    function extend() {
      for (const f of kept.slice(shown, shown + PAGE)) list.append(element("li", {}, element("a.row", { href: featureAddress(f.leg.id, f.latent) },
        element("span.id", {}, `${f.latent}`, state.leg === "all" ? element("small", {}, `layer ${f.leg.layer}`) : null),
        chips(f.peaks), element("span.promoted", {}, chips(f.top)),
        element("span.n", {}, percent(f.density)), element("span.n.most", {}, number(f.max)), f.status ? fate(f.status) : element("span.soft.fate.x", {}, "–"))));
      shown += PAGE;
      more.hidden = shown >= kept.length;
    }
    extend();
    if (!kept.length) list.append(element("li", {}, element("p.soft", {}, "No feature matches. Search looks for tokens, not for meanings: try a shorter piece of a word, or all layers.")));
    results.replaceChildren(element("p.soft.small", {}, `${kept.length.toLocaleString("en")} of ${features.length.toLocaleString("en")} features`), list, element("p", {}, more));
  }

  function change(name, value) {
    state[name] = value;
    const kept = new URLSearchParams(["q", "density", "fate", "sort"].filter((n) => state[n] && state[n] !== "match").map((n) => [n, state[n]]));
    history.replaceState(null, "", `#/features/${encodeURIComponent(state.leg)}${kept.size ? `?${kept}` : ""}`);
    if (name === "leg") read();
    else draw();
  }
  const own = [...run.legs].sort((a, b) => a.layer - b.layer || (a.role === "control") - (b.role === "control"));
  if (state.leg !== "all" && !own.some((leg) => leg.id === state.leg)) throw new Error(`No SAE ${state.leg} in this run.`);
  body.append(
    element("form.controls", { role: "search", submit: (event) => event.preventDefault() },
      element("label", {}, "Search", element("input", { type: "search", value: state.q, placeholder: "a token, or 123", autocomplete: "off", spellcheck: "false", input: (event) => change("q", event.target.value) })),
      choice("SAE", [["all", "all layers"], ...own.map((leg) => [leg.id, `layer ${leg.layer}: ${leg.id}`])], state.leg, (v) => change("leg", v)),
      choice("Density", DENSITIES, state.density, (v) => change("density", v)),
      choice("On the way to the next layer", [["", "anything"], ...Object.entries(FATES)], state.fate, (v) => change("fate", v)),
      choice("Sort by", Object.entries(SORTS).map(([name, [text]]) => [name, text]), state.sort, (v) => change("sort", v))),
    results,
    element("p.caption", {}, element("bdi", {}, run.caption), " Fires most on: tokens at the peaks of its strongest examples. Promotes: tokens whose logits its decoder row raises most, directly. Density: share of tokens it fires on. Search looks in both, ignoring case."));
  await read();
};

// --- one feature --------------------------------------------------------------------------------------------------

// An example as tokens: shaded by activation in the window, pale beyond it, where activations were not kept.
function exampleText(feature, example, run, tokens, vocabulary, beyond) {
  const [sequence, position, ...pairs] = example, { window_before, window_after } = feature.leg.features;
  const levels = new Map();
  for (let p = 0; p < pairs.length; p += 2) levels.set(position - window_before + pairs[p], pairs[p + 1]);
  const row = tokens[sequence], text = element("div.tokens", { dir: "ltr" });
  const first = Math.max(0, position - window_before - beyond), last = Math.min(row.length - 1, position + window_after + beyond);
  for (let at = first; at <= last; at++) {
    const level = levels.get(at) ?? 0, inside = at >= position - window_before && at <= position + window_after;
    const kind = `${at === position ? ".peak" : ""}${inside ? "" : ".beyond"}`;
    text.append(shaded(vocabulary[row[at]] ?? "", level / run.levels, number((feature.max * level) / run.levels), kind));
  }
  return text;
}

function exampleList(feature, run, tokens, vocabulary, { most = Infinity, beyond = 12 } = {}) {
  if (!feature.examples.length) return element("p.soft", {}, "It never fired on these tokens.");
  return element("ol.examples", {}, feature.examples.slice(0, most).map((example) => {
    const top = feature.max * Math.max(...example.slice(2).filter((_, i) => i % 2)) / run.levels;
    return element("li", {}, element("span.value", {}, number(top)), exampleText(feature, example, run, tokens, vocabulary, beyond));
  }));
}

function histogram(feature) {
  if (!feature.histogram.length) return element("p.soft", {}, "It never fired on these tokens.");
  const [first, ...bins] = feature.histogram, edge = feature.leg.features.histogram_first_edge;
  const W = 360, H = 130, foot = 22, most = Math.max(...bins), w = W / Math.max(bins.length, 8), low = (i) => 2 ** (edge + (first + i) / 2);
  const svg = element("svg.chart", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": `Histogram of activations from ${number(low(0))} to ${number(low(bins.length))}` });
  bins.forEach((n, i) => {
    const h = n ? Math.max(1.5, ((H - foot - 6) * n) / most) : 0;
    svg.append(element("rect", { x: i * w + 1, y: H - foot - h, width: w - 2, height: h, rx: 1.5, fill: "var(--transfer)" }),
      element("rect", { x: i * w, y: 0, width: w, height: H - foot, fill: "transparent", "data-tip": `${n.toLocaleString("en")} tokens at ${number(low(i))} to ${number(low(i + 1))}` }));
    if (i % Math.ceil(bins.length / 6) === 0) svg.append(element("text", { x: i * w, y: H - 5, "font-size": 11 }, number(low(i), 2)));
  });
  svg.append(element("line.grid", { x1: 0, x2: W, y1: H - foot, y2: H - foot }));
  return svg;
}

function similarTable(run, feature) {
  const rows = ["above", "below"].filter((where) => feature[where] && feature.leg.features[where]).flatMap((where) => feature[where].map(([latent, c]) => [feature.leg.features[where], latent, c]));
  if (!rows.length) return null;
  return element("section", {}, element("h2", {}, "Similar next door"),
    element("table.similar", {}, element("thead", {}, element("tr", {}, element("th", { scope: "col" }, "Feature"), element("th.n", { scope: "col" }, "Decoder cosine"))),
      element("tbody", {}, rows.map(([leg, latent, c]) => element("tr", {}, element("td", {}, element("a", { href: featureAddress(leg, latent) }, `${layerName(run, leg)} #${latent}`)), element("td.n", {}, fixed(c)))))));
}

// The way onwards in words, with the one click that follows it.
function onwards(run, stops, legId) {
  const c = stops.findIndex((stop) => stop.leg === legId), here = stops[c], next = stops[c + 1];
  if (!here) return null;
  if (!next) return element("p", {}, "This is the last layer of the suite.");
  const s = here.step;
  if (!s || s.to === null) return element("p", {}, `It has no partner in ${layerName(run, next.leg)}.`);
  const there = layerName(run, next.leg);
  const sentence = {
    k: `In ${there} it was kept: `, d: `In ${there} it drifted: `, r: `In ${there} its place has another meaning: `, x: `In ${there} it died (its place is silent there): `, b: `It is silent here, and born in ${there}: `, "-": `It is silent here and in ${there}: `,
  }[s.status];
  return element("p", {}, sentence, `decoder cosine ${cosine(s.decoder)}, encoder ${cosine(s.encoder)}, correlation ${cosine(s.correlation)}. `,
    element("a.onward", { href: featureAddress(next.leg, s.to) }, `What it became in ${there}: feature ${s.to} →`));
}

// A control's features, and the suite's beside them, were matched with one another.
async function counterparts(run, legId, latent) {
  const found = [];
  for (const [number, link] of run.links.entries()) {
    if (link.kind !== "control") continue;
    if (link.source === legId) {
      const s = await step(number, latent);
      if (s.to !== null) found.push(element("li", {}, element("a", { href: featureAddress(link.target, s.to) }, `${link.target} #${s.to}`), `, decoder cosine ${cosine(s.decoder)}`));
    } else if (link.target === legId) {
      const from = await stepBack(number, latent);
      if (from !== null) found.push(element("li", {}, element("a", { href: featureAddress(link.source, from) }, `${link.source} #${from}`), `, decoder cosine ${cosine((await step(number, from)).decoder)}`));
    }
  }
  return found.length ? element("section", {}, element("h2", {}, "Matched with"), element("ul", {}, found)) : null;
}

saerelay.views.feature = async function (body, legId, text) {
  const latent = Number(text), run = await saerelay.load("run");
  const feature = await readFeature(legId, latent);
  const [tokens, vocabulary, stops] = await Promise.all([saerelay.load("tokens"), saerelay.load("vocabulary"), thread(legId, latent)]);
  const { leg } = feature, n = leg.features.n_tokens;
  const pager = (to, label, name) => (to < 0 || to >= leg.n_latents ? null : element("a.button", { href: featureAddress(legId, to), "aria-label": name }, label));
  const facts = [["Fires on", `${percent(feature.fired / n)} (${feature.fired.toLocaleString("en")} of ${n.toLocaleString("en")} tokens)`], ["strongest", number(feature.max)], ["mean where it fires", number(feature.mean)]];
  body.append(
    element("div.crumbs", {}, element("span", {}, element("a", { href: `#/features/${encodeURIComponent(legId)}` }, "Features"), ` / layer ${leg.layer} / ${leg.id}`),
      element("span.pager", {}, pager(latent - 1, "←", `Feature ${latent - 1}`), pager(latent + 1, "→", `Feature ${latent + 1}`), stops.length > 1 ? element("a.button", { href: `#/compare/${encodeURIComponent(legId)}/${latent}` }, "Side by side across layers") : null)),
    element("h1", {}, `Feature ${latent} of layer ${leg.layer}`),
    element("dl.facts", {}, facts.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value)))));
  body.append(...await explained(run, legId, latent));
  if (stops.length > 1) body.append(element("section.next", { "aria-label": "What became of it" }, onwards(run, stops, legId), await strand(stops, legId)));
  body.append(element("div.columns", {},
    element("section", {}, element("h2", {}, "Where it fires most"), exampleList(feature, run, tokens, vocabulary),
      element("p.caption", {}, element("bdi", {}, run.caption), " One example a document window, by falling activation; shade: activation over the feature's largest; pale text: beyond the window, activations not kept. Shown to 1 % of the largest.")),
    element("div", {},
      element("section", {}, element("h2", {}, "How strongly"), histogram(feature), element("p.caption", {}, "Tokens by activation, in half octaves.")),
      feature.top ? element("section", {}, element("h2", {}, "What it says"), element("div.effects", {}, effects("Promotes", feature.top, "var(--transfer)", vocabulary), effects("Suppresses", feature.bottom, "var(--root)", vocabulary)), element("p.caption", {}, "Its decoder row through the unembedding: logits per unit of activation, nothing between counted.")) : null,
      similarTable(run, feature), await counterparts(run, legId, latent))));
};

// --- side by side -------------------------------------------------------------------------------------------------

saerelay.views.compare = async function (body, legId, text) {
  const latent = Number(text), run = await saerelay.load("run");
  const [tokens, vocabulary, stops] = await Promise.all([saerelay.load("tokens"), saerelay.load("vocabulary"), thread(legId, latent)]);
  await readFeature(legId, latent);
  const panes = [];
  for (const stop of stops) {
    const layer = layerName(run, stop.leg);
    if (stop.latent === null) { panes.push(element("section.pane", {}, element("h2", {}, layer), element("p.soft", {}, "No partner here."))); continue; }
    const feature = await readFeature(stop.leg, stop.latent);
    panes.push(element(stop.leg === legId ? "section.pane.here" : "section.pane", {},
      element("h2", {}, element("a", { href: featureAddress(stop.leg, stop.latent) }, `${layer} #${stop.latent}`)),
      element("p.soft.small", {}, feature.fired ? `fires on ${percent(feature.fired / feature.leg.features.n_tokens)}, strongest ${number(feature.max)}` : "silent"),
      element("p.small", stop.step ? { "data-tip": tell(stop.step) } : {}, stop.step ? [fate(stop.step.status), ` on the way up, ${cosine(stop.step.decoder)}`] : "last layer"),
      feature.top ? element("div.chips", {}, feature.top.slice(0, 5).map(([id]) => chip(vocabulary[id]))) : null,
      exampleList(feature, run, tokens, vocabulary, { most: 4, beyond: 0 })));
  }
  body.append(element("div.crumbs", {}, element("span", {}, element("a", { href: featureAddress(legId, latent) }, `Feature ${latent} of ${layerName(run, legId)}`), " / side by side")),
    element("h1", {}, "One feature's place, layer by layer"),
    element("p.lead", {}, "Where it fires most in each layer, and the tokens it promotes there; the number on the way up is the decoder cosine with the next layer's."),
    element("div.panes", { tabindex: 0, role: "region", "aria-label": "Layers side by side" }, panes),
    element("p.caption", {}, element("bdi", {}, run.caption)));
};
