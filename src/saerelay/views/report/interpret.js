// Explanations of features by a language model: scores by origin and by SAE, the explanations, and
// a line on a feature's page.
"use strict";

saerelay.views.interpret = async function drawInterpretations(body) {
  const run = await saerelay.load("run");
  if (!run.has.interpretations) {
    const sentence = "No language model has explained these features yet.";
    body.append(missingNote(sentence, "saerelay interpret RUN --model NAME"));
    return;
  }
  const { legs, origins, latents } = await saerelay.load("interpretations");
  const models = unique(legs.map((leg) => leg.asked.model)).join(", ");
  body.append(
    element(
      "p.lead",
      "A language model (",
      element("bdi", visibleText(models)),
      ") explained features from the texts in which they fire most. An explanation is scored by " +
        "how well it predicts where the feature fires in other texts.",
    ),
    element("h2", "Scores by origin"),
    originTable(origins),
    element("h2", "Scores by SAE"),
    legTable(legs),
    captionOf(
      run,
      "Balanced accuracy (chance is 0.5), mean over features ± standard error. Detection: does " +
        "the feature fire in this text? Fuzzing: are the marked tokens those on which it fires? " +
        "After Paulo et al. 2024.",
    ),
    element("h2", "Explanations"),
    ...legs.map(({ leg }) => explanationsOf(leg, latents[leg] ?? {})),
  );
};

/** @param {InterpretedOrigin[]} rows */
function originTable(rows) {
  const named = rows.map((row) => ({ ...row, origin: labelOf(labels.origins, row.origin) }));
  return dataTable("Scores by origin", named, [
    { name: "origin", heading: "origin" },
    { name: "n_legs", heading: "SAEs", format: wholeNumber },
    { name: "n_explained", heading: "explained", format: wholeNumber },
    { name: "detection", heading: "detection", format: scoreText },
    { name: "fuzzing", heading: "fuzzing", format: scoreText },
  ]);
}

/** @param {InterpretedLeg[]} rows */
function legTable(rows) {
  const named = rows.map((row) => ({ ...row, origin: labelOf(labels.origins, row.origin) }));
  return dataTable("Scores by SAE", named, [
    { name: "layer", heading: "layer", format: wholeNumber },
    { name: "leg", heading: "SAE" },
    { name: "origin", heading: "origin" },
    { name: "n_explained", heading: "explained", format: wholeNumber },
    { name: "n_failed", heading: "failed", format: wholeNumber },
    { name: "n_rare", heading: "too rare", format: wholeNumber },
    { name: "detection", heading: "detection", format: scoreText },
    { name: "fuzzing", heading: "fuzzing", format: scoreText },
  ]);
}

/** @param {Score} score */
function scoreText({ mean, standard_error }) {
  if (mean === null) return "–";
  if (standard_error === null) return fixed(mean, 3);
  return `${fixed(mean, 3)} ± ${fixed(standard_error, 3)}`;
}

/**
 * The explanations of one SAE's features, folded up.
 *
 * @param {string} legId
 * @param {Record<string, Explanation>} latents
 */
function explanationsOf(legId, latents) {
  const entries = Object.entries(latents);
  if (!entries.length) return "";
  const items = entries.map(([latent, [explanation, detection, fuzzing]]) =>
    element(
      "li",
      element("a", { href: featureAddress(legId, latent) }, latent),
      " ",
      element("bdi", explanationText(explanation)),
      element("span.soft", ` ${fixed(detection)}, ${fixed(fuzzing)}`),
    ),
  );
  return element(
    "details",
    element("summary", `${legId}: ${entries.length} explained`),
    element("ul.explanations", items),
  );
}

/**
 * A line for a feature's page, or nothing if the feature was not explained.
 *
 * @param {Run} run
 * @param {string} legId
 * @param {number} latent
 */
async function explanationLine(run, legId, latent) {
  if (!run.has.interpretations) return null;
  const { latents } = await saerelay.load("interpretations");
  const entry = latents[legId]?.[latent];
  if (!entry) return null;
  const [explanation, detection, fuzzing] = entry;
  const scores = `detection ${fixed(detection)}, fuzzing ${fixed(fuzzing)}; chance is 0.5`;
  return element(
    "p.explanation.wide",
    element("b", "Explanation: "),
    element("bdi", explanationText(explanation)),
    element("span.soft", ` (${scores})`),
  );
}

/**
 * An explanation, which is longer than a token: in pieces that `visibleText` does not cut.
 *
 * @param {string} text
 */
function explanationText(text) {
  const pieces = text.match(/[^]{1,30}/gu) ?? [];
  return pieces.map((piece) => visibleText(piece));
}
