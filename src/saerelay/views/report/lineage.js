// What became of each feature from layer to layer: the drawing, and a list of one of its bands.
"use strict";

const BAND_ROWS = { first: 15, more: 60 };

saerelay.views.lineage = async function drawLineage(body) {
  const run = await saerelay.load("run");
  const picture = element("div");

  /** @param {string} kind */
  const draw = (kind) => picture.replaceChildren(...lineageOfKind(run, standingOf(run, kind)));
  const kinds = kindMenu(run, draw);
  if (kinds) body.append(element("div.controls", kinds));
  body.append(picture);
  draw(run.kinds[0]);
};

/**
 * What became of features along the legs of one kind, layer by layer.
 *
 * @param {Run} run
 * @param {string[]} legs
 */
function lineageOfKind(run, legs) {
  const links = legs.slice(0, -1).map((leg, i) => findLink(run, "depth", leg, legs[i + 1]));
  if (links.every((number) => number < 0)) {
    const sentence = "This run has only one layer, so there is nothing to compare.";
    return [element("p.note", sentence)];
  }
  const list = element("div", { "aria-live": "polite" });
  const flow = drawFlow(run, legs, links, async (column, status) => {
    const onTrace = (/** @type {Stop[]} */ stops) => flow.trace(stops);
    list.replaceChildren(...(await bandList(run, links[column], status, onTrace)));
  });
  const key = BAND_STATUSES.map((status) => element(`span.key.${status}`, labels.statuses[status]));
  flow.chooseFirstChange?.();
  return [
    element(
      "p.lead",
      "What happened to each feature from one layer to the next. Select a band to list its " +
        "features; select a feature to trace it through all layers.",
    ),
    inheritanceNote(run, legs, links),
    element("div.scroll", flow.svg),
    element("p.legend", key),
    captionOf(run, lineageDefinitions(run.lineage)),
    list,
  ];
}

/** @param {Run["lineage"]} lineage */
function lineageDefinitions({ kept_above, replaced_below, alive_above, n_tokens, map_tokens }) {
  const often = alive_above ? `more than ${alive_above} times` : "at least once";
  return (
    "Kept: the feature's decoder row, carried over by the affine map between the two layers, has " +
    `a cosine above ${kept_above} with the decoder row in the next layer. Drifted: a cosine ` +
    `between ${replaced_below} and ${kept_above}. Replaced: below ${replaced_below}, so this ` +
    "latent now means something else. Died, born: alive in only one of the two layers (alive: it " +
    `fired ${often} in ${wholeNumber(n_tokens)} tokens). Maps were fitted on ` +
    `${wholeNumber(map_tokens)} training tokens. The height of a column is the number of alive ` +
    "features in that layer."
  );
}

/**
 * What the bands mean. Transferred SAEs start as their parents, so "kept" only says that training
 * did not undo a feature; controls say how much independent training would also find.
 *
 * @param {Run} run
 * @param {string[]} legs
 * @param {number[]} links
 */
function inheritanceNote(run, legs, links) {
  const inherited = links.some((number) => number >= 0 && run.links[number].by === "index");
  if (!inherited) {
    return element(
      "p.wide",
      "These SAEs were trained independently. Their features were matched one to one so as to " +
        "maximise the sum of decoder cosines.",
    );
  }
  const controls = run.links
    .filter((link) => link.kind === "control" && legs.includes(link.source))
    .filter((link) => findLeg(run, link.target)?.control_kind !== "random") // it was not trained
    .map(keptShare);
  return element(
    "p.wide",
    "A transferred SAE starts from its parent, and each feature keeps its number: “kept” means " +
      "inherited, and not undone by training. Neighbouring layers here need not be parent and " +
      "child. ",
    controls.length
      ? "For comparison, the share of features that an SAE trained independently at the same " +
          `layer also has, matched one to one: ${controls.join(", ")}.`
      : "This run has no controls, so it cannot say how many of these features independent " +
          "training would also find.",
  );
}

/**
 * The share of the source's alive features that the target has as well.
 *
 * @param {Link} link
 */
function keptShare({ counts, target }) {
  const alive = counts.k + counts.d + counts.r + counts.x;
  return `${percent(counts.k / Math.max(1, alive))} (${target})`;
}

