// What the dictionaries of different layers have in common, after Ghilardi et al. 2024.
"use strict";

saerelay.views.measures = async function drawMeasures(body) {
  const run = await saerelay.load("run");
  if (!run.has.measures) {
    body.append(
      missingNote(
        "Similarity of dictionaries, feature transferability, transfer scores, means by layer " +
          "offset and direct logit attribution have not been measured yet.",
        "saerelay measures RUN",
      ),
    );
    return;
  }
  const measures = await saerelay.load("measures");
  body.append(
    element(
      "p.lead",
      "What the dictionaries of different layers have in common and what transfer achieved, by " +
        "the measures of Ghilardi et al. 2024.",
    ),
    ...similaritySection(run, measures),
    ...transferabilitySection(run, measures),
    ...transferScoreSection(run, measures),
    ...offsetSection(run, measures),
    ...attributionSection(run, measures),
  );
};

/**
 * Rows of finished SAEs: measures.json also has rows of snapshots.
 *
 * @template {{ snapshot: boolean }} Row
 * @param {Row[] | null} rows
 */
const finished = (rows) => (rows ?? []).filter((row) => !row.snapshot);

/**
 * @param {Run} run
 * @param {Measures} measures
 */
function similaritySection(run, measures) {
  const pairs = finished(measures.similarity).filter((row) => row.kind === "suite");
  if (!pairs.length) return [];
  const layerOf = Object.fromEntries(run.legs.map((leg) => [leg.id, leg.layer]));
  const picture = element("div");
  const choice = { kind: run.kinds[0], name: "mmcs_folded" };

  /** @param {Partial<typeof choice>} change */
  function draw(change) {
    const { kind, name } = Object.assign(choice, change);
    const standing = standingOf(run, kind);
    const map = heatMap({
      rows: standing,
      columns: standing,
      corner: "from ↓ to →",
      digits: 2,
      rowName: (leg) => `layer ${layerOf[leg]}`,
      columnName: (leg) => String(layerOf[leg]),
      value(source, target) {
        const pair = pairs.find((row) => row.source === source && row.target === target);
        return name === "mmcs" ? pair?.mmcs : pair?.mmcs_folded;
      },
      tooltip: (source, target, value) =>
        `${number(value, 4)}: features of layer ${layerOf[source]} in layer ${layerOf[target]}`,
    });
    picture.replaceChildren(map);
  }
  draw({});
  /** @type {[string, string][]} */
  const options = [
    ["mmcs_folded", "folded through the affine map"],
    ["mmcs", "raw, as in the paper"],
  ];
  return [
    element("h2", "Mean maximum cosine similarity"),
    element(
      "div.controls",
      kindMenu(run, (kind) => draw({ kind })),
      menu("Decoder rows", options, choice.name, (name) => draw({ name })),
    ),
    picture,
    captionOf(
      run,
      "For each alive feature of the source, the largest cosine between its decoder row and " +
        "those of the target's alive features; mean over features. Layers do not share one " +
        "activation space, so source rows are first folded through the affine map between the " +
        "layers.",
    ),
  ];
}

/**
 * @param {Run} run
 * @param {Measures} measures
 */
function transferabilitySection(run, measures) {
  const rows = finished(measures.transferability);
  if (!rows.length) return [];
  return [
    element("h2", "Feature transferability"),
    dataTable("Feature transferability", rows, [
      { name: "leg", heading: "SAE" },
      { name: "parent", heading: "parent" },
      { name: "n_latents", heading: "features", format: wholeNumber },
      { name: "top_logits", heading: "promoted tokens", format: fixed },
      { name: "bottom_logits", heading: "suppressed tokens", format: fixed },
      { name: "top_tokens", heading: "top-activating tokens", format: fixed },
      { name: "transferability", heading: "mean of the three", format: fixed },
    ]),
    captionOf(
      run,
      "Share of tokens that a feature and its parent feature have in common, among the tokens " +
        "that they promote, suppress and fire on most; mean over features that are alive in both " +
        "SAEs.",
    ),
  ];
}

/**
 * @param {Run} run
 * @param {Measures} measures
 */
