// The lineage drawing: a column for each layer, as high as it has alive features, and bands between
// columns for what became of them.
"use strict";

/** Sizes in the drawing's units. */
const FLOW = {
  columnDistance: 138,
  barWidth: 9,
  left: 34,
  top: 34,
  columnHeight: 250, // of the layer with most features
  below: 62, // for the ends of died and born, and the numbers
};
const BAND_STATUSES = /** @type {Status[]} */ (["k", "d", "r", "x", "b"]);
const NO_COUNTS = { k: 0, d: 0, r: 0, x: 0, b: 0, "-": 0 };

/**
 * @param {Run} run
 * @param {string[]} legs one per layer
 * @param {number[]} links their numbers, one between each two neighbours; -1 where there is none
 * @param {(column: number, status: Status) => void} onBand
 * @returns {Flow}
 */
function drawFlow(run, legs, links, onBand) {
  const layout = flowLayout(run, legs, links);
  const viewBox = `0 0 ${layout.width} ${layout.height}`;
  const svg = svgElement("svg.chart.flow", {
    viewBox,
    role: "group",
    "aria-label": "Features from layer to layer",
    "--least-width": `${layout.width}px`,
  });

  /** @type {SVGElement | null} */
  let chosen = null;
  /** @type {(() => void) | null} */
  let chooseFirstChange = null;
  layout.counts.forEach((counts, column) => {
    for (const status of BAND_STATUSES) {
      if (!counts[status]) continue;
      const band = drawBand(run, layout, column, status);
      const choose = () => {
        chosen?.setAttribute("aria-pressed", "false");
        chosen = band;
        band.setAttribute("aria-pressed", "true");
        onBand(column, status);
      };
      onPress(band, choose);
      svg.append(band, ...drawBandText(layout, column, status));
      if (status === "d" || status === "r") chooseFirstChange ??= choose;
    }
  });
  layout.legs.forEach((leg, column) => svg.append(...drawColumn(run, layout, leg, column)));
  return { svg, chooseFirstChange, trace: (stops) => drawTrace(svg, layout, stops) };
}

/**
 * Click, Enter and Space.
 *
 * @param {SVGElement} button
 * @param {() => void} action
 */
function onPress(button, action) {
  button.addEventListener("click", action);
  button.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    action();
  });
}

// --- where things lie ----------------------------------------------------------------------------

/**
 * @param {Run} run
 * @param {string[]} legs
 * @param {number[]} links
 * @returns {FlowLayout}
 */
function flowLayout(run, legs, links) {
  const counts = links.map((number) => (number < 0 ? NO_COUNTS : run.links[number].counts));
  const alive = legs.map((_, column) => aliveIn(counts, column));
  const afterwards = counts.map((n) => n.k + n.d + n.r + n.b);
  const most = Math.max(1, ...alive, ...afterwards);
  return {
    legs,
    counts,
    alive,
    scale: FLOW.columnHeight / most,
    width: 2 * FLOW.left + FLOW.columnDistance * (legs.length - 1) + FLOW.barWidth,
    height: FLOW.top + FLOW.columnHeight + FLOW.below,
  };
}

/**
 * Alive features of a layer: those that the link to the next layer starts from; of the last layer,
 * those that the link to it ends at.
 *
 * @param {Record<Status, number>[]} counts
 * @param {number} column
 */
function aliveIn(counts, column) {
  if (column < counts.length) {
    const n = counts[column];
    return n.k + n.d + n.r + n.x;
  }
  const n = counts[column - 1];
  return n.k + n.d + n.r + n.b;
}

/** @param {number} column @returns {number} the left edge of its bar */
const columnX = (column) => FLOW.left + FLOW.columnDistance * column;

/** @param {number} column @returns {number} the middle of its bar */
const columnMiddle = (column) => columnX(column) + FLOW.barWidth / 2;

/**
 * A band's upper edge and height: kept above drifted above replaced, on both sides; below these,
 * died on the left and born on the right. It is drawn at least 2 high, so that it can be seen and
 * clicked.
 *
 * @param {FlowLayout} layout
 * @param {number} column
 * @param {Status} status
 */
function bandExtent({ counts, scale }, column, status) {
  const n = counts[column];
  const above = { k: 0, d: n.k, r: n.k + n.d, x: n.k + n.d + n.r, b: n.k + n.d + n.r, "-": 0 };
  const height = n[status] * scale;
  return {
    y: FLOW.top + above[status] * scale,
    height,
    drawnHeight: n[status] ? Math.max(2, height) : 0,
  };
}

// --- bands and columns ---------------------------------------------------------------------------

/**
 * @param {Run} run
 * @param {FlowLayout} layout
 * @param {number} column
 * @param {Status} status
 */
function drawBand(run, layout, column, status) {
  const source = layerName(run, layout.legs[column]);
  const target = layerName(run, layout.legs[column + 1]);
  const count = wholeNumber(layout.counts[column][status]);
  const text = `${count} ${labels.statuses[status]} between ${source} and ${target}`;
  return svgElement(`path.band.${status}`, {
    d: bandPath(layout, column, status),
    role: "button",
    tabindex: 0,
    "aria-pressed": "false",
    "aria-label": text,
    "data-tip": text,
  });
}

