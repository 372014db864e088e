// A feature's strongest examples as text, and the histogram of its activations.
"use strict";

const NEVER_FIRED = "It never fires on these tokens.";

/**
 * @param {Run} run
 * @param {Feature} feature
 * @param {{ examples: number, beyond: number }} sizes how many examples to show, and how many
 *   tokens beyond each one's window
 */
async function exampleList(run, feature, sizes) {
  if (!feature.examples.length) return element("p.soft", NEVER_FIRED);
  const tokens = await saerelay.load("tokens");
  const vocabulary = await saerelay.load("vocabulary");
  const items = feature.examples.slice(0, sizes.examples).map((columns) => {
    const example = readExample(feature, columns);
    const texts = tokens[example.sequence].map((id) => vocabulary[id] ?? "");
    const largest = Math.max(...example.levels.values());
    const value = number((feature.max * largest) / run.levels);
    const text = exampleText(run, feature, example, texts, sizes.beyond);
    return element("li", element("span.value", value), text);
  });
  return element("ol.examples", items);
}

/**
 * An example from its columns [sequence, position, offset, level, offset, level, …]: the token of
 * its largest activation, the window around it, and the levels of the tokens there that it fires
 * on. Offsets count from the beginning of the window.
 *
 * @param {Feature} feature
 * @param {number[]} columns
 * @returns {Example}
 */
function readExample(feature, [sequence, position, ...pairs]) {
  const { window_before, window_after } = feature.leg.features;
  const start = position - window_before;
  const levels = new Map();
  for (let i = 0; i < pairs.length; i += 2) levels.set(start + pairs[i], pairs[i + 1]);
  return { sequence, position, start, end: position + window_after, levels };
}

/**
 * An example as tokens: shaded by activation in its window, pale beyond it, where activations were
 * not kept.
 *
 * @param {Run} run
 * @param {Feature} feature
 * @param {Example} example
 * @param {string[]} texts of the sequence's tokens
 * @param {number} beyond
 */
function exampleText(run, feature, example, texts, beyond) {
  const { position, start, end, levels } = example;
  const first = Math.max(0, start - beyond);
  const last = Math.min(texts.length - 1, end + beyond);
  const text = element("div.tokens", { dir: "ltr" });
  for (let at = first; at <= last; at++) {
    const share = (levels.get(at) ?? 0) / run.levels;
    const peak = at === position ? ".peak" : "";
    const pale = at < start || at > end ? ".beyond" : "";
    const activation = number(feature.max * share);
    text.append(shadedToken(texts[at], share, activation, peak + pale));
  }
  return text;
}

// --- histogram -----------------------------------------------------------------------------------

const HISTOGRAM = { width: 360, height: 130, foot: 22, head: 6 };

/**
 * Bars over half octaves. The first number is that of the first bin, counted from a power of two
 * that is the same for all features of the SAE.
 *
 * @param {Feature} feature
 */
function histogram({ histogram: [firstBin, ...counts], leg }) {
  if (!counts.length) return element("p.soft", NEVER_FIRED);
  const { width, height, foot } = HISTOGRAM;
  const firstEdge = leg.features.histogram_first_edge;
  /** @param {number} bin */
  const lowerEdge = (bin) => 2 ** (firstEdge + (firstBin + bin) / 2);

  const low = number(lowerEdge(0));
  const high = number(lowerEdge(counts.length));
  const svg = svgElement("svg.chart", {
    viewBox: `0 0 ${width} ${height}`,
    role: "img",
    "aria-label": `Histogram of activations from ${low} to ${high}`,
  });
  const barWidth = width / Math.max(counts.length, 8);
  const labelEvery = Math.ceil(counts.length / 6);
  const most = Math.max(...counts);
  counts.forEach((count, bin) => {
    const x = bin * barWidth;
    const range = `${number(lowerEdge(bin))} and ${number(lowerEdge(bin + 1))}`;
    svg.append(
      ...histogramBar(x, barWidth, count / most, `${wholeNumber(count)} tokens between ${range}`),
    );
    if (bin % labelEvery) return;
    const attributes = { x, y: height - 5, "font-size": 11 };
    svg.append(svgElement("text", attributes, number(lowerEdge(bin), 2)));
  });
  const ground = height - foot;
  svg.append(svgElement("line.grid", { x1: 0, x2: width, y1: ground, y2: ground }));
  return svg;
}

/**
 * A bar, and over its whole column a clear one that carries the tooltip.
 *
 * @param {number} x
 * @param {number} width
 * @param {number} share of the highest bar
 * @param {string} tooltip
 */
function histogramBar(x, width, share, tooltip) {
  const ground = HISTOGRAM.height - HISTOGRAM.foot;
  const height = share ? Math.max(1.5, (ground - HISTOGRAM.head) * share) : 0;
  const bar = { x: x + 1, y: ground - height, width: width - 2, height, rx: 1.5 };
  const column = { x, y: 0, width, height: ground };
  return [
    svgElement("rect", { ...bar, fill: "var(--transfer)" }),
    svgElement("rect", { ...column, fill: "transparent", "data-tip": tooltip }),
  ];
}
