// One feature's page: where and how strongly it fires, what it does to the logits, and what it is
// in other layers.
"use strict";

saerelay.views.feature = async function drawFeature(body, [legId, latentText]) {
  const latent = Number(latentText);
  const run = await saerelay.load("run");
  const feature = await readFeature(legId, latent);
  const stops = await followThroughLayers(legId, latent);
  appendChildren(body, [
    featureCrumbs(feature, stops.length > 1),
    element("h1", `Feature ${latent} of ${feature.leg.place}`),
    featureFacts(feature),
    await explanationLine(run, legId, latent),
    stops.length > 1 ? await otherLayers(run, stops, legId) : null,
    element(
      "div.columns",
      await exampleSection(run, feature),
      element(
        "div",
        histogramSection(feature),
        await logitSection(feature),
        similarSection(run, feature),
        await counterpartSection(run, legId, latent),
      ),
    ),
  ]);
};

/**
 * Links back to the list, to the features before and after this one, and to this page.
 *
 * @param {Feature} feature
 * @param {boolean} hasOtherLayers
 */
function featureCrumbs({ leg, latent }, hasOtherLayers) {
  const compareAddress = `#/compare/${encodeURIComponent(leg.id)}/${latent}`;
  return element(
    "div.crumbs",
    element(
      "span",
      element("a", { href: listAddress(leg.id) }, "Features"),
      ` / ${leg.place} / ${leg.id}`,
    ),
    element(
      "span.pager",
      pagerLink(leg, latent - 1, "←", "ArrowLeft"),
      pagerLink(leg, latent + 1, "→", "ArrowRight"),
      hasOtherLayers
        ? element("a.button", { href: compareAddress }, "Compare across layers")
        : null,
      copyLinkButton(),
    ),
  );
}

/**
 * @param {Leg} leg
 * @param {number} latent
 * @param {string} arrow
 * @param {string} key that follows the link, see keys.js
 */
function pagerLink(leg, latent, arrow, key) {
  if (latent < 0 || latent >= leg.n_latents) return null;
  const attributes = {
    href: featureAddress(leg.id, latent),
    "aria-label": `Feature ${latent}`,
    "data-key": key,
  };
  return element("a.button", attributes, arrow);
}

/** Copies the address of the page, or shows it selected if the browser refuses to copy. */
function copyLinkButton() {
  const button = element("button.button", { type: "button", "aria-live": "polite" }, "Copy link");
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(location.href);
      button.textContent = "Copied";
    } catch {
      const attributes = { type: "text", value: location.href, readonly: true };
      const field = element("input", { ...attributes, "aria-label": "Link to this feature" });
      button.replaceWith(field);
      /** @type {HTMLInputElement} */ (field).select();
    }
  });
  return button;
}

/** @param {Feature} feature */
function featureFacts(feature) {
  const fired = wholeNumber(feature.fired);
  const all = wholeNumber(feature.leg.features.n_tokens);
  const facts = [
    ["Fires on", `${percent(densityOf(feature))} (${fired} of ${all} tokens)`],
    ["Maximum activation", number(feature.max)],
    ["Mean when active", number(feature.mean)],
  ];
  const items = facts.map(([name, value]) =>
    element("div", element("dt", name), element("dd", value)),
  );
  return element("dl.facts", items);
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
    { "aria-label": "This feature in other layers" },
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
  if (!next) return element("p", "This is the last layer of the suite.");
  const layer = layerName(run, next.leg);
  const step = stops[i].step;
  if (!step || step.latent === null) return element("p", `It has no match in ${layer}.`);
  const link = element(
    "a.onward",
    { href: featureAddress(next.leg, step.latent) },
    `Go to feature ${step.latent} of ${layer} →`,
  );
  const status = capitalised(labels.statuses[step.status]);
  return element("p", `${status} in ${layer}: ${similarityText(step)}. `, link);
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
  return element("section", element("h2", "Matched one to one with"), element("ul", items));
}

/**
 * @param {string} legId
 * @param {number} latent
 * @param {Step} step
 */
function counterpart(legId, latent, step) {
  const link = element("a", { href: featureAddress(legId, latent) }, `${legId} #${latent}`);
  return element("li", link, `, decoder cosine ${cosine(step.decoder)}`);
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
    element("th", { scope: "col" }, "Feature"),
    element("th.n", { scope: "col" }, "Decoder cosine, after the affine map"),
  );
  return element(
    "section",
    element("h2", "Most similar features in adjacent layers"),
    element("table.similar", element("thead", head), element("tbody", rows)),
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
    return element("tr", element("td", link), element("td.n", fixed(similarity)));
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
    element("h2", "Top-activating examples"),
    await exampleList(run, feature, sizes),
    captionOf(
      run,
      "One example per sequence, strongest first. Shading: activation relative to the feature's " +
        "maximum, in steps of 1 %. Pale text lies outside the stored window, so its activations " +
        "are not known.",
    ),
  );
}

/** @param {Feature} feature */
function histogramSection(feature) {
  return element(
    "section",
    element("h2", "Activation histogram"),
    histogram(feature),
    element("p.caption", "Number of tokens by activation, in bins of half an octave."),
  );
}

/** @param {Feature} feature */
async function logitSection({ top, bottom }) {
  if (!top || !bottom) return null;
  const vocabulary = await saerelay.load("vocabulary");
  const caption =
    "The decoder row multiplied by the unembedding: logits per unit of activation, ignoring " +
    "everything in between.";
  return element(
    "section",
    element("h2", "Direct effect on the logits"),
    element(
      "div.effects",
      logitEffects("Promotes", top, "var(--transfer)", vocabulary),
      logitEffects("Suppresses", bottom, "var(--root)", vocabulary),
    ),
    element("p.caption", caption),
  );
}
