// Training curves, from the log that training wrote.
"use strict";

/**
 * @typedef {{ kind: string, curve: CurveName, role: string }} TrainingChoice
 *   role: "all", "suite", "controls"
 */

saerelay.views.training = async function drawTraining(body) {
  const [run, training] = await Promise.all([saerelay.load("run"), saerelay.load("training")]);
  const legs = inLayerOrder(run.legs).filter((leg) => training[leg.id]);
  const names = /** @type {CurveName[]} */ (Object.keys(labels.curves));
  const curves = names.filter((name) => legs.some((leg) => training[leg.id][name].some(isNumber)));

  /** @type {TrainingChoice} */
  const choice = { kind: run.kinds[0], curve: curves[0], role: "all" };
  const picture = element("div");

  /** @param {Partial<TrainingChoice>} change */
  function choose(change) {
    Object.assign(choice, change);
    const chart = trainingChart(legs, training, choice);
    const [, definition] = labels.curves[choice.curve];
    const caption = captionOf(
      run,
      `${definition}. Each point is a mean over one block of tokens; dashed lines are controls. ` +
        "Values before the end are not what a shorter run would reach, because the learning rate " +
        "has not decayed yet.",
    );
    picture.replaceChildren(lineChart(chart), caption);
  }
  const hasControls = legs.some((leg) => leg.role === "control");
  body.append(
    element(
      "p.lead",
      "Each SAE during its training, by the number of tokens. A transferred SAE starts from its " +
        "parent's weights, not from a random initialisation.",
    ),
    element(
      "div.controls",
      kindMenu(run, (kind) => choose({ kind })),
      menu(
        "Curve",
        curves.map((name) => [name, labels.curves[name][0]]),
        choice.curve,
        (curve) => choose({ curve: /** @type {CurveName} */ (curve) }),
      ),
      hasControls ? roleMenu((role) => choose({ role })) : null,
    ),
    picture,
  );
  choose({});
};

/** @param {(role: string) => void} onChange */
function roleMenu(onChange) {
  /** @type {[string, string][]} */
  const options = [
    ["all", "all"],
    ["suite", "suite only"],
    ["controls", "controls only"],
  ];
  return menu("SAEs", options, "all", onChange);
}

/**
 * @param {Leg[]} legs
 * @param {DataFiles["training"]} training
 * @param {TrainingChoice} choice
 * @returns {LineChart}
 */
function trainingChart(legs, training, choice) {
  const layers = unique(legs.map((leg) => leg.layer));
  const [name] = labels.curves[choice.curve];
  const logarithmic = choice.curve === "fvu" || choice.curve === "loss";
  const lines = legs
    .filter((leg) => leg.kind === choice.kind && hasRole(leg, choice.role))
    .map((leg) => ({
      id: leg.id,
      name: leg.id,
      colour: colourInOrder(leg.layer, layers),
      dashed: leg.role === "control",
      points: curvePoints(training[leg.id], choice.curve, logarithmic),
    }))
    .filter((line) => line.points.length);
  const label = `${name} of every SAE over its training tokens`;
  return { lines, xLabel: "training tokens", yLabel: name, logarithmic, label };
}

/**
 * @param {Leg} leg
 * @param {string} role
 */
function hasRole(leg, role) {
  if (role === "all") return true;
  return (leg.role === "control") === (role === "controls");
}

/**
 * A column of a leg's training log over its age; on a logarithmic axis, what lies above 0.
 *
 * @param {TrainingLog} log
 * @param {CurveName} name
 * @param {boolean} logarithmic
 */
function curvePoints(log, name, logarithmic) {
  /** @type {[number, number][]} */
  const points = [];
  log.age.forEach((age, i) => {
    const value = log[name][i];
    if (!isNumber(value) || (logarithmic && value <= 0)) return;
    points.push([age, value]);
  });
  return points;
}
