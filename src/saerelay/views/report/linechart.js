// Lines over one axis, with swatches to pin one of them and a tooltip for the nearest point.
"use strict";

const HOVER_RADIUS = 30; // in the drawing's units: how near the pointer must be to a point

/**
 * A colour for one of an ordered list of names, from blue through red to green.
 *
 * @template {string | number} Name
 * @param {Name} name
 * @param {Name[]} names
 */
function colourInOrder(name, names) {
  const hue = 255 + (170 * names.indexOf(name)) / Math.max(1, names.length - 1);
  return `light-dark(oklch(0.52 0.14 ${hue}), oklch(0.78 0.12 ${hue}))`;
}

// --- axes ----------------------------------------------------------------------------------------

/**
 * Round numbers between two ends: multiples of 1, 2 or 5 times a power of ten, about five of them.
 *
 * @param {number} low
 * @param {number} high
 */
function linearTicks(low, high) {
  const roughStep = (high - low) / 5 || 1;
  const power = 10 ** Math.floor(Math.log10(roughStep));
  const factor = [1, 2, 5].find((m) => m * power >= roughStep) ?? 10;
  const step = factor * power;
  const tolerance = step / 1e6;
  const ticks = [];
  for (let tick = Math.ceil(low / step) * step; tick <= high + tolerance; tick += step) {
    ticks.push(Math.abs(tick) < tolerance ? 0 : tick);
  }
  return ticks;
}

/**
 * Round numbers on a logarithmic axis: more in each power of ten where there are few powers.
 *
 * @param {number} low
 * @param {number} high
 */
function logarithmicTicks(low, high) {
  const powers = Math.log10(high / low);
  let factors = [1, 1.5, 2, 3, 4, 5, 7];
  if (powers > 0.8) factors = [1, 2, 5];
  if (powers > 2) factors = [1];

  const ticks = [];
  for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e++) {
    ticks.push(...factors.map((factor) => factor * 10 ** e));
  }
  return ticks.filter((tick) => tick >= low * 0.999 && tick <= high * 1.001);
}

/**
 * The drawing's size, the ranges of its axes, and where a value lies on them. Axes begin at 0 where
 * they can.
 *
 * @param {LineChart} chart
 * @returns {ChartFrame}
 */
function chartFrame({ lines, logarithmic }) {
  const narrow = innerWidth < 640;
  const width = narrow ? 360 : 960;
  const height = narrow ? 290 : 420;
  const left = 58;
  const right = width - 14;
  const top = 26;
  const bottom = height - 42;

  const points = lines.flatMap((line) => line.points);
  const xs = points.map((point) => point[0]);
  const ys = points.map((point) => point[1]);
  const xRange = { low: Math.min(0, ...xs), high: Math.max(...xs) };
  const yRange = { low: logarithmic ? Math.min(...ys) : Math.min(0, ...ys), high: Math.max(...ys) };
  if (yRange.low === yRange.high) yRange.high += 1;

  /** @param {number} value @returns {number} */
  function x(value) {
    const share = (value - xRange.low) / (xRange.high - xRange.low || 1);
    return left + share * (right - left);
  }

  /** @param {number} value @returns {number} */
  function y(value) {
    const share = logarithmic
      ? Math.log(value / yRange.low) / Math.log(yRange.high / yRange.low)
      : (value - yRange.low) / (yRange.high - yRange.low);
    return bottom - share * (bottom - top);
  }
  return { width, height, left, right, top, bottom, xRange, yRange, x, y };
}

/** @param {number} tick */
const xTickText = (tick) =>
  Number.isInteger(tick) ? withMinusSigns(shortCount(tick)) : number(tick);

/**
 * Grid lines, and numbers and names along both axes.
 *
 * @param {LineChart} chart
 * @param {ChartFrame} frame
 */
function drawAxes({ xLabel, yLabel, logarithmic }, frame) {
  const { height, left, right, bottom, xRange, yRange, x, y } = frame;
  const yTicks = logarithmic
    ? logarithmicTicks(yRange.low, yRange.high)
    : linearTicks(yRange.low, yRange.high);
  const horizontal = yTicks.map((tick) => [
    svgElement("line.grid", { x1: left, x2: right, y1: y(tick), y2: y(tick) }),
    svgElement("text", { x: left - 8, y: y(tick) + 4, "text-anchor": "end" }, number(tick)),
  ]);
  const vertical = linearTicks(xRange.low, xRange.high).map((tick) =>
    svgElement("text", { x: x(tick), y: bottom + 18, "text-anchor": "middle" }, xTickText(tick)),
  );
  const middle = (left + right) / 2;
  const yName = logarithmic ? `${yLabel} (logarithmic)` : yLabel;
  return [
    horizontal,
    vertical,
    svgElement("text", { x: middle, y: height - 6, "text-anchor": "middle" }, xLabel),
    svgElement("text", { x: 4, y: 13 }, yName),
  ];
}