function transferScoreSection(run, measures) {
  const rows = finished(measures.transfer_scores).map((row) => {
    return { ...row, method: labelOf(labels.methods, row.method) };
  });
  if (!rows.length) return [];
  return [
    element("h2", "Transfer score"),
    dataTable("Transfer score", rows, [
      { name: "leg", heading: "SAE" },
      { name: "parent", heading: "parent" },
      { name: "scratch", heading: "compared with" },
      { name: "method", heading: "zero-shot method" },
      { name: "fvu", heading: "FVU", format: fixed },
      { name: "ce_loss_score", heading: "CE score", format: fixed },
    ]),
    captionOf(
      run,
      "(transferred − zero-shot) / (from scratch − zero-shot). 0: no better than the parent " +
        "without any training at the new layer (zero-shot). 1: as good as the SAE trained from " +
        "scratch. Above 1: better. –: zero-shot is already as good as from scratch. Measured on " +
        "the tokens of “Across layers”.",
    ),
  ];
}

/**
 * @param {Run} run
 * @param {Measures} measures
 */
function offsetSection(run, measures) {
  const offsets = measures.offsets ?? [];
  if (!offsets.length) return [];
  const metrics = unique(offsets.map((row) => row.metric));
  const picture = element("div");
  /** @param {string} metric */
  const nameOf = (metric) => run.metrics[metric]?.[0] ?? metric;
  const choice = { kind: run.kinds[0], metric: metrics[0] };
  /** @param {Partial<typeof choice>} change */
  const draw = (change) => {
    const { kind, metric } = Object.assign(choice, change);
    const rows = offsets.filter(
      (row) =>
        row.metric === metric &&
        (row.kind === kind || !row.kind) &&
        !row.tokens &&
        isNumber(row.mean),
    );
    picture.replaceChildren(lineChart(offsetChart(rows, metric, nameOf(metric))));
  };
  draw({});
  /** @type {[string, string][]} */
  const options = metrics.map((metric) => [metric, nameOf(metric)]);
  return [
    element("h2", "By layer offset"),
    element(
      "div.controls",
      kindMenu(run, (kind) => draw({ kind })),
      menu("Metric", options, choice.metric, (metric) => draw({ metric })),
    ),
    picture,
    captionOf(
      run,
      "Means over the cells of “Across layers” by target minus source layer. (The paper's " +
        "offsets have the opposite sign.)",
    ),
  ];
}

/**
 * A line for each method.
 *
 * @param {OffsetRow[]} rows
 * @param {string} metric
 * @param {string} metricName
 * @returns {LineChart}
 */
function offsetChart(rows, metric, metricName) {
  const methods = unique(rows.map((row) => row.method));
  const lines = methods.map((method) => {
    const ofMethod = rows.filter((row) => row.method === method);
    return {
      id: method,
      name: labelOf(labels.methods, method),
      colour: colourInOrder(method, methods),
      dashed: false,
      points: ofMethod.map(offsetPoint).sort((a, b) => a[0] - b[0]),
    };
  });
  const positive = rows.every((row) => row.mean > 0);
  return {
    lines,
    xLabel: "target layer − source layer",
    yLabel: metricName,
    logarithmic: positive && metric !== "l0",
    label: `${metricName} by layer offset`,
  };
}

/** @param {OffsetRow} row @returns {[number, number]} */
const offsetPoint = (row) => [row.offset, row.mean];

/**
 * @param {Run} run
 * @param {Measures} measures
 */
function attributionSection(run, measures) {
  if (!measures.dla?.legs.length) return [];
  return [
    element("h2", "Direct logit attribution"),
    dataTable("Direct logit attribution", finished(measures.dla.legs), [
      { name: "leg", heading: "SAE" },
      { name: "layer", heading: "layer", format: number },
      { name: "mean", heading: "mean", format: number },
      { name: "standard_error", heading: "± standard error", format: number },
    ]),
    captionOf(
      run,
      `For each of ${measures.dla.n_prompts} prompts, the largest value over features of ` +
        "activation × decoder row · (unembedding of the correct token − that of the wrong one); " +
        "mean over prompts.",
    ),
  ];
}
