// The report's frame: data files, and views by address. Nothing here knows what a view shows.
"use strict";

/** @type {Map<string, Promise<unknown>>} data files that were requested, or came with the page */
const dataFiles = new Map();
/** @type {Map<string, (data: any) => void>} resolve the promises of those still being loaded */
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

function currentAddress() {
  const [path, query] = location.hash.replace(/^#\/?/, "").split("?");
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

async function showCurrentView() {
  const { view: asked, parts, query } = currentAddress();
  const exists = document.querySelector(`[data-view="${CSS.escape(asked)}"]`);
  const view = exists ? asked : "summary";
  markNavigation(ENTRY_OF_VIEW[view] ?? view);

  /** @type {NodeListOf<HTMLElement>} */
  const sections = document.querySelectorAll("[data-view]");
  for (const section of sections) section.hidden = section.dataset.view !== view;

  const draw = saerelay.views[view];
  if (draw) await redraw(view, (body) => draw(body, parts, query));
  document.documentElement.dataset.shown = location.hash || "#/"; // the tests wait for this
}

/** @param {string} entry */
function markNavigation(entry) {
  for (const link of document.querySelectorAll("nav a")) {
    if (link.getAttribute("href") === `#/${entry}`) {
      link.setAttribute("aria-current", "page");
      link.scrollIntoView({ block: "nearest", inline: "nearest" });
    } else {
      link.removeAttribute("aria-current");
    }
  }
}

/**
 * Draw a view beside the old one and replace that at once, so that nothing flickers.
 *
 * @param {string} view
 * @param {(body: HTMLElement) => Promise<void>} draw
 */
async function redraw(view, draw) {
  const body = element("div.body");
  try {
    await draw(body);
  } catch (error) {
    body.replaceChildren(element("p.note", /** @type {Error} */ (error).message));
  }
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

addEventListener("hashchange", async () => {
  await showCurrentView();
  scrollTo(0, 0);
  byId("main").focus({ preventScroll: true });
});
addEventListener("DOMContentLoaded", showCurrentView);