// --- lines ---------------------------------------------------------------------------------------

/**
 * @param {LineChart} chart
 * @returns {HTMLElement}
 */
function lineChart(chart) {
  const frame = chartFrame(chart);
  const viewBox = `0 0 ${frame.width} ${frame.height}`;
  const drawing = svgElement("svg.chart", { viewBox, role: "img", "aria-label": chart.label });
  appendChildren(drawing, drawAxes(chart, frame));

  /** @type {Map<string, SVGElement>} */
  const curves = new Map();
  for (const line of chart.lines) {
    const curve = drawCurve(line, frame);
    curves.set(line.id, curve);
    drawing.append(curve);
  }

  /** @type {string | null} the line chosen by its swatch */
  let pinned = null;
  drawing.addEventListener("pointermove", (event) => {
    const nearest = nearestPoint(chart.lines, frame, positionIn(drawing, frame, event));
    if (nearest) drawing.dataset.tip = pointText(chart, nearest);
    else delete drawing.dataset.tip;
    highlight(curves, nearest ? nearest.line.id : pinned);
  });
  drawing.addEventListener("pointerleave", () => highlight(curves, pinned));

  const swatches = swatchList(chart.lines, (id) => {
    pinned = pinned === id ? null : id;
    highlight(curves, pinned);
    return pinned;
  });
  return element("figure", swatches, drawing);
}

/**
 * @param {Line} line
 * @param {ChartFrame} frame
 */
function drawCurve(line, { x, y }) {
  const corners = line.points.map((point) => `${x(point[0]).toFixed(1)},${y(point[1]).toFixed(1)}`);
  const kind = line.dashed ? "polyline.curve.control" : "polyline.curve";
  const curve = svgElement(kind, { points: corners.join(" ") });
  curve.style.color = line.colour;
  return curve;
}

/**
 * @param {Map<string, SVGElement>} curves
 * @param {string | null} id the line to show above all others; null for none
 */
function highlight(curves, id) {
  for (const [otherId, curve] of curves) {
    curve.classList.toggle("lit", id === otherId);
    curve.classList.toggle("dim", id !== null && id !== otherId);
  }
}

/**
 * The pointer in the drawing's units.
 *
 * @param {SVGElement} drawing
 * @param {ChartFrame} frame
 * @param {PointerEvent} event
 */
function positionIn(drawing, frame, event) {
  const box = drawing.getBoundingClientRect();
  return {
    x: ((event.clientX - box.left) * frame.width) / box.width,
    y: ((event.clientY - box.top) * frame.height) / box.height,
  };
}

/**
 * @param {Line[]} lines
 * @param {ChartFrame} frame
 * @param {{x: number, y: number}} pointer
 */
function nearestPoint(lines, frame, pointer) {
  let nearest = null;
  let least = HOVER_RADIUS ** 2;
  for (const line of lines) {
    for (const [x, y] of line.points) {
      const distance = (frame.x(x) - pointer.x) ** 2 + (frame.y(y) - pointer.y) ** 2;
      if (distance >= least) continue;
      nearest = { line, x, y };
      least = distance;
    }
  }
  return nearest;
}

/**
 * @param {LineChart} chart
 * @param {{line: Line, x: number, y: number}} point
 */
function pointText({ xLabel, yLabel }, { line, x, y }) {
  const xText = Number.isInteger(x) ? shortCount(x) : number(x);
  return `${line.name}\n${yLabel} ${number(y, 4)} at ${xLabel} ${xText}`;
}

/**
 * A button for each line, pressed while the line is pinned.
 *
 * @param {Line[]} lines
 * @param {(id: string) => string | null} pin pins or unpins a line; returns the pinned one
 */
function swatchList(lines, pin) {
  const buttons = lines.map((line) => {
    const mark = element("i", { "aria-hidden": "true" });
    mark.style.color = line.colour;
    return element("button", { type: "button", "aria-pressed": "false" }, mark, line.name);
  });
  buttons.forEach((button, i) => {
    button.addEventListener("click", () => {
      const pinned = pin(lines[i].id);
      buttons.forEach((other, j) => {
        other.setAttribute("aria-pressed", String(lines[j].id === pinned));
      });
    });
  });
  const items = buttons.map((button, i) => element(lines[i].dashed ? "li.control" : "li", button));
  return element("ul.swatches", items);
}
