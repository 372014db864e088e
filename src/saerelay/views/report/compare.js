// One feature side by side in every layer.
"use strict";

saerelay.views.compare = async function drawComparison(body, [legId, latentText]) {
  const latent = Number(latentText);
  const run = await saerelay.load("run");
  await readFeature(legId, latent); // throws if there is no such feature
  const stops = await followThroughLayers(legId, latent);
  const panes = [];
  for (const stop of stops) panes.push(await comparePane(run, stop, stop.leg === legId));

  const title = `Feature ${latent} of ${layerName(run, legId)}`;
  const back = element("a", { href: featureAddress(legId, latent) }, title);
  body.append(
    element("div.crumbs", element("span", back, " / across layers")),
    element("h1", "One feature across layers"),
    element(
      "p.lead",
      "For each layer: the tokens that the feature promotes, its top-activating examples, and " +
        "what happens to it in the next layer, with the cosine between the two decoder rows.",
    ),
    element(
      "div.panes",
      { tabindex: 0, role: "region", "aria-label": "Layers side by side" },
      panes,
    ),
    captionOf(run),
  );
};

/**
 * @param {Run} run
 * @param {Stop} stop
 * @param {boolean} isCurrent
 */
async function comparePane(run, { leg, latent, step }, isCurrent) {
  const layer = layerName(run, leg);
  if (latent === null) {
    const note = element("p.soft", "No match here.");
    return element("section.pane", element("h2", layer), note);
  }
  const feature = await readFeature(leg, latent);
  const link = element("a", { href: featureAddress(leg, latent) }, `${layer} #${latent}`);
  const activity = feature.fired
    ? `${percent(densityOf(feature))} of tokens, maximum ${number(feature.max)}`
    : "never fires";
  return element(
    isCurrent ? "section.pane.here" : "section.pane",
    element("h2", link),
    element("p.soft.small", activity),
    stepLine(step),
    await promotedChips(feature),
    await exampleList(run, feature, { examples: 4, beyond: 0 }),
  );
}

/** @param {Step | null} step */
function stepLine(step) {
  if (!step) return element("p.small", "last layer");
  const text = ` in the next layer, cosine ${cosine(step.decoder)}`;
  return element("p.small", { "data-tip": stepText(step) }, statusBadge(step.status), text);
}

/** @param {Feature} feature */
async function promotedChips({ top }) {
  if (!top) return null;
  const vocabulary = await saerelay.load("vocabulary");
  const chips = top.slice(0, 5).map(([id]) => chip(vocabulary[id]));
  return element("div.chips", chips);
}
