// What a language model made of features: scores by origin and by SAE, every explanation, and a line on a feature's page.
"use strict";

const scoreOf = (score) => (score.mean === null ? "–" : `${fixed(score.mean, 3)}${score.standard_error === null ? "" : ` ± ${fixed(score.standard_error, 3)}`}`);

// A line on a feature's page, if it was explained; nothing otherwise.
async function explained(run, legId, latent) {
  if (!run.has.interpretations) return [];
  const entry = (await saerelay.load("interpretations")).latents[legId]?.[latent];
  if (!entry) return [];
  const [explanation, detection, fuzzing] = entry;
  return [element("p.explanation.wide", {}, element("b", {}, "Explained as: "), element("bdi", {}, allVisible(explanation)),
    element("span.soft", {}, ` (detection ${fixed(detection)}, fuzzing ${fixed(fuzzing)}; 0.5 is chance)`))];
}

// Longer than a token: in parts that `visible` shows whole.
const allVisible = (text) => text.match(/[^]{1,30}/gu).map((part) => visible(part));

saerelay.views.interpret = async function (body) {
  const run = await saerelay.load("run");
  if (!run.has.interpretations) {
    body.append(missing("No language model has been asked yet what features mean.", "saerelay interpret RUN --model NAME"));
    return;
  }
  const { legs, origins, latents } = await saerelay.load("interpretations");
  const asked = [...new Set(legs.map((leg) => leg.asked.model))].join(", ");
  const count = (n) => n.toLocaleString("en");
  body.append(
    element("p.lead", {}, "A language model (", element("bdi", {}, visible(asked)), ") explained features from the texts in which they fire most. Each explanation is scored by whether it tells where the feature fires in other texts."),
    element("h2", {}, "By origin"),
    plainTable(origins, [["origin", "SAE trained"], ["n_legs", "SAEs", count], ["n_explained", "explained", count], ["detection", "detection", scoreOf], ["fuzzing", "fuzzing", scoreOf]]),
    element("h2", {}, "By SAE"),
    plainTable(legs, [["layer", "layer", count], ["leg", "SAE"], ["origin", "trained"], ["n_explained", "explained", count], ["n_failed", "failed", count], ["n_rare", "too rare", count], ["detection", "detection", scoreOf], ["fuzzing", "fuzzing", scoreOf]]),
    element("p.caption", {}, element("bdi", {}, run.caption), " Balanced accuracy, mean over features ± standard error; 0.5 is chance. Detection: in which texts does the feature fire? Fuzzing: are the marked tokens those it fires on? After Paulo et al. 2024."),
    element("h2", {}, "Explanations"));
  for (const { leg } of legs) {
    const rows = Object.entries(latents[leg] ?? {});
    if (rows.length) body.append(element("details", {}, element("summary", {}, `${leg}: ${rows.length}`),
      element("ul.explanations", {}, rows.map(([latent, [explanation, detection, fuzzing]]) => element("li", {}, element("a", { href: featureAddress(leg, latent) }, latent), " ", element("bdi", {}, allVisible(explanation)), element("span.soft", {}, ` ${fixed(detection)}, ${fixed(fuzzing)}`))))));
  }
};
