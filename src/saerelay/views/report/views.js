// The report's frame: data files, and views by address. Nothing here knows what a view shows.
"use strict";

/** @type {Map<string, Promise<unknown>>} data files that were requested, or came with the page */
const dataFiles = new Map();
/** @type {Map<string, (data: any) => void>} resolve the promises of files still being loaded */
const waiting = new Map();

const saerelay = {
  /** @type {Record<string, View>} each draws one section of the page */
  views: {},

  /**
   * Every data file is one call of this: a page opened from disk may load scripts, but not fetch.
   *
   * @template {keyof DataFiles} Name
   * @param {Name} name
   * @param {DataFiles[Name]} data
   */
  feed(name, data) {
    const resolve = waiting.get(name);
    if (resolve) resolve(data);
    else dataFiles.set(name, Promise.resolve(data));
  },

  /**
   * The contents of data/<name>.js, loaded when first asked for.
   *
   * @template {keyof DataFiles} Name
   * @param {Name} name
   * @returns {Promise<DataFiles[Name]>}
   */
  load(name) {
    let file = dataFiles.get(name);
    if (!file) {
      file = new Promise((resolve, reject) => {
        waiting.set(name, resolve);
        requestScript(name, reject);
      });
      dataFiles.set(name, file);
    }
    return /** @type {Promise<DataFiles[Name]>} */ (file);
  },
};

/**
 * @param {string} name
 * @param {(error: Error) => void} onError
 */
function requestScript(name, onError) {
  const script = document.createElement("script");
  const path = name.split("/").map(encodeURIComponent).join("/");
  script.src = `data/${path}.js`;
  script.onerror = () => {
    onError(new Error(`data/${name}.js is missing. Keep all of the report's files in one folder.`));
  };
  document.head.append(script);
}

// --- addresses: #/feature/L4-from-L5/123, #/features/L4?q=… --------------------------------------

/** What the address asks for; #feature=L4-from-L5/123 is a short form that people may write. */
function currentAddress() {
  const long = location.hash.replace(/^#feature=(.+?)(?:\/|%2F)/i, "#/feature/$1/");
  const [path, query] = long.replace(/^#\/?/, "").split("?");
  const [view, ...parts] = path.split("/").filter(Boolean).map(decoded);
  return { view: view ?? "summary", parts, query: new URLSearchParams(query) };
}

/** @param {string} part as it stands in an address, which people may have typed */
function decoded(part) {
  try {
    return decodeURIComponent(part);
  } catch {
    return part;
  }
}

/**
 * @param {string} legId
 * @param {number | string} latent
 */
function featureAddress(legId, latent) {
  return `#/feature/${encodeURIComponent(legId)}/${latent}`;
}

/** @param {string} legId or "all" */
const listAddress = (legId) => `#/features/${encodeURIComponent(legId)}`;

// --- views ---------------------------------------------------------------------------------------

/** Views that have no entry in the navigation, and the entry to mark while they are shown. */
const ENTRY_OF_VIEW = /** @type {Record<string, string>} */ ({
  summary: "",
  feature: "features",
  compare: "features",
});

/** Number of views requested so far: a view that is drawn after a later request is not shown. */
let timesAsked = 0;

async function showCurrentView() {
  const { view: asked, parts, query } = currentAddress();
  const exists = document.querySelector(`[data-view="${CSS.escape(asked)}"]`);
  const view = exists ? asked : "summary";
  markNavigation(ENTRY_OF_VIEW[view] ?? view);

  /** @type {NodeListOf<HTMLElement>} */
  const sections = document.querySelectorAll("[data-view]");
  for (const section of sections) section.hidden = section.dataset.view !== view;

  const draw = saerelay.views[view];
  const turn = ++timesAsked;
  if (draw) await redraw(view, turn, (body) => draw(body, parts, query));
  if (turn !== timesAsked) return;
  nameWindow(view);
  document.documentElement.dataset.shown = location.hash || "#/"; // the tests wait for this
}

const REPORT_TITLE = document.title;

/** @param {string} view whose heading comes first in the window's title, and so in bookmarks */
function nameWindow(view) {
  const heading = document.querySelector(`[data-view="${view}"] h1`)?.textContent;
  document.title = view === "summary" ? REPORT_TITLE : `${heading} · ${REPORT_TITLE}`;
}

/** @param {string} entry */
function markNavigation(entry) {
  for (const link of document.querySelectorAll("nav a")) {
    if (link.getAttribute("href") === `#/${entry}`) {
      link.setAttribute("aria-current", "page");
      centreInRow(/** @type {HTMLElement} */ (link)); // scrollIntoView would move the focus on
    } else {
      link.removeAttribute("aria-current");
    }
  }
}

/**
 * Draw a view off the page, then replace the old one at once, so that nothing flickers.
 *
 * @param {string} view
 * @param {number} turn
 * @param {(body: HTMLElement) => Promise<void>} draw
 */
async function redraw(view, turn, draw) {
  const body = element("div.body");
  try {
    await draw(body);
  } catch (error) {
    body.replaceChildren(element("p.note", /** @type {Error} */ (error).message));
  }
  if (turn !== timesAsked) return;
  document.querySelector(`[data-view="${view}"] .body`)?.replaceWith(body);

  /** @type {NodeListOf<HTMLElement>} */
  const currentStops = body.querySelectorAll(".strand .here, .panes .here");
  for (const stop of currentStops) centreInRow(stop);
}

/** @param {HTMLElement} stop */
function centreInRow(stop) {
  const row = /** @type {HTMLElement} */ (stop.parentElement);
  const margin = (row.clientWidth - stop.clientWidth) / 2;
  row.scrollLeft = stop.offsetLeft - row.offsetLeft - margin;
}

// Every entry of the browser's history remembers how far it was scrolled, for the way back.
addEventListener("scrollend", () => history.replaceState({ scrolled: scrollY }, ""));
addEventListener("hashchange", async () => {
  const { scrolled = 0 } = history.state ?? {};
  await showCurrentView();
  scrollTo(0, scrolled);
  byId("main").focus({ preventScroll: true });
  document.dispatchEvent(new Event("arrived"));
});
addEventListener("DOMContentLoaded", showCurrentView);