// --- the features of one band --------------------------------------------------------------------

/**
 * A heading, room for the strand of a chosen feature, and a table of features, most changed first.
 *
 * @param {Run} run
 * @param {number} number the link's
 * @param {Status} status
 * @param {(stops: Stop[]) => void} onTrace draws a feature's path into the picture
 */
async function bandList(run, number, status, onTrace) {
  const { source, target } = run.links[number];
  const [link, sourceIndex, targetIndex, vocabulary] = await Promise.all([
    saerelay.load(`links/${number}`),
    saerelay.load(`index/${source}`),
    saerelay.load(`index/${target}`),
    saerelay.load("vocabulary"),
  ]);
  const latents = latentsOf(link, status);
  const rows = element("tbody");
  const strand = element("div");

  /** @param {number} latent @param {HTMLElement} button */
  async function trace(latent, button) {
    for (const other of rows.querySelectorAll("button")) {
      other.setAttribute("aria-pressed", String(other === button));
    }
    const stops = await followThroughLayers(source, latent);
    onTrace(stops);
    const title = `Feature ${latent} of ${layerName(run, source)} across all layers`;
    strand.replaceChildren(element("h3", title), await featureStrand(stops, source));
  }

  /** @param {number} latent */
  function row(latent) {
    const partner = link.partner ? link.partner[latent] : latent;
    const peaks = sourceIndex.peaks[latent];
    const tokens = peaks.length ? peaks : (targetIndex.peaks[partner] ?? []);
    const tokenTexts = unique(tokens).map((id) => vocabulary[id]);
    return bandRow({ source, target, link, latent, partner, tokenTexts, trace });
  }
  const showMore = revealInSteps(latents, BAND_ROWS, (latent) => rows.append(row(latent)));
  const sourceLayer = layerName(run, source);
  const targetLayer = layerName(run, target);
  const count = wholeNumber(latents.length);
  return [
    element("h2", `${count} ${labels.statuses[status]}, ${sourceLayer} → ${targetLayer}`),
    strand,
    element("div.scroll", bandTable(sourceLayer, targetLayer, rows)),
    showMore,
  ];
}

/**
 * The source's latents of one status, by rising decoder cosine.
 *
 * @param {LinkColumns} link
 * @param {Status} status
 */
function latentsOf(link, status) {
  const latents = [...link.status].map((_, latent) => latent);
  const cosines = link.decoder_cosine;
  return latents
    .filter((latent) => link.status[latent] === status)
    .sort((a, b) => (cosines[a] ?? 0) - (cosines[b] ?? 0));
}

/**
 * @param {string} sourceLayer
 * @param {string} targetLayer
 * @param {HTMLElement} rows
 */
function bandTable(sourceLayer, targetLayer, rows) {
  const heads = [
    element("th", { scope: "col" }, "Trace"),
    element("th", { scope: "col" }, "Fires most on"),
    element("th.n", { scope: "col" }, "Decoder cosine"),
    element("th.n", { scope: "col" }, "Encoder cosine"),
    element("th.n", { scope: "col" }, "Correlation"),
    element("th.n", { scope: "col" }, sourceLayer),
    element("th.n", { scope: "col" }, targetLayer),
  ];
  return element("table.wide", element("thead", element("tr", heads)), rows);
}

/** @param {BandRow} row */
function bandRow({ source, target, link, latent, partner, tokenTexts, trace }) {
  const button = element(
    "button.quiet",
    { type: "button", "aria-pressed": "false", "aria-label": `Trace feature ${latent}` },
    String(latent),
  );
  button.addEventListener("click", () => trace(latent, button));
  const chips = tokenTexts.slice(0, 4).map((text) => chip(text));
  const sourceLink = element("a", { href: featureAddress(source, latent) }, `#${latent}`);
  const targetLink = element("a", { href: featureAddress(target, partner) }, `#${partner}`);
  return element(
    "tr",
    element("td", button),
    element("td", element("div.chips", chips)),
    element("td.n", cosine(link.decoder_cosine[latent])),
    element("td.n", cosine(link.encoder_cosine[latent])),
    element("td.n", cosine(link.correlation[latent])),
    element("td.n", sourceLink),
    element("td.n", partner >= 0 ? targetLink : "–"),
  );
}
