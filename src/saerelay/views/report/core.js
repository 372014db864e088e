// Shared by the report and the judging page (`saerelay judge`): elements, numbers, token text, the
// tooltip, the theme. Token text and names are untrusted: they reach a page as text nodes only.
"use strict";

// --- elements ------------------------------------------------------------------------------------

/**
 * An HTML element: `element("a.button", { href: "#/" }, "text", child, …)`, or without attributes
 * `element("p", "text")`.
 *
 * @param {string} kind a tag, then classes: "a.button.primary"
 * @param {Parts} parts
 * @returns {HTMLElement}
 */
function element(kind, ...parts) {
  const [tag, ...classes] = kind.split(".");
  const node = document.createElement(tag);
  complete(node, classes, parts);
  return node;
}

/**
 * The same for an element of a drawing: `svgElement("line.grid", { x1: 0, x2: 9 })`.
 *
 * @param {string} kind
 * @param {Parts} parts
 * @returns {SVGElement}
 */
function svgElement(kind, ...parts) {
  const [tag, ...classes] = kind.split(".");
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  complete(node, classes, parts);
  return /** @type {SVGElement} */ (node);
}

/**
 * @param {Element} node
 * @param {string[]} classes
 * @param {Parts} parts
 */
function complete(node, classes, parts) {
  if (classes.length) node.setAttribute("class", classes.join(" "));
  const [first, ...others] = parts;
  const attributes = isAttributes(first) ? first : {};
  const children = isAttributes(first) ? others : parts;
  for (const [name, value] of Object.entries(attributes)) setAttribute(node, name, value);
  appendChildren(node, /** @type {Child[]} */ (children));
}

/**
 * @param {Attributes | Child} part
 * @returns {part is Attributes}
 */
function isAttributes(part) {
  if (typeof part !== "object" || part === null) return false;
  return !Array.isArray(part) && !(part instanceof Node);
}

/**
 * A function is a listener, and a name that begins with "--" is a style property; null, undefined
 * and false leave the attribute out.
 *
 * @param {Element} node
 * @param {string} name
 * @param {AttributeValue} value
 */
function setAttribute(node, name, value) {
  if (value === null || value === undefined || value === false) return;
  if (typeof value === "function") {
    node.addEventListener(name, value);
  } else if (name.startsWith("--")) {
    /** @type {HTMLElement} */ (node).style.setProperty(name, String(value));
  } else {
    node.setAttribute(name, value === true ? "" : String(value));
  }
}

/**
 * Children may be nested lists; null and undefined are left out.
 *
 * @param {Element} node
 * @param {Child[]} children
 */
function appendChildren(node, children) {
  for (const child of children) {
    if (Array.isArray(child)) appendChildren(node, child);
    else if (child !== null && child !== undefined) node.append(child);
  }
}

/**
 * An element that the page's own HTML contains.
 *
 * @param {string} id
 * @returns {HTMLElement}
 */
function byId(id) {
  const node = document.getElementById(id);
  if (!node) throw new Error(`this page has no element #${id}`);
  return node;
}

// --- numbers -------------------------------------------------------------------------------------

/** @param {string} text a number as JavaScript writes it, with hyphens for minus signs */
const withMinusSigns = (text) => text.replaceAll("-", "−");

/**
 * A number to some significant digits: "1,234", "0.0123", "1.0e−5"; "–" where there is none.
 *
 * @param {number | null | undefined} value
 * @param {number} digits
 */
function number(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (value !== 0 && (size >= 1e5 || size < 1e-4)) return withMinusSigns(value.toExponential(1));
  const rounded = Number(value.toPrecision(digits));
  const options = { maximumSignificantDigits: Math.max(digits, 6) };
  return withMinusSigns(rounded.toLocaleString("en", options));
}

/**
 * A number with a fixed count of decimals, never "−0.00"; "–" where there is none.
 *
 * @param {number | null | undefined} value
 * @param {number} decimals
 */
function fixed(value, decimals = 2) {
  if (value === null || value === undefined) return "–";
  const text = value.toFixed(decimals).replace(/^-(?=0\.?0*$)/, "");
  return withMinusSigns(text);
}

/** @param {number | null | undefined} thousandths a cosine or correlation, as data files have it */
function cosine(thousandths) {
  if (thousandths === null || thousandths === undefined) return "–";
  return fixed(thousandths / 1000);
}

/** @param {number} share written with a space that does not break */
function percent(share) {
  if (share === 0) return "0\u00a0%";
  if (share < 0.0001) return "<\u00a00.01\u00a0%";
  return `${number(100 * share, 2)}\u00a0%`;
}

/** @param {number} n a whole number, written in full: "1,234,567" */
const wholeNumber = (n) => n.toLocaleString("en");

/** @param {number} n a count in short: "1.23M" */
function shortCount(n) {
  if (n >= 1e9) return `${Number((n / 1e9).toPrecision(3))}B`;
  if (n >= 1e6) return `${Number((n / 1e6).toPrecision(3))}M`;
  if (n >= 1e3) return `${Number((n / 1e3).toPrecision(3))}k`;
  return String(n);
}

// --- tokens --------------------------------------------------------------------------------------

const MAX_CHARACTERS = 60; // of one token; the rest is counted
const INVISIBLE =
  /[\u0000-\u001f\u007f-\u00a0\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]|\p{Cs}/gu;

