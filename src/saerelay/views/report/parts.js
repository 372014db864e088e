// Parts that several views are made of: a menu, a table, a caption, a note on what is missing.
"use strict";

/**
 * Whether a value of a document exists and is a finite number.
 *
 * @param {unknown} value
 * @returns {value is number}
 */
const isNumber = (value) => Number.isFinite(value);

/**
 * @template Item
 * @param {Item[]} items
 * @returns {Item[]} each once, in the order of their first occurrence
 */
const unique = (items) => [...new Set(items)];

/**
 * The word for a name (see data/labels.js), or the name itself where there is none.
 *
 * @template Label
 * @param {Record<string, Label>} words
 * @param {string} name
 */
const labelOf = (words, name) => words[name] ?? name;

/** @param {string} label at the beginning of a sentence */
const capitalised = (label) => label.charAt(0).toUpperCase() + label.slice(1);

/**
 * Legs from the first layer to the last, at each layer the suite's before its controls.
 *
 * @param {Leg[]} legs
 */
function inLayerOrder(legs) {
  /** @param {Leg} leg */
  const isControl = (leg) => Number(leg.role === "control");
  return [...legs].sort((a, b) => a.layer - b.layer || isControl(a) - isControl(b));
}

/**
 * The suite's legs at the sites of one kind, layer by layer.
 *
 * @param {Run} run
 * @param {string} kind
 */
const standingOf = (run, kind) => run.standing.filter((id) => findLeg(run, id)?.kind === kind);

/**
 * A menu of the run's kinds of sites; null if it has only one.
 *
 * @param {Run} run
 * @param {(kind: string) => void} onChange
 */
function kindMenu(run, onChange) {
  /** @type {[string, string][]} */
  const options = run.kinds.map((kind) => [kind, kind]);
  return run.kinds.length > 1 ? menu("SAEs of", options, run.kinds[0], onChange) : null;
}

/**
 * A menu with a label.
 *
 * @param {string} label
 * @param {[value: string, text: string][]} options
 * @param {string} chosen
 * @param {(value: string) => void} onChange
 */
function menu(label, options, chosen, onChange) {
  const items = options.map(([value, text]) =>
    element("option", { value, selected: value === chosen }, text),
  );
  const select = element("select", { change: (event) => onChange(event.target.value) }, items);
  return element("label", label, select);
}

/**
 * A note that something has not been measured, with the command that measures it.
 *
 * @param {string} sentence
 * @param {string} command
 */
function missingNote(sentence, command) {
  return element(
    "p.note",
    `${sentence} Run `,
    element("code", command),
    ", then ",
    element("code", "saerelay report"),
    " again.",
  );
}

/**
 * A figure's caption: the run's, then this figure's own.
 *
 * @param {Run} run
 * @param {string} text
 */
function captionOf(run, text = "") {
  return element("p.caption", element("bdi", run.caption), text && ` ${text}`);
}

/**
 * Rows of a document as a table. A column without a `format` is text, which is untrusted.
 *
 * @template Row
 * @param {string} label
 * @param {Row[]} rows
 * @param {Column<Row>[]} columns
 */
function dataTable(label, rows, columns) {
  const heads = columns.map(({ heading, format }) =>
    element(format ? "th.n" : "th", { scope: "col" }, heading),
  );
  const body = rows.map((row) => {
    const cells = columns.map((column) => dataCell(row, column));
    return element("tr", cells);
  });
  return element(
    "div.scroll",
    { tabindex: 0, role: "region", "aria-label": label },
    element("table", element("thead", element("tr", heads)), element("tbody", body)),
  );
}

/**
 * @template Row
 * @param {Row} row
 * @param {Column<Row>} column
 */
function dataCell(row, { name, format }) {
  const value = row[name];
  if (format) return element("td.n", format(value));
  return element("td", element("bdi", String(value ?? "–")));
}

/**
 * Show the first items of a long list, and return a button that shows more.
 *
 * @template Item
 * @param {Item[]} items
 * @param {{ first: number, more: number }} sizes
 * @param {(item: Item) => void} append
 */
function revealInSteps(items, sizes, append) {
  let revealed = 0;
  const button = element("button.button", { type: "button" }, "Show more");

  /** @param {number} n */
  function reveal(n) {
    items.slice(revealed, revealed + n).forEach(append);
    revealed += n;
    button.hidden = revealed >= items.length;
  }
  button.addEventListener("click", () => reveal(sizes.more));
  reveal(sizes.first);
  return button;
}
