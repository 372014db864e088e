// The report's frame: data files, and views by address. Nothing here knows what a view shows.
"use strict";

const saerelay = {
  views: {}, // name: async (body, ...parts of the address) => nothing; each draws one section
  arrivals: new Map(),
  loading: new Map(),

  // Every data file is one call of this (fetch is refused on file://, scripts are not).
  feed(name, data) {
    if (name === "labels") saerelay.labels = data; // words for metrics, methods, fates, origins, roles
    if (saerelay.arrivals.has(name)) saerelay.arrivals.get(name)(data);
    else saerelay.loading.set(name, Promise.resolve(data));
  },

  load(name) {
    if (!saerelay.loading.has(name)) {
      saerelay.loading.set(name, new Promise((resolve, reject) => {
        saerelay.arrivals.set(name, resolve);
        const script = document.createElement("script");
        script.src = `data/${name.split("/").map(encodeURIComponent).join("/")}.js`;
        script.onerror = () => reject(new Error(`data/${name}.js is missing; keep the report's folder together`));
        document.head.append(script);
      }));
    }
    return saerelay.loading.get(name);
  },
};

// --- views by address: #/feature/L4-from-L5/123?q=… ---------------------------------------------------------------

function address() {
  const [path, query] = location.hash.replace(/^#\/?/, "").split("?");
  const parts = path.split("/").filter(Boolean).map((part) => { try { return decodeURIComponent(part); } catch { return part; } });
  return { view: parts[0] || "summary", parts: parts.slice(1), query: new URLSearchParams(query) };
}
const featureAddress = (leg, latent) => `#/feature/${encodeURIComponent(leg)}/${latent}`;

async function show() {
  let { view, parts, query } = address();
  if (!document.querySelector(`[data-view="${CSS.escape(view)}"]`)) view = "summary";
  const tab = { feature: "features", compare: "features", summary: "" }[view] ?? view;
  for (const link of document.querySelectorAll("nav a")) {
    const current = link.getAttribute("href") === `#/${tab}`;
    if (current) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
    if (current) link.scrollIntoView({ block: "nearest", inline: "nearest" });
  }
  for (const section of document.querySelectorAll("[data-view]")) section.hidden = section.dataset.view !== view;
  const body = document.querySelector(`[data-view="${view}"] .body`);
  if (body && saerelay.views[view]) {
    const drawn = element("div.body");
    try {
      await saerelay.views[view](drawn, ...parts, query);
    } catch (error) {
      drawn.replaceChildren(element("p.note", {}, error.message));
    }
    document.querySelector(`[data-view="${view}"] .body`).replaceWith(drawn); // whole, so that nothing flickers
    for (const here of drawn.querySelectorAll(".strand .here, .panes .here")) {
      const row = here.parentElement;
      row.scrollLeft = here.offsetLeft - row.offsetLeft - (row.clientWidth - here.clientWidth) / 2;
    }
  }
  document.documentElement.dataset.shown = location.hash || "#/";
}

addEventListener("hashchange", async () => {
  await show();
  scrollTo(0, 0);
  document.getElementById("main").focus({ preventScroll: true });
});
addEventListener("DOMContentLoaded", show);
