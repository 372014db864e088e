// The ground floor of our pages: elements, numbers, tokens, what appears under the pointer, the theme. The judging page
// (`saerelay judge`) stands on it too. Text of tokens and names comes from strangers: it reaches a page through textContent only.
"use strict";

// --- elements -----------------------------------------------------------------------------------------------------

// element("a.button", {href: "#/"}, "text", child, …); attributes that are functions are listeners.
function element(kind, attributes = {}, ...children) {
  const [tag, ...classes] = kind.split(".");
  const made = SVG.has(tag) ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  if (classes.length) made.setAttribute("class", classes.join(" "));
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") made.addEventListener(name, value);
    else if (name.startsWith("--")) made.style.setProperty(name, value);
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return made;
}
const SVG = new Set(["svg", "path", "rect", "line", "circle", "text", "g", "polyline"]);

function choice(label, options, chosen, onChange) {
  const items = options.map(([value, text]) => element("option", { value, selected: String(value) === String(chosen) }, text));
  return element("label", {}, label, element("select", { change: (event) => onChange(event.target.value) }, items));
}

function missing(what, command) {
  return element("p.note", {}, `${what} `, element("code", {}, command), " makes it; then run ", element("code", {}, "saerelay report"), " again.");
}

// --- numbers ------------------------------------------------------------------------------------------------------

const minus = (text) => text.replace("-", "−");

function number(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  if (value !== 0 && (Math.abs(value) >= 10 ** 5 || Math.abs(value) < 10 ** -4)) return minus(value.toExponential(1));
  const rounded = Number(value.toPrecision(digits));
  return minus(rounded.toLocaleString("en", { maximumSignificantDigits: Math.max(digits, 6) }));
}
const fixed = (value, digits = 2) => (value === null || value === undefined ? "–" : minus(value.toFixed(digits).replace(/^-(?=0\.?0*$)/, "")));
const cosine = (thousandths) => (thousandths === null || thousandths === undefined ? "–" : fixed(thousandths / 1000));
const percent = (share) => (share === 0 ? "0 %" : share < 0.0001 ? "< 0.01 %" : `${number(100 * share, 2)} %`);

function count(n) {
  for (const [size, unit] of [[1e9, "B"], [1e6, "M"], [1e3, "k"]]) if (n >= size) return `${Number((n / size).toPrecision(3))}${unit}`;
  return String(n);
}

// --- tokens -------------------------------------------------------------------------------------------------------

const LONGEST = 60; // characters of a token that are shown
const UNSEEN = /[\u0000-\u001f\u007f-\u00a0\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]|\p{Cs}/gu;

// A character that would not be seen, or would move its neighbours, as a sign that stands for it.
function sign(character) {
  const code = character.codePointAt(0);
  if (code === 10) return "⏎";
  if (code === 9) return "⇥";
  if (code < 32) return String.fromCodePoint(0x2400 + code);
  return `[U+${code.toString(16).toUpperCase().padStart(4, "0")}]`;
}

// Text as nodes: unseen characters as signs, long ones cut; at the edges of a chip, spaces as dots.
function visible(text, edges = false) {
  if (text === "") return [element("span.sign", {}, "∅")];
  let shown = text.length > LONGEST ? text.slice(0, LONGEST) : text;
  if (edges) shown = shown.replace(/^ +| +$/g, (spaces) => "·".repeat(spaces.length));
  const nodes = [];
  let from = 0;
  for (const match of shown.matchAll(UNSEEN)) {
    nodes.push(shown.slice(from, match.index), element("span.sign", {}, sign(match[0])));
    from = match.index + match[0].length;
  }
  nodes.push(shown.slice(from));
  if (text.length > LONGEST) nodes.push(element("span.sign", {}, `…(${text.length.toLocaleString("en")} characters)`));
  return nodes;
}

function chip(text, hit = false) {
  return element(hit ? "bdi.chip.hit" : "bdi.chip", {}, visible(text, true));
}

// A token of an example, shaded by its activation's share of the largest; what it tells under the pointer.
function shaded(text, share, told, kind = "") {
  return element(`bdi.token${kind}`, share ? { "--a": 100 * share, "data-tip": told } : {}, visible(text));
}

// The tokens that a feature promotes or suppresses most, as pairs of an entry of the vocabulary and a value.
function effects(title, pairs, side, vocabulary) {
  const most = Math.max(...pairs.map(([, value]) => Math.abs(value)), 1e-9);
  const items = pairs.map(([id, value]) => element("li", { "--w": (100 * Math.abs(value)) / most, "--side": side }, chip(vocabulary[id]), element("span", {}, fixed(value))));
  return element("div", {}, element("h3", {}, title), element("ol", {}, items));
}

// --- what appears under the pointer, or on focus ------------------------------------------------------------------

function tip(event) {
  const box = document.getElementById("tip"), owner = event.target.closest?.("[data-tip]");
  box.hidden = !owner;
  if (!owner) return;
  box.textContent = owner.dataset.tip;
  const at = owner.getBoundingClientRect(), own = box.getBoundingClientRect();
  const x = event.clientX || at.left + at.width / 2, y = event.clientY || at.top;
  box.style.left = `${Math.max(4, Math.min(x + 10, innerWidth - own.width - 4))}px`;
  box.style.top = `${y - own.height - 12 < 0 ? y + 18 : y - own.height - 12}px`;
}
for (const kind of ["pointerover", "pointermove", "focusin"]) document.addEventListener(kind, tip);
document.addEventListener("focusout", () => { document.getElementById("tip").hidden = true; });
document.addEventListener("keydown", (event) => { if (event.key === "Escape") document.getElementById("tip").hidden = true; });

// --- theme: the system's, or the one chosen here, kept where the browser allows it ----------------------------------

const themes = {
  read() { try { return localStorage.getItem("saerelay-theme"); } catch { return null; } },
  write(theme) { try { localStorage.setItem("saerelay-theme", theme); } catch { /* private window, or storage is off */ } },
};
if (themes.read()) document.documentElement.dataset.theme = themes.read();

function switchTheme() {
  const now = document.documentElement.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  document.documentElement.dataset.theme = now === "dark" ? "light" : "dark";
  themes.write(document.documentElement.dataset.theme);
}
addEventListener("DOMContentLoaded", () => document.getElementById("theme").addEventListener("click", switchTheme));