/**
 * A visible sign for a character that cannot be seen, or that would reorder its neighbours.
 *
 * @param {string} character
 */
function signOf(character) {
  const code = /** @type {number} */ (character.codePointAt(0));
  if (code === 10) return "⏎";
  if (code === 9) return "⇥";
  if (code < 32) return String.fromCodePoint(0x2400 + code); // Unicode's own pictures of these
  return `[U+${code.toString(16).toUpperCase().padStart(4, "0")}]`;
}

/**
 * Text as nodes: signs for invisible characters, and no more than MAX_CHARACTERS.
 *
 * @param {string} text
 * @param {boolean} dotted whether spaces at either end are drawn as dots
 * @returns {Child[]}
 */
function visibleText(text, dotted = false) {
  if (text === "") return [element("span.sign", "∅")];
  let start = text.slice(0, MAX_CHARACTERS);
  if (dotted) start = start.replace(/^ +| +$/g, (spaces) => "·".repeat(spaces.length));

  /** @type {Child[]} */
  const nodes = [];
  let end = 0; // of what is in nodes so far
  for (const match of start.matchAll(INVISIBLE)) {
    nodes.push(start.slice(end, match.index));
    nodes.push(element("span.sign", signOf(match[0])));
    end = match.index + match[0].length;
  }
  nodes.push(start.slice(end));

  if (text.length > MAX_CHARACTERS) {
    nodes.push(element("span.sign", `…(${wholeNumber(text.length)} characters)`));
  }
  return nodes;
}

/**
 * A token standing alone, its spaces as dots.
 *
 * @param {string} text
 * @param {boolean} isHit whether a search found it
 */
function chip(text, isHit = false) {
  return element(isHit ? "bdi.chip.hit" : "bdi.chip", visibleText(text, true));
}

/**
 * A token of an example, shaded by its activation.
 *
 * @param {string} text
 * @param {number} share its activation as a share of the feature's largest; 0 leaves it plain
 * @param {string} tooltip
 * @param {string} classes ".peak" for the token of the largest activation, ".beyond" outside the
 *   window; "" for others
 */
function shadedToken(text, share, tooltip, classes = "") {
  const attributes = share ? { "--a": 100 * share, "data-tip": tooltip } : {};
  return element(`bdi.token${classes}`, attributes, visibleText(text));
}

/**
 * The tokens that a feature promotes or suppresses most, with bars.
 *
 * @param {string} title
 * @param {[id: number, value: number][]} pairs
 * @param {string} colour
 * @param {Record<number, string>} vocabulary
 */
function logitEffects(title, pairs, colour, vocabulary) {
  const sizes = pairs.map(([, value]) => Math.abs(value));
  const largest = Math.max(...sizes, 1e-9);
  const items = pairs.map(([id, value], i) => {
    const attributes = { "--w": (100 * sizes[i]) / largest, "--side": colour };
    return element("li", attributes, chip(vocabulary[id]), element("span", number(value)));
  });
  return element("div", element("h3", title), element("ol", items));
}

// --- tooltip: the data-tip of what is under the pointer or has the focus -------------------------

/** @param {Event} event */
function showTooltip(event) {
  const target = /** @type {Element} */ (event.target);
  const owner = /** @type {HTMLElement | null} */ (target.closest?.("[data-tip]") ?? null);
  const tooltip = byId("tip");
  tooltip.hidden = !owner;
  if (!owner) return;
  tooltip.textContent = owner.dataset.tip ?? "";

  // At the pointer; for keyboard focus, which has no position, at the element. Above it where there
  // is room, and never beyond the window's sides.
  const { clientX = 0, clientY = 0 } = /** @type {Partial<PointerEvent>} */ (event);
  const ownerBox = owner.getBoundingClientRect();
  const x = clientX || ownerBox.left + ownerBox.width / 2;
  const y = clientY || ownerBox.top;
  const size = tooltip.getBoundingClientRect();
  const left = Math.max(4, Math.min(x + 10, innerWidth - size.width - 4));
  const above = y - size.height - 12;
  tooltip.style.left = `${left}px`;
  tooltip.style.top = `${above < 0 ? y + 18 : above}px`;
}

function hideTooltip() {
  byId("tip").hidden = true;
}

for (const type of ["pointerover", "pointermove", "focusin"]) {
  document.addEventListener(type, showTooltip);
}
document.addEventListener("focusout", hideTooltip);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") hideTooltip();
});

// --- theme: the system's, or the one chosen here, remembered where the browser allows it ---------

const THEME_KEY = "saerelay-theme";

function savedTheme() {
  try {
    return localStorage.getItem(THEME_KEY);
  } catch {
    return null;
  }
}

/** @param {string} theme */
function saveTheme(theme) {
  try {
    localStorage.setItem(THEME_KEY, theme);
  } catch {
    // A private window, or storage is off: the theme holds until the page is closed.
  }
}

function currentTheme() {
  const chosen = document.documentElement.dataset.theme;
  if (chosen) return chosen;
  return matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
}

function switchTheme() {
  const theme = currentTheme() === "dark" ? "light" : "dark";
  document.documentElement.dataset.theme = theme;
  saveTheme(theme);
}

const themeAtStart = savedTheme();
if (themeAtStart) document.documentElement.dataset.theme = themeAtStart;
addEventListener("DOMContentLoaded", () => byId("theme").addEventListener("click", switchTheme));
