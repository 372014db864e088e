// The list of features: search, filters, order.
"use strict";

const LIST_ROWS = { first: 60, more: 60 };

/** Orders by name: what the menu says, and how two features compare. */
const FEATURE_ORDERS = /** @type {Record<string, FeatureOrder>} */ ({
  match: { text: "best match", compare: (a, b) => b.score - a.score || b.fired - a.fired },
  id: { text: "feature number", compare: (a, b) => a.latent - b.latent },
  often: { text: "most frequent", compare: (a, b) => b.fired - a.fired },
  rarely: { text: "least frequent", compare: (a, b) => a.fired - b.fired },
  strong: { text: "largest activation", compare: (a, b) => b.max - a.max },
  changed: { text: "most changed", compare: (a, b) => (a.cosine ?? 2000) - (b.cosine ?? 2000) },
});

/** Densities to choose from: shares of tokens, from the first up to but without the second. */
const DENSITIES = /** @type {[string, string][]} */ ([
  ["", "any"],
  ["0", "never fires"],
  ["0.0000001-0.0001", "under 0.01 %"],
  ["0.0001-0.001", "0.01 to 0.1 %"],
  ["0.001-0.01", "0.1 to 1 %"],
  ["0.01-0.1", "1 to 10 %"],
  ["0.1-Infinity", "over 10 %"],
]);

saerelay.views.features = async function drawFeatures(body, parts, query) {
  const run = await saerelay.load("run");
  const vocabulary = await saerelay.load("vocabulary");
  const choice = choiceFromAddress(run, parts, query);
  const hasLeg = choice.leg === "all" || findLeg(run, choice.leg);
  if (!hasLeg) throw new Error(`This run has no SAE "${choice.leg}".`);
  const results = element("div", { "aria-live": "polite" });

  /** @type {ListedFeature[]} */
  let features = [];

  /** A list that arrives after another SAE was chosen is not shown. */
  async function readFeatures() {
    const { leg: asked } = choice;
    const legs = asked === "all" ? run.standing : [asked];
    const lists = await Promise.all(legs.map((leg) => readList(run, leg)));
    if (asked === choice.leg) features = lists.flat();
  }

  function drawResults() {
    const search = searchTokens(choice.q, vocabulary);
    const matches = matchingFeatures(features, choice, search);
    results.replaceChildren(...resultList(features, matches, choice, search, vocabulary));
  }

  /** @param {Partial<ListChoice>} change */
  async function choose(change) {
    Object.assign(choice, change);
    history.replaceState(null, "", addressOfChoice(choice));
    if (change.leg !== undefined) await readFeatures();
    drawResults();
  }
  body.append(
    listControls(run, choice, choose),
    results,
    captionOf(
      run,
      "Fires most on: the tokens at which its strongest examples peak. Promotes: the tokens " +
        "whose logits its decoder row raises most, directly. Density: the share of tokens on " +
        "which it fires. Maximum: its largest activation. Search looks through both lists of " +
        "tokens and ignores case.",
    ),
  );
  await readFeatures();
  drawResults();
};

// --- what is chosen, and how the address says it -------------------------------------------------

/**
 * @param {Run} run
 * @param {string[]} parts
 * @param {URLSearchParams} query
 * @returns {ListChoice}
 */
function choiceFromAddress(run, parts, query) {
  const middleLeg = run.standing[Math.floor(run.standing.length / 2)];
  return {
    leg: parts[0] ?? middleLeg,
    q: query.get("q") ?? "",
    density: query.get("density") ?? "",
    status: query.get("status") ?? "",
    sort: query.get("sort") ?? "match",
  };
}

/** @param {ListChoice} choice */
function addressOfChoice({ leg, q, density, status, sort }) {
  const query = new URLSearchParams();
  if (q) query.set("q", q);
  if (density) query.set("density", density);
  if (status) query.set("status", status);
  if (sort !== "match") query.set("sort", sort);
  const address = listAddress(leg);
  return query.size ? `${address}?${query}` : address;
}

/**
 * @param {Run} run
 * @param {ListChoice} choice
 * @param {(change: Partial<ListChoice>) => void} choose
 */
function listControls(run, choice, choose) {
  const search = element("input", {
    type: "search",
    value: choice.q,
    placeholder: "a token, or a number",
    autocomplete: "off",
    spellcheck: "false",
    input: (event) => choose({ q: event.target.value }),
  });
  /** @type {[string, string][]} */
  const legs = inLayerOrder(run.legs).map((leg) => [leg.id, `layer ${leg.layer}: ${leg.id}`]);
  /** @type {[string, string][]} */
  const statuses = Object.entries(labels.statuses);
  /** @type {[string, string][]} */
  const orders = Object.entries(FEATURE_ORDERS).map(([name, { text }]) => [name, text]);
  return element(
    "form.controls",
    { role: "search", submit: (event) => event.preventDefault() },
    element("label", "Search", search),
    menu("SAE", [["all", "all layers"], ...legs], choice.leg, (leg) => choose({ leg })),
    menu("Density", DENSITIES, choice.density, (density) => choose({ density })),
    menu("In the next layer", [["", "any"], ...statuses], choice.status, (status) =>
      choose({ status }),
    ),
    menu("Sort by", orders, choice.sort, (sort) => choose({ sort })),
  );
}

// --- search --------------------------------------------------------------------------------------