/** The lower end of bands that lead from or to no column. */
const FLOW_END = FLOW.top + FLOW.columnHeight + 22;

/**
 * Kept, drifted and replaced go straight across. Died bends down from the left column and born from
 * the right one, each to a point near the middle.
 *
 * @param {FlowLayout} layout
 * @param {number} column
 * @param {Status} status
 */
function bandPath(layout, column, status) {
  const { y, drawnHeight: h } = bandExtent(layout, column, status);
  const left = columnX(column) + FLOW.barWidth;
  const right = columnX(column + 1);
  const middle = (left + right) / 2;
  if (status === "x") {
    const tip = middle - 14;
    const down = `C${left + 22} ${y} ${tip - 2} ${y + 6} ${tip} ${FLOW_END}`;
    const back = `C${tip - 10} ${y + h + 8} ${left + 16} ${y + h} ${left} ${y + h}`;
    return `M${left} ${y} ${down} ${back} z`;
  }
  if (status === "b") {
    const tip = middle + 14;
    const down = `C${right - 22} ${y} ${tip + 2} ${y + 6} ${tip} ${FLOW_END}`;
    const back = `C${tip + 10} ${y + h + 8} ${right - 16} ${y + h} ${right} ${y + h}`;
    return `M${right} ${y} ${down} ${back} z`;
  }
  return `M${left} ${y} H${right} v${h} H${left} z`;
}

/**
 * The share of the layer's features in a band that is high enough for it; for died and born, their
 * number, below.
 *
 * @param {FlowLayout} layout
 * @param {number} column
 * @param {Status} status
 */
function drawBandText(layout, column, status) {
  const n = layout.counts[column][status];
  const middle = (columnX(column) + FLOW.barWidth + columnX(column + 1)) / 2;
  if (status === "x" || status === "b") {
    const died = status === "x";
    const attributes = {
      x: middle + (died ? -14 : 14),
      y: FLOW_END + 14,
      "text-anchor": died ? "end" : "start",
    };
    return [svgElement("text", attributes, `${n} ${labels.statuses[status]}`)];
  }
  const { y, drawnHeight } = bandExtent(layout, column, status);
  if (drawnHeight <= 15) return [];
  const attributes = { x: middle, y: y + drawnHeight / 2 + 4, "text-anchor": "middle" };
  const share = percent(n / (layout.alive[column] || 1));
  return [svgElement(`text.share.${status}`, attributes, share)];
}

/**
 * @param {Run} run
 * @param {FlowLayout} layout
 * @param {string} leg
 * @param {number} column
 */
function drawColumn(run, layout, leg, column) {
  const alive = layout.alive[column];
  const name = { x: columnMiddle(column), y: 14, "text-anchor": "middle" };
  const total = { ...name, y: layout.height - 4, "font-size": 11 };
  return [
    svgElement("rect.node", {
      x: columnX(column),
      y: FLOW.top,
      width: FLOW.barWidth,
      height: Math.max(1, alive * layout.scale),
      rx: 2,
    }),
    svgElement("text", name, layerName(run, leg)),
    svgElement("text", total, wholeNumber(alive)),
  ];
}

// --- one feature's path --------------------------------------------------------------------------

/**
 * Draw one feature's path across the bands, instead of an earlier one.
 *
 * @param {SVGElement} svg
 * @param {FlowLayout} layout
 * @param {Stop[]} stops
 */
function drawTrace(svg, layout, stops) {
  for (const old of svg.querySelectorAll(".halo, .trace, .stop, .cosine")) old.remove();
  svg.classList.add("tracing");

  const heights = stops.map((_, column) => traceHeight(layout, stops, column));
  const columns = stops.map((_, column) => column).filter((c) => stops[c].latent !== null);
  const points = columns.map((c) => `${columnMiddle(c)},${heights[c]}`).join(" ");
  svg.append(svgElement("polyline.halo", { points }), svgElement("polyline.trace", { points }));
  for (const c of columns) {
    svg.append(svgElement("circle.stop", { cx: columnMiddle(c), cy: heights[c], r: 4.5 }));
    const step = stops[c].step;
    if (!step || step.latent === null) continue;
    const nextHeight = heights[Math.min(c + 1, heights.length - 1)];
    const attributes = {
      x: columnMiddle(c) + FLOW.columnDistance / 2,
      y: (heights[c] + nextHeight) / 2 - 8,
      "text-anchor": "middle",
    };
    svg.append(svgElement("text.cosine", attributes, cosine(step.decoder)));
  }
}

/**
 * Where the path crosses a column: in the middle of the band by which it leaves, or else of the one
 * by which it came; at the bottom where it is silent.
 *
 * @param {FlowLayout} layout
 * @param {Stop[]} stops
 * @param {number} column
 */
function traceHeight(layout, stops, column) {
  for (const c of [column, column - 1]) {
    const step = stops[c]?.step;
    if (!step || step.status === "-") continue;
    const { y, height } = bandExtent(layout, c, step.status);
    return y + height / 2;
  }
  return FLOW.top + FLOW.columnHeight;
}
