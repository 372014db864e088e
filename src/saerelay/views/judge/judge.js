// The judging page: an introduction, the features one by one, the end. Answers are kept in the
// browser under the page's own name; `saerelay score` reads the exported file.
"use strict";

/** @type {JudgingData} */
const DATA = JSON.parse(byId("data").textContent ?? "");
const STORAGE_KEY = `saerelay-judge-${DATA.page}`;
const N = DATA.items.length;
const ANSWERS = /** @type {Record<string, Answer>} */ ({ y: "yes", n: "no", s: "skip" });

/** @type {JudgingState} */
const state = readState() ?? { page: DATA.page, judge: "", at: 0, answers: {}, given: [] };
let isStored = true;

// --- what the browser keeps ----------------------------------------------------------------------

/**
 * The state as it was left; null if there is none, or one that this page did not write.
 *
 * @returns {JudgingState | null}
 */
function readState() {
  try {
    const stored = JSON.parse(localStorage.getItem(STORAGE_KEY) ?? "null");
    return isState(stored) ? stored : null;
  } catch {
    return null;
  }
}

/**
 * Whether this page wrote a stored state; throws if it has not even the form of a state.
 *
 * @param {any} stored
 */
function isState(stored) {
  if (stored.page !== DATA.page || typeof stored.judge !== "string") return false;
  const isScreen = isItem(stored.at) || stored.at === 0 || stored.at === N + 1;
  if (!isScreen) return false;

  const answers = Object.entries(stored.answers);
  const valid = Object.values(ANSWERS);
  if (!answers.every(([i, value]) => isItem(Number(i)) && valid.includes(value))) return false;

  // Every answered item was given once, and nothing else.
  const given = new Set(stored.given);
  if (given.size !== stored.given.length || given.size !== answers.length) return false;
  return [...given].every((i) => isItem(i) && stored.answers[i]);
}

/**
 * @param {any} i
 * @returns {i is number}
 */
function isItem(i) {
  return Number.isInteger(i) && i >= 1 && i <= N;
}

function storeState() {
  try {
    localStorage.setItem(STORAGE_KEY, JSON.stringify(state));
  } catch {
    isStored = false;
  }
}

