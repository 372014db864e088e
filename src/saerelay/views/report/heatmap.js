// A table of coloured cells.
"use strict";

/**
 * `value(row, column)` is a number, or nothing for an empty cell. Rows and columns are layers,
 * or SAEs, from the first to the last; where a row meets its own column, the cell is framed.
 *
 * @template {string | number} Name
 * @param {HeatMap<Name>} map
 */
function heatMap(map) {
  const { rows, columns, corner } = map;
  const scale = heatScale(map);
  const body = rows.map((row) => {
    const cells = columns.map((column) => heatCell(map, scale, row, column));
    return element("tr", element("th", { scope: "row" }, map.rowName(row)), cells);
  });

  const heads = [corner, ...columns.map((column) => map.columnName(column))];
  const head = element(
    "tr",
    heads.map((text) => element("th", { scope: "col" }, text)),
  );
  const table = element("table.heat", element("thead", head), element("tbody", body));
  table.querySelector("td[tabindex]")?.setAttribute("tabindex", "0");
  return element("div", element("div.scroll", table), heatKey(map, scale));
}

/**
 * Colours over the range of values; logarithmic where that spans more than a factor of 20.
 *
 * @template {string | number} Name
 * @param {HeatMap<Name>} map
 * @returns {HeatScale}
 */
function heatScale({ rows, columns, value, digits }) {
  const values = rows.flatMap((row) => columns.map((column) => value(row, column)));
  const numbers = values.filter(isNumber);
  const low = Math.min(...numbers);
  const high = Math.max(...numbers);
  const logarithmic = low > 0 && high / low > 20;

  /** @param {number} v @returns {number} 0 for the lowest value, 100 for the highest */
  function percentOfRange(v) {
    if (number(high, digits) === number(low, digits)) return 50; // the numbers shown are equal
    if (logarithmic) return (100 * Math.log(v / low)) / Math.log(high / low);
    return (100 * (v - low)) / (high - low);
  }
  return { low, high, logarithmic, percentOfRange };
}

/**
 * @template {string | number} Name
 * @param {HeatMap<Name>} map
 * @param {HeatScale} scale
 * @param {Name} row
 * @param {Name} column
 */
function heatCell(map, scale, row, column) {
  const value = map.value(row, column);
  if (!isNumber(value)) return element("td.none", "–");
  const p = scale.percentOfRange(value);
  const home = row === column ? ".home" : "";
  const attributes = {
    "--p": p.toFixed(1),
    "data-tip": map.tooltip(row, column, value),
    tabindex: -1,
    keydown: moveInTable,
  };
  const text = map.columns.length > 18 ? "" : heatNumber(value, map.digits);
  return element(`td${home}`, attributes, text);
}

/**
 * All digits even if they are zeros, so that columns of numbers align; but not for sizes that would
 * need an exponent.
 *
 * @param {number} value
 * @param {number} digits
 */
function heatNumber(value, digits) {
  const size = Math.abs(value);
  if (size >= 0.001 && size < 1000) return withMinusSigns(value.toPrecision(digits));
  return number(value, digits);
}

/**
 * What the colours and the frame mean, below the table.
 *
 * @template {string | number} Name
 * @param {HeatMap<Name>} map
 * @param {HeatScale} scale
 */
function heatKey({ rows, columns, value, digits }, { low, high, logarithmic }) {
  const framed = rows.some((row) => columns.includes(row) && isNumber(value(row, row)));
  return element(
    "p.scale",
    number(low, digits),
    element("i", { "aria-hidden": "true" }),
    number(high, digits),
    logarithmic ? element("span", "logarithmic colour scale") : null,
    framed ? element("span", "framed: an SAE on its own layer") : null,
  );
}

/** Rows and columns to move by, for each arrow key. */
const ARROWS = /** @type {Record<string, [number, number]>} */ ({
  ArrowLeft: [0, -1],
  ArrowRight: [0, 1],
  ArrowUp: [-1, 0],
  ArrowDown: [1, 0],
});

/**
 * Arrow keys go from cell to cell; only one cell at a time can be reached with the Tab key.
 *
 * @param {KeyboardEvent} event
 */
function moveInTable(event) {
  const move = ARROWS[event.key];
  if (!move) return;
  const cell = /** @type {HTMLTableCellElement} */ (event.currentTarget);
  let next = neighbour(cell, move);
  while (next?.matches("td.none")) next = neighbour(next, move); // step over cells without a value
  if (!next?.matches("td")) return;
  event.preventDefault();
  moveFocus(cell, next);
}

/**
 * Move the focus, and make the new element the one that the Tab key can reach.
 *
 * @param {HTMLElement | SVGElement} from
 * @param {HTMLElement | SVGElement} to
 */
function moveFocus(from, to) {
  from.tabIndex = -1;
  to.tabIndex = 0;
  to.focus();
}

/**
 * @param {HTMLTableCellElement} cell
 * @param {[rows: number, columns: number]} move
 * @returns {HTMLTableCellElement | undefined}
 */
function neighbour(cell, [rows, columns]) {
  const row = /** @type {HTMLTableRowElement} */ (cell.parentElement);
  const section = /** @type {HTMLTableSectionElement} */ (row.parentElement);
  return section.rows[row.sectionRowIndex + rows]?.cells[cell.cellIndex + columns];
}