/**
 * What a search looks for: the tokens that equal its text, apart from spaces, and those that
 * contain it; for "123" and "#123" also the feature of that number.
 *
 * @param {string} text
 * @param {Record<number, string>} vocabulary
 * @returns {TokenSearch}
 */
function searchTokens(text, vocabulary) {
  const part = text.toLowerCase();
  const whole = part.trim();
  const exact = new Set();
  const containing = new Set();
  for (const [id, token] of Object.entries(vocabulary)) {
    const lower = token.toLowerCase();
    if (part && lower.includes(part)) containing.add(Number(id));
    if (whole && lower.trim() === whole) exact.add(Number(id));
  }
  const isNumeral = /^#?\d+$/.test(whole);
  const latent = isNumeral ? Number(whole.replace("#", "")) : null;
  return { exact, containing, latent, isEmpty: part === "" };
}

/**
 * @param {ListedFeature[]} features
 * @param {ListChoice} choice
 * @param {TokenSearch} search
 */
function matchingFeatures(features, choice, search) {
  for (const feature of features) feature.score = searchScore(feature, search);
  const matches = features.filter((feature) => isMatch(feature, choice, search));
  const sort = choice.sort === "match" && search.isEmpty ? "id" : choice.sort;
  const order = FEATURE_ORDERS[sort] ?? FEATURE_ORDERS.id;
  return matches.sort(order.compare);
}

/**
 * How well a feature matches. Tokens that it fires on count twice as much as tokens that it
 * promotes, and equal tokens three times as much as tokens that contain the text. Its number beats
 * all.
 *
 * @param {ListedFeature} feature
 * @param {TokenSearch} search
 */
function searchScore({ latent, peaks, top }, search) {
  if (search.latent === latent) return Infinity;
  let score = 0;
  for (const id of peaks) score += 2 * tokenScore(id, search);
  for (const id of top) score += tokenScore(id, search);
  return score;
}

/**
 * @param {number} id
 * @param {TokenSearch} search
 */
function tokenScore(id, { exact, containing }) {
  if (exact.has(id)) return 3;
  return containing.has(id) ? 1 : 0;
}

/**
 * Features that never fired are listed only if they are asked for.
 *
 * @param {ListedFeature} feature
 * @param {ListChoice} choice
 * @param {TokenSearch} search
 */
function isMatch(feature, { status, density }, search) {
  if (search.latent === feature.latent) return true;
  if (status && feature.status !== status) return false;
  if (density && !isOfDensity(feature, density)) return false;
  if (!search.isEmpty) return feature.score > 0;
  return feature.fired > 0 || status !== "" || density !== "";
}

/**
 * @param {ListedFeature} feature
 * @param {string} density one of DENSITIES
 */
function isOfDensity(feature, density) {
  if (density === "0") return feature.fired === 0;
  const [low, high] = density.split("-").map(Number);
  return feature.density >= low && feature.density < high;
}

// --- rows ----------------------------------------------------------------------------------------

/**
 * @param {ListedFeature[]} features
 * @param {ListedFeature[]} matches
 * @param {ListChoice} choice
 * @param {TokenSearch} search
 * @param {Record<number, string>} vocabulary
 */
function resultList(features, matches, choice, search, vocabulary) {
  const titles = ["Feature", "Fires most on", "Promotes", "Density", "Maximum", "Next layer"];
  const heads = titles.map((title) => element("span", title));
  const list = element("ol.list", { "aria-label": "Features" });
  list.append(element("li.head", { "aria-hidden": "true" }, heads));
  const showMore = revealInSteps(matches, LIST_ROWS, (feature) => {
    list.append(featureRow(feature, choice.leg === "all", search, vocabulary));
  });
  if (!matches.length) {
    const advice =
      "No feature matches. Search looks for tokens, not meanings: try part of a word, or all " +
      "layers.";
    list.append(element("li", element("p.soft", advice)));
  }
  const tally = `${wholeNumber(matches.length)} of ${wholeNumber(features.length)} features`;
  return [element("p.soft.small", tally), list, element("p", showMore)];
}

/**
 * @param {ListedFeature} feature
 * @param {boolean} withLayer
 * @param {TokenSearch} search
 * @param {Record<number, string>} vocabulary
 */
function featureRow(feature, withLayer, search, vocabulary) {
  const { leg, latent, status } = feature;
  const layer = withLayer ? element("small", leg.place) : null;
  const row = element(
    "a.row",
    { href: featureAddress(leg.id, latent) },
    element("span.id", String(latent), layer),
    tokenChips(feature.peaks, search, vocabulary),
    element("span.promoted", tokenChips(feature.top, search, vocabulary)),
    element("span.n", percent(feature.density)),
    element("span.n.most", number(feature.max)),
    status ? statusBadge(status) : element("span.soft.status.x", "–"),
  );
  return element("li", row);
}

/**
 * A few tokens, those that the search found first.
 *
 * @param {number[]} ids
 * @param {TokenSearch} search
 * @param {Record<number, string>} vocabulary
 */
function tokenChips(ids, search, vocabulary) {
  /** @param {number} id */
  const isHit = (id) => tokenScore(id, search) > 0;
  const sorted = unique(ids).sort((a, b) => Number(isHit(b)) - Number(isHit(a)));
  const chips = sorted.slice(0, 6).map((id) => chip(vocabulary[id], isHit(id)));
  return element("span.chips", chips);
}
