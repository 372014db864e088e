// Reading features, and following one of them from layer to layer.
"use strict";

/**
 * @param {Run} run
 * @param {string} legId
 */
const findLeg = (run, legId) => run.legs.find((leg) => leg.id === legId);

/**
 * @param {Run} run
 * @param {string} legId of a leg that the run has
 */
const layerName = (run, legId) => findLeg(run, legId)?.place ?? legId;

/**
 * What a feature's page shows.
 *
 * @param {string} legId
 * @param {number} latent
 * @returns {Promise<Feature>}
 */
async function readFeature(legId, latent) {
  const run = await saerelay.load("run");
  const leg = findLeg(run, legId);
  if (!leg || !Number.isInteger(latent) || latent < 0 || latent >= leg.n_latents) {
    throw new Error(`There is no feature ${latent} in SAE "${legId}".`);
  }
  const chunk = await saerelay.load(`features/${legId}/${Math.floor(latent / run.chunk)}`);
  const i = latent % run.chunk;
  return {
    leg,
    latent,
    fired: chunk.fired[i],
    max: chunk.max[i],
    mean: chunk.mean[i],
    histogram: chunk.histogram[i],
    examples: chunk.examples[i],
    top: toPairs(chunk.top?.[i], 1),
    bottom: toPairs(chunk.bottom?.[i], 1),
    above: toPairs(chunk.above?.[i], 1000),
    below: toPairs(chunk.below?.[i], 1000),
  };
}

/**
 * Pairs from a list [id, value, id, value, …], whose values count in 1/unit.
 *
 * @param {number[] | undefined} flat
 * @param {number} unit
 */
function toPairs(flat, unit) {
  if (!flat) return null;
  /** @type {[id: number, value: number][]} */
  const pairs = [];
  for (let i = 0; i < flat.length; i += 2) pairs.push([flat[i], flat[i + 1] / unit]);
  return pairs;
}

/**
 * A leg's features as the list shows them, with what becomes of each in the next layer.
 *
 * @param {Run} run
 * @param {string} legId
 * @returns {Promise<ListedFeature[]>}
 */
async function readList(run, legId) {
  const leg = /** @type {Leg} */ (findLeg(run, legId));
  const index = await saerelay.load(`index/${legId}`);
  const onwards = run.links.findIndex((link) => link.kind === "depth" && link.source === legId);
  const link = onwards >= 0 ? await saerelay.load(`links/${onwards}`) : null;
  return index.fired.map((fired, latent) => ({
    leg,
    latent,
    fired,
    density: fired / leg.features.n_tokens,
    max: index.max[latent],
    peaks: index.peaks[latent],
    top: index.top?.[latent] ?? [],
    status: /** @type {Status | undefined} */ (link?.status[latent]),
    cosine: link?.decoder_cosine[latent] ?? null,
    score: 0,
  }));
}

// --- from layer to layer -------------------------------------------------------------------------

/**
 * The number of a link, or -1.
 *
 * @param {Run} run
 * @param {Link["kind"]} kind
 * @param {string} source
 * @param {string} target
 */
function findLink(run, kind, source, target) {
  return run.links.findIndex(
    (link) => link.kind === kind && link.source === source && link.target === target,
  );
}

/**
 * Where a link leads from a latent, and what became of it. Latents that descend from the same root
 * keep their number; others have a partner, or -1.
 *
 * @param {number} number the link's
 * @param {number} latent
 * @returns {Promise<Step>}
 */
async function followLink(number, latent) {
  const link = await saerelay.load(`links/${number}`);
  const partner = link.partner ? link.partner[latent] : latent;
  return {
    latent: partner < 0 ? null : partner,
    status: /** @type {Status} */ (link.status[latent]),
    decoder: link.decoder_cosine[latent],
    encoder: link.encoder_cosine[latent],
    correlation: link.correlation[latent],
  };
}

/**
 * The latent from which a link leads to this one, or null.
 *
 * @param {number} number the link's
 * @param {number} latent
 */
async function followLinkBack(number, latent) {
  const link = await saerelay.load(`links/${number}`);
  const source = link.partner ? link.partner.indexOf(latent) : latent;
  return source < 0 ? null : source;
}

/**
 * The kind of site that a leg is at; "" if the run does not have the leg.
 *
 * @param {Run} run
 * @param {string} legId
 * @returns {string}
 */
function kindOf(run, legId) {
  return findLeg(run, legId)?.kind ?? "";
}

/**
 * The path of a latent through all layers: its match in each SAE of the suite, and the step from
 * there to the next. Empty for a leg outside the suite.
 *
 * @param {string} legId
 * @param {number} latent
 * @returns {Promise<Stop[]>}
 */
async function followThroughLayers(legId, latent) {
  const run = await saerelay.load("run");
  const legs = standingOf(run, kindOf(run, legId));
  const start = legs.indexOf(legId);
  if (start < 0) return [];

  /** @type {Stop[]} */
  const stops = legs.map((leg) => ({ leg, latent: null, step: null }));
  stops[start].latent = latent;

  // Backwards to the first layer that has it …
  for (let i = start; i > 0; i--) {
    const number = findLink(run, "depth", legs[i - 1], legs[i]);
    const current = stops[i].latent;
    if (number < 0 || current === null) break;
    stops[i - 1].latent = await followLinkBack(number, current);
  }

  // … and forwards from there, which finds the layers after this one.
  for (let i = 0; i + 1 < legs.length; i++) {
    const number = findLink(run, "depth", legs[i], legs[i + 1]);
    const current = stops[i].latent;
    if (number < 0 || current === null) continue;
    const step = await followLink(number, current);
    stops[i].step = step;
    if (i >= start) stops[i + 1].latent = step.latent;
  }
  return stops;
}
