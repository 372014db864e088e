// The keyboard: search, the list of shortcuts, and arrow keys from one feature or mark to the next.
"use strict";

/** The section that is on show. */
function shownSection() {
  return /** @type {HTMLElement} */ (document.querySelector("[data-view]:not([hidden])"));
}

const shortcutList = () => /** @type {HTMLDialogElement} */ (byId("keys"));

/**
 * The action of a key at the place where it was pressed, or nothing.
 *
 * @param {KeyboardEvent} event
 * @returns {(() => void) | null | undefined}
 */
function actionOf({ key, shiftKey, target }) {
  const place = /** @type {HTMLElement} */ (target);
  if (place.matches("input[type=search]")) return actionInSearch(key, place);
  if (place.matches("input, select, textarea, [role=region]")) return null;
  if (key === "/") return goToSearch;
  if (key === "?") return () => shortcutList().showModal();
  if (!ARROWS[key]) return null;

  const mark = place.closest(".marks .mark");
  if (mark) return actionInChart(key, mark);
  const row = place.closest(".list li");
  if (row) return actionInList(key, row);
  return shiftKey ? actionInStrand(key) : followKeyOf(key);
}

document.addEventListener("keydown", (event) => {
  const { defaultPrevented, ctrlKey, metaKey, altKey } = event;
  if (defaultPrevented || ctrlKey || metaKey || altKey || shortcutList().open) return;
  const action = actionOf(event);
  if (!action) return;
  event.preventDefault();
  action();
});

addEventListener("DOMContentLoaded", () => {
  byId("show-keys").addEventListener("click", () => shortcutList().showModal());
  byId("hide-keys").addEventListener("click", () => shortcutList().close());
  byId("skip").addEventListener("click", () => byId("main").focus());
});

// --- search --------------------------------------------------------------------------------------

/** @returns {HTMLInputElement | null} the search field of the view on show */
const searchField = () => shownSection().querySelector("input[type=search]");

/** Go to the search field of the current view, or else of the list of the same SAE's features. */
function goToSearch() {
  const field = searchField();
  if (field) {
    field.select();
    return;
  }
  const { view, parts } = currentAddress();
  const isOfFeature = view === "feature" || view === "compare";
  document.addEventListener("arrived", () => searchField()?.select(), { once: true });
  location.hash = isOfFeature ? listAddress(parts[0]) : "#/features";
}

/**
 * Escape empties the field, and leaves it when it is empty; an arrow goes on to the first result.
 *
 * @param {string} key
 * @param {HTMLElement} place
 */
function actionInSearch(key, place) {
  const field = /** @type {HTMLInputElement} */ (place);
  if (key === "ArrowDown") return () => focusRow(shownSection().querySelector(".list a.row"));
  if (key !== "Escape") return null;
  if (field.value === "") return () => byId("main").focus({ preventScroll: true });
  return () => {
    field.value = "";
    field.dispatchEvent(new Event("input"));
  };
}

// --- arrows --------------------------------------------------------------------------------------

/**
 * Move from result to result, and from the first result back to the search.
 *
 * @param {string} key
 * @param {Element} row
 */
function actionInList(key, row) {
  if (key === "ArrowDown") return () => focusRow(row.nextElementSibling?.querySelector("a.row"));
  if (key !== "ArrowUp") return null;
  const previous = row.previousElementSibling?.querySelector("a.row");
  return previous ? () => focusRow(previous) : goToSearch;
}

/** @param {Element | null | undefined} row */
function focusRow(row) {
  /** @type {HTMLElement | null | undefined} */ (row)?.focus();
}

/**
 * Move from mark to mark; only one at a time can be reached with the Tab key.
 *
 * @param {string} key
 * @param {Element} mark
 */
function actionInChart(key, mark) {
  const [, step] = ARROWS[key];
  const sibling = step < 0 ? mark.previousElementSibling : mark.nextElementSibling;
  if (!step || !sibling?.matches(".mark")) return null;
  return () => moveFocus(/** @type {SVGElement} */ (mark), /** @type {SVGElement} */ (sibling));
}

/**
 * Go to the same feature in the previous or next layer.
 *
 * @param {string} key
 */
function actionInStrand(key) {
  const [, step] = ARROWS[key];
  const here = shownSection().querySelector(".strand .here");
  const stop = step < 0 ? here?.previousElementSibling : here?.nextElementSibling;
  const link = stop?.querySelector("a");
  return step && link ? () => link.click() : null;
}

/** @param {string} key that a link or button of the view on show names as its own */
function followKeyOf(key) {
  /** @type {HTMLElement | null} */
  const owner = shownSection().querySelector(`[data-key="${key}"]`);
  return owner && (() => owner.click());
}
