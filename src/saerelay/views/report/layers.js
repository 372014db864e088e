// Across layers: every SAE on every layer's activations.
"use strict";

/**
 * @typedef {{ kind: string, metric: string, method: string, age: string }} LayersChoice
 *   age "": at its end
 */

saerelay.views.layers = async function drawLayers(body) {
  const run = await saerelay.load("run");
  if (!run.has.matrix) {
    const sentence = "The SAEs have not been measured across layers yet.";
    body.append(missingNote(sentence, "saerelay matrix RUN"));
    return;
  }
  const matrix = await saerelay.load("matrix");
  const methods = unique(matrix.cells.map((cell) => cell.method));
  const metrics = Object.keys(run.metrics).filter((name) =>
    matrix.cells.some((cell) => isNumber(cell[name])),
  );
  const snapshots = matrix.cells.filter((cell) => cell.snapshot);
  const ages = unique(snapshots.map((cell) => cell.tokens)).sort((a, b) => a - b);

  /** @type {LayersChoice} */
  const choice = { kind: run.kinds[0], metric: metrics[0], method: methods[0], age: "" };
  const picture = element("div");

  /** @param {Partial<LayersChoice>} change */
  function choose(change) {
    Object.assign(choice, change);
    picture.replaceChildren(...matrixPicture(run, matrix, choice));
  }
  body.append(
    element(
      "p.lead",
      "How well each layer's SAE reconstructs the activations of every layer, without any " +
        "training there: the starting point of each possible transfer, before fine-tuning.",
    ),
    element(
      "div.controls",
      kindMenu(run, (kind) => choose({ kind })),
      menu(
        "Metric",
        metrics.map((name) => [name, run.metrics[name][0]]),
        choice.metric,
        (metric) => choose({ metric }),
      ),
      menu(
        "Transfer method",
        methods.map((name) => [name, labelOf(labels.methods, name)]),
        choice.method,
        (method) => choose({ method }),
      ),
      ages.length ? ageMenu(ages, (age) => choose({ age })) : null,
    ),
    picture,
  );
  choose({});
};

/**
 * @param {number[]} ages
 * @param {(age: string) => void} onChange
 */
function ageMenu(ages, onChange) {
  /** @type {[string, string][]} */
  const options = ages.map((age) => [String(age), `${shortCount(age)} tokens`]);
  return menu("SAE after", [["", "all its training"], ...options], "", onChange);
}

/**
 * The mean over neighbours, the heat map, and its caption.
 *
 * @param {Run} run
 * @param {Matrix} matrix
 * @param {LayersChoice} choice
 */
function matrixPicture(run, matrix, choice) {
  const cells = chosenCells(run, matrix, choice);
  const [name, definition] = run.metrics[choice.metric];
  const method = labelOf(labels.methods, choice.method);
  /** @param {number} offset @param {string} where */
  const mean = (offset, where) => {
    const value = meanAtOffset([...cells.values()], choice.metric, offset);
    return value && `${value} ${where}`;
  };
  const means = [
    mean(0, "on the SAE's own layer"),
    mean(1, "one layer later (forward)"),
    mean(-1, "one layer earlier (backward)"),
  ];
  const onFewer =
    matrix.n_tokens < run.n_tokens
      ? `Measured on the first ${wholeNumber(matrix.n_tokens)} of these tokens, so values on the ` +
        "SAEs' own layers differ slightly from the summary. "
      : "";
  return [
    element("p", `Mean ${name}: ${means.filter(Boolean).join(", ")}.`),
    heatMap({
      rows: matrix.layers,
      columns: matrix.layers,
      corner: "SAE ↓ on layer →",
      digits: 3,
      rowName: (layer) => `SAE of layer ${layer}`,
      columnName: (layer) => String(layer),
      value: (source, target) => cells.get(`${source},${target}`)?.[choice.metric],
      tooltip(source, target, value) {
        const how = source === target ? "its own layer" : method;
        return `${name} ${number(value, 4)}\nSAE of layer ${source} on layer ${target} (${how})`;
      },
    }),
    captionOf(
      run,
      `${onFewer}Maps were fitted on ${wholeNumber(matrix.map_tokens)} training tokens; nothing ` +
        `was trained on the target layer. ${definition}.`,
    ),
  ];
}

/**
 * Cells by "source,target": of SAEs of one age, transferred by one method. The cells of SAEs at
 * their own layers need no transfer, so they belong to every method.
 *
 * @param {Run} run
 * @param {Matrix} matrix
 * @param {LayersChoice} choice
 * @returns {Map<string, MatrixCell>}
 */
function chosenCells(run, matrix, { kind, method, age }) {
  const cells = new Map();
  const standing = standingOf(run, kind);
  for (const cell of matrix.cells) {
    const ofKind = findLeg(run, cell.leg)?.kind === kind;
    const ofAge = age
      ? cell.snapshot && String(cell.tokens) === age
      : !cell.snapshot && standing.includes(cell.leg);
    const ofMethod = cell.method === method || cell.source === cell.target;
    if (ofKind && ofAge && ofMethod) cells.set(`${cell.source},${cell.target}`, cell);
  }
  return cells;
}

/**
 * Mean over the cells whose target is `offset` layers after their source; "" if there are none.
 *
 * @param {MatrixCell[]} cells
 * @param {string} metric
 * @param {number} offset
 */
function meanAtOffset(cells, metric, offset) {
  const values = cells
    .filter((cell) => cell.target - cell.source === offset)
    .map((cell) => cell[metric])
    .filter(isNumber);
  if (!values.length) return "";
  const sum = values.reduce((total, value) => total + value, 0);
  return number(sum / values.length);
}
