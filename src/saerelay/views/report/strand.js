// One feature through all layers, as a row of stops; what became of it in words.
"use strict";

/** @param {Status} status @returns {string} its class in the style sheet, which has none for "-" */
const statusClass = (status) => (status === "-" ? "x" : status);

/** @param {Status} status */
const statusBadge = (status) =>
  element(`span.status.${statusClass(status)}`, labels.statuses[status]);

/**
 * How similar a feature is to the one it leads to.
 *
 * @param {Step} step
 */
function similarityText({ decoder, encoder, correlation }) {
  const cosines = `decoder cosine ${cosine(decoder)}, encoder cosine ${cosine(encoder)}`;
  return `${cosines}, activation correlation ${cosine(correlation)}`;
}

/** @param {Step} step */
function stepText(step) {
  return `${labels.statuses[step.status]}: ${similarityText(step)}`;
}

/** @param {Feature} feature */
const densityOf = (feature) => feature.fired / feature.leg.features.n_tokens;

/**
 * Each stop links to the feature there.
 *
 * @param {Stop[]} stops
 * @param {string} currentLegId
 */
async function featureStrand(stops, currentLegId) {
  const run = await saerelay.load("run");
  const items = [];
  for (const stop of stops) items.push(await strandStop(run, stop, stop.leg === currentLegId));
  return element("ol.strand", { "aria-label": "This feature across layers" }, items);
}

/**
 * @param {Run} run
 * @param {Stop} stop
 * @param {boolean} isCurrent
 */
async function strandStop(run, { leg, latent, step }, isCurrent) {
  const layer = layerName(run, leg);
  if (latent === null) {
    return element(
      "li.gone",
      element("div.link.x"),
      element("span.at.soft", layer),
      element("small", "no match"),
    );
  }
  const feature = await readFeature(leg, latent);
  const continues = step !== null && step.latent !== null;
  const currentClass = isCurrent ? ".here" : "";
  const endClass = continues ? "" : ".gone";
  const tooltip = step ? { "data-tip": stepText(step) } : {};
  const address = {
    href: featureAddress(leg, latent),
    "aria-current": isCurrent ? "true" : null,
  };
  return element(
    `li${currentClass}${endClass}`,
    element(`div.link.${step ? statusClass(step.status) : "x"}`, tooltip),
    continues ? element("span.cos", tooltip, cosine(step.decoder)) : null,
    element("a.at", address, `${layer} #${latent}`),
    element("small", feature.fired ? `${percent(densityOf(feature))} of tokens` : "never fires"),
    element("span.chips", await strongestToken(feature)),
  );
}

/**
 * The token of a feature's strongest example, if it ever fired.
 *
 * @param {Feature} feature
 */
async function strongestToken({ examples }) {
  if (!examples.length) return null;
  const tokens = await saerelay.load("tokens");
  const vocabulary = await saerelay.load("vocabulary");
  const [sequence, position] = examples[0];
  return chip(vocabulary[tokens[sequence][position]]);
}