function exportJudgements() {
  const { page, judge, answers } = state;
  const text = `${JSON.stringify({ schema: 1, page, judge, answers }, null, 1)}\n`;
  const url = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  element("a", { href: url, download: exportName(page, judge) }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

/**
 * @param {string} page
 * @param {string} judge a name that may contain characters not allowed in file names
 */
function exportName(page, judge) {
  const safeJudge = judge.replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 40);
  const parts = ["judgements", page, safeJudge].filter(Boolean);
  return `${parts.join("-")}.json`;
}

// --- what keys and buttons do --------------------------------------------------------------------

/** @param {Answer} value */
const tally = (value) => state.given.filter((i) => state.answers[i] === value).length;
const isJudging = () => isItem(state.at);

/** The first item without an answer, or the end. */
function firstUnanswered() {
  let i = 1;
  while (i <= N && state.answers[i]) i++;
  return i;
}

/** @param {Answer} value */
function answer(value) {
  state.given = [...state.given.filter((i) => i !== state.at), state.at];
  state.answers[state.at] = value;
  go(state.at + 1);
}

function undo() {
  const last = state.given.pop();
  if (last === undefined) return;
  delete state.answers[last];
  go(last);
}

/** @param {number} to a screen: 0 is the introduction, 1 to N are items, N + 1 is the end */
function go(to) {
  state.at = Math.max(0, Math.min(N + 1, to));
  storeState();
  draw();
}

function startOver() {
  if (!confirm("Delete all answers on this page? Export them first if you want to keep them."))
    return;
  Object.assign(state, { judge: "", answers: {}, given: [] });
  go(0);
}

/**
 * Perform the action of a key, or of its button.
 *
 * @param {string} key in lower case
 * @returns {boolean} whether the key has an action
 */
function press(key) {
  if (key in ANSWERS && isJudging()) answer(ANSWERS[key]);
  else if (key === "u") undo();
  else if (key === "arrowleft") go(state.at - 1);
  else if (key === "arrowright") go(state.at + 1);
  else if (key === "e") exportJudgements();
  else if (key === "enter" && state.at === 0) go(firstUnanswered());
  else return false;
  return true;
}

/**
 * Whether a key is meant for the page: not one that is held down, nor part of a browser's shortcut,
 * nor typed into the field for the name, nor Enter on a button, which presses that button.
 *
 * @param {KeyboardEvent} event
 */
function isForPage(event) {
  if (event.repeat || event.ctrlKey || event.metaKey || event.altKey) return false;
  const target = /** @type {Element} */ (event.target);
  if (target.closest?.("input")) return event.key === "Enter";
  if (target.closest?.("button")) return event.key !== "Enter";
  return true;
}

addEventListener("keydown", (event) => {
  if (isForPage(event) && press(event.key.toLowerCase())) event.preventDefault();
});

/** @type {NodeListOf<HTMLButtonElement>} */
const answerButtons = document.querySelectorAll("#answers [data-key]");
for (const button of answerButtons) {
  button.addEventListener("click", () => press(button.dataset.key ?? ""));
}
byId("export").addEventListener("click", exportJudgements);

// --- the screens ---------------------------------------------------------------------------------

function draw() {
  const main = byId("main");
  const done = tally("yes") + tally("no") + tally("skip");
  main.replaceChildren();
  appendChildren(main, currentScreen());
  byId("answers").hidden = !isJudging();
  byId("export").hidden = !done || state.at > N;
  /** @type {HTMLProgressElement} */ (byId("meter")).value = done / N;
  byId("progress").textContent = progressText(done);
  drawButtons();
  hideTooltip();
  scrollTo(0, 0);
  if (!isJudging()) main.querySelector("h1")?.focus({ preventScroll: true });
}

function currentScreen() {
  if (state.at === 0) return introduction();
  return isJudging() ? featureScreen(DATA.items[state.at - 1]) : theEnd();
}

/** @param {number} done */
function progressText(done) {
  const parts = [];
  if (isJudging()) parts.push(`${state.at} of ${N}`);
  else if (state.at > N) parts.push("The end");
  if (done) parts.push(`${done} done`);
  return parts.join(" · ");
}

/** Mark the answer that the current item has, if any. */
function drawButtons() {
  for (const button of answerButtons) {
    const key = button.dataset.key ?? "";
    if (key in ANSWERS) {
      const isChosen = state.answers[state.at] === ANSWERS[key];
      button.setAttribute("aria-pressed", String(isChosen));
    }
    if (key === "u") button.disabled = !state.given.length;
  }
}

/** @param {string} text */
const heading = (text) => element("h1", { tabindex: -1 }, text);

/** @param {string} text */
const keycap = (text) => element("kbd", text);

function storageWarning() {
  if (isStored) return null;
  return element(
    "p.note",
    "This browser does not store your answers: export them before you close this page.",
  );
}

function introduction() {
  const begin = state.given.length > 0 ? "Continue " : "Begin ";
  /** @param {SubmitEvent} event */
  function submit(event) {
    event.preventDefault();
    go(firstUnanswered());
  }
  return [
    element(
      "div.welcome",
      heading("Is this feature interpretable?"),
      element(
        "p.lead",
        `${wholeNumber(N)} features of a language model, one at a time. For each of them you see ` +
          "where it fires most, and which next tokens it promotes and suppresses.",
      ),
      rules(),
      element(
        "p",
        "Judge mainly by the examples. If a feature always fires on the same token, its examples " +
          "have that in common. The features come from several sources, in random order. This " +
          "page does not contain their sources; please do not try to guess them.",
      ),
      element(
        "p.soft",
        "Your answers stay in this browser until you export them. Nothing is sent anywhere.",
      ),
      storageWarning(),
      element(
        "form.begin",
        { submit },
        element("label", "Your name (will be in the exported file)", nameField()),
        element("button.button.primary", { type: "submit" }, begin, keycap("Enter")),
      ),
    ),
  ];
}

function nameField() {
  return element("input", {
    type: "text",
    value: state.judge,
    maxlength: 80,
    autocomplete: "off",
    placeholder: "optional",
    input(event) {
      state.judge = event.target.value;
      storeState();
    },
  });
}

function rules() {
  /** @type {[key: string, name: string, meaning: Child][]} */
  const rows = [
    ["y", "Yes", "You can say in a few words what most of the examples have in common."],
    ["n", "No", "The examples have nothing in common that you can name, or form unrelated groups."],
    [
      "s",
      "Skip",
      "You cannot tell, perhaps because you do not read the language. Skips do not count.",
    ],
    [
      "u",
      "Undo",
      ["Takes back your last answer. ", keycap("←"), " ", keycap("→"), " move without answering."],
    ],
  ];
  const items = rows.map(([key, name, meaning]) => [
    element("dt", keycap(key), name),
    element("dd", meaning),
  ]);
  return element("dl.rules", items);
}

/** @param {JudgedItem} item */
function featureScreen(item) {
  const examples = item.examples.map((example) => {
    const level = levelText(example.levels[example.peak]);
    return element("li", element("span.value", level), exampleText(example));
  });
  return [
    heading(`Feature ${state.at}`),
    storageWarning(),
    element(
      "div.columns",
      element(
        "section",
        { "aria-labelledby": "h-places" },
        element("h2", { id: "h-places" }, "Top-activating examples"),
        element("ol.examples", examples),
      ),
      effectsSection(item),
    ),
  ];
}

/** @param {JudgedItem} item */
function effectsSection({ top, bottom }) {
  if (!top || !bottom) return null;
  return element(
    "section",
    { "aria-labelledby": "h-says" },
    element("h2", { id: "h-says" }, "Effect on the next token"),
    element(
      "div.effects",
      logitEffects("More likely next", top, "var(--transfer)", DATA.texts),
      logitEffects("Less likely next", bottom, "var(--root)", DATA.texts),
    ),
  );
}

/** @param {number} level */
const levelText = (level) => `${Math.round((100 * level) / DATA.levels)} %`;

/** @param {JudgedExample} example */
function exampleText({ tokens, levels, peak }) {
  const items = tokens.map((token, i) => {
    const share = Math.max(0, levels[i]) / DATA.levels;
    const peakClass = i === peak ? ".peak" : "";
    const beyondClass = levels[i] < 0 ? ".beyond" : "";
    return shadedToken(DATA.texts[token], share, levelText(levels[i]), peakClass + beyondClass);
  });
  return element("div.tokens", { dir: "ltr" }, items);
}

function theEnd() {
  const left = N - state.given.length;
  const judged = featureCount(tally("yes") + tally("no"));
  const skipped = featureCount(tally("skip"));
  const leftText = left ? `; ${wholeNumber(left)} ${left === 1 ? "is" : "are"} left` : "";
  /** @param {string} text @param {() => void} click @param {HTMLElement} [shortcut] */
  const button = (text, click, shortcut) =>
    element("button.button", { type: "button", click }, text, shortcut);
  return [
    element(
      "div.welcome",
      heading(left ? "Some features are left" : "Done. Thank you!"),
      element("p.lead", `You judged ${judged} and skipped ${skipped}${leftText}.`),
      element("p", "Export your answers and send the file to the person who gave you this page."),
      storageWarning(),
      element(
        "div.begin",
        element(
          "button.button.primary",
          { type: "button", click: exportJudgements },
          "Export ",
          keycap("e"),
        ),
        left ? button("Go to the first unanswered feature", () => go(firstUnanswered())) : null,
        button("Undo ", undo, keycap("u")),
        button("Start over for another judge", startOver),
      ),
    ),
  ];
}

/** @param {number} n */
const featureCount = (n) => `${wholeNumber(n)} ${n === 1 ? "feature" : "features"}`;

storeState();
draw();
