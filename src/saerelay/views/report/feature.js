// One feature's page: where and how strongly it fires, what it does to the logits, and what it is in
// other layers.
"use strict";

saerelay.views.feature = async function drawFeature(body, [legId, latentText]) {
  const latent = Number(latentText);
  const run = await saerelay.load("run");
  const feature = await readFeature(legId, latent);
  const stops = await followThroughLayers(legId, latent);
  appendChildren(body, [
    featureCrumbs(feature, stops.length > 1),
    element("h1", {}, `Feature ${latent} of layer ${feature.leg.layer}`),
    featureFacts(feature),
    await explanationLine(run, legId, latent),
    stops.length > 1 ? await otherLayers(run, stops, legId) : null,
    element(
      "div.columns",
      {},
      await exampleSection(run, feature),
      element(
        "div",
        {},
        histogramSection(feature),
        await logitSection(feature),
        similarSection(run, feature),
        await counterpartSection(run, legId, latent),
      ),
    ),
  ]);
};

/**
 * The way back to the list, and on to the features before and after this one.
 *
 * @param {Feature} feature
 * @param {boolean} hasOtherLayers
 */
function featureCrumbs({ leg, latent }, hasOtherLayers) {
  const compareAddress = `#/compare/${encodeURIComponent(leg.id)}/${latent}`;
  return element(
    "div.crumbs",
    {},
    element(
      "span",
      {},
      element("a", { href: listAddress(leg.id) }, "Features"),
      ` / layer ${leg.layer} / ${leg.id}`,
    ),
    element(
      "span.pager",
      {},
      pagerLink(leg, latent - 1, "←"),
      pagerLink(leg, latent + 1, "→"),
      hasOtherLayers
        ? element("a.button", { href: compareAddress }, "Side by side across layers")
        : null,
    ),
  );
}

/**
 * @param {Leg} leg
 * @param {number} latent
 * @param {string} arrow
 */
function pagerLink(leg, latent, arrow) {
  if (latent < 0 || latent >= leg.n_latents) return null;
  const attributes = { href: featureAddress(leg.id, latent), "aria-label": `Feature ${latent}` };
  return element("a.button", attributes, arrow);
}

/** @param {Feature} feature */
function featureFacts(feature) {
  const fired = wholeNumber(feature.fired);
  const all = wholeNumber(feature.leg.features.n_tokens);
  const facts = [
    ["Fires on", `${percent(densityOf(feature))} (${fired} of ${all} tokens)`],
    ["strongest", number(feature.max)],
    ["mean where it fires", number(feature.mean)],
  ];
  const items = facts.map(([name, value]) =>
    element("div", {}, element("dt", {}, name), element("dd", {}, value)),
  );
  return element("dl.facts", {}, items);
}

// --- other layers --------------------------------------------------------------------------------

/**
 * @param {Run} run
 * @param {Stop[]} stops
 * @param {string} legId
 */
async function otherLayers(run, stops, legId) {
  return element(
    "section.next",
    { "aria-label": "What became of it" },
    nextLayerSentence(run, stops, legId),
    await featureStrand(stops, legId),
  );
}

/**
 * What became of the feature in the next layer, with a link to it there.
 *
 * @param {Run} run
 * @param {Stop[]} stops
 * @param {string} legId
 */
function nextLayerSentence(run, stops, legId) {
  const i = stops.findIndex((stop) => stop.leg === legId);
  const next = stops[i + 1];
  if (!next) return element("p", {}, "This is the last layer of the suite.");
  const layer = layerName(run, next.leg);
  const step = stops[i].step;
  if (!step || step.latent === null) return element("p", {}, `It has no partner in ${layer}.`);
  const cosines = `decoder cosine ${cosine(step.decoder)}, encoder ${cosine(step.encoder)}, correlation ${cosine(step.correlation)}. `;
  const link = element(
    "a.onward",
    { href: featureAddress(next.leg, step.latent) },
    `What it became in ${layer}: feature ${step.latent} →`,
  );
  return element("p", {}, fateSentence(step.fate, layer), cosines, link);
}

/**
 * @param {Fate} fate
 * @param {string} layer
 */
function fateSentence(fate, layer) {
  const sentences = {
    k: `In ${layer} it was kept: `,
    d: `In ${layer} it drifted: `,
    r: `In ${layer} its place has another meaning: `,
    x: `In ${layer} it died (its place is silent there): `,
    b: `It is silent here, and born in ${layer}: `,
    "-": `It is silent here and in ${layer}: `,
  };
  return sentences[fate];
}

/**
 * Features of a control and of the suite's SAE at the same layer were matched with one another;
 * links lead both ways.
 *
 * @param {Run} run
 * @param {string} legId
 * @param {number} latent
 */
async function counterpartSection(run, legId, latent) {
  const items = [];
  for (const [number, link] of run.links.entries()) {
    if (link.kind !== "control") continue;
    if (link.source === legId) {
      const step = await followLink(number, latent);
      if (step.latent !== null) items.push(counterpart(link.target, step.latent, step));
    }
    if (link.target === legId) {
      const source = await followLinkBack(number, latent);
      if (source === null) continue;
      items.push(counterpart(link.source, source, await followLink(number, source)));
    }
  }
  if (!items.length) return null;
  return element("section", {}, element("h2", {}, "Matched with"), element("ul", {}, items));
}

/**
 * @param {string} legId
 * @param {number} latent
 * @param {Step} step
 */
function counterpart(legId, latent, step) {
  const link = element("a", { href: featureAddress(legId, latent) }, `${legId} #${latent}`);
  return element("li", {}, link, `, decoder cosine ${cosine(step.decoder)}`);
}

/**
 * @param {Run} run
 * @param {Feature} feature
 */
function similarSection(run, feature) {
  const facts = feature.leg.features;
  const rows = [
    ...similarRows(run, facts.above, feature.above),
    ...similarRows(run, facts.below, feature.below),
  ];
  if (!rows.length) return null;
  const head = element(
    "tr",
    {},
    element("th", { scope: "col" }, "Feature"),
    element("th.n", { scope: "col" }, "Decoder cosine"),
  );
  return element(
    "section",
    {},
    element("h2", {}, "Similar next door"),
    element("table.similar", {}, element("thead", {}, head), element("tbody", {}, rows)),
  );
}

/**
 * @param {Run} run
 * @param {string | null} legId
 * @param {[latent: number, cosine: number][] | null} pairs
 */
function similarRows(run, legId, pairs) {
  if (!legId || !pairs) return [];
  return pairs.map(([latent, similarity]) => {
    const address = featureAddress(legId, latent);
    const link = element("a", { href: address }, `${layerName(run, legId)} #${latent}`);
    return element("tr", {}, element("td", {}, link), element("td.n", {}, fixed(similarity)));
  });
}

// --- where and how strongly it fires, and what it does -------------------------------------------

/**
 * @param {Run} run
 * @param {Feature} feature
 */
async function exampleSection(run, feature) {
  const sizes = { examples: Infinity, beyond: 12 };
  return element(
    "section",
    {},
    element("h2", {}, "Where it fires most"),
    await exampleList(run, feature, sizes),
    captionOf(
      run,
      "One example a document window, by falling activation; shade: activation over the feature's largest; pale text: beyond the window, activations not kept. Shown to 1 % of the largest.",
    ),
  );
}

/** @param {Feature} feature */
function histogramSection(feature) {
  return element(
    "section",
    {},
    element("h2", {}, "How strongly"),
    histogram(feature),
    element("p.caption", {}, "Tokens by activation, in half octaves."),
  );
}

/** @param {Feature} feature */
async function logitSection({ top, bottom }) {
  if (!top || !bottom) return null;
  const vocabulary = await saerelay.load("vocabulary");
  const caption =
    "Its decoder row through the unembedding: logits per unit of activation, nothing between counted.";
  return element(
    "section",
    {},
    element("h2", {}, "What it says"),
    element(
      "div.effects",
      {},
      logitEffects("Promotes", top, "var(--transfer)", vocabulary),
      logitEffects("Suppresses", bottom, "var(--root)", vocabulary),
    ),
    element("p.caption", {}, caption),
  );
}
