// The judging page: an introduction, the features one by one, the end. What was answered is kept in the browser as it is
// given, under the page's own name; the export is what `saerelay score` reads.
"use strict";

const DATA = JSON.parse(document.getElementById("data").textContent);
const STORE = `saerelay-judge-${DATA.page}`, N = DATA.items.length;
const ANSWERS = { y: "yes", n: "no", s: "skip" };
const state = recalled() ?? { page: DATA.page, judge: "", at: 0, answers: {}, given: [] }; // at: 0 introduction, 1 to N, N + 1 the end
let kept = true;

// --- what is kept -------------------------------------------------------------------------------------------------

// The state as it was left, or null for none, and for anything that this page did not write.
function recalled() {
  try {
    const found = JSON.parse(localStorage.getItem(STORE));
    const item = (i) => Number.isInteger(i) && i >= 1 && i <= N;
    const answers = Object.entries(found.answers).every(([i, answer]) => item(Number(i)) && Object.values(ANSWERS).includes(answer));
    const given = found.given.every(item) && new Set(found.given).size === found.given.length && found.given.length === Object.keys(found.answers).length && found.given.every((i) => found.answers[i]);
    return found.page === DATA.page && typeof found.judge === "string" && (item(found.at) || found.at === 0 || found.at === N + 1) && answers && given ? found : null;
  } catch { return null; }
}

function keep() {
  try { localStorage.setItem(STORE, JSON.stringify(state)); } catch { kept = false; }
}

function exportJudgements() {
  const { page, judge, answers } = state;
  const blob = new Blob([`${JSON.stringify({ schema: 1, page, judge, answers }, null, 1)}\n`], { type: "application/json" });
  const link = element("a", { href: URL.createObjectURL(blob), download: `judgements-${[page, judge.replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 40)].filter(Boolean).join("-")}.json` });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

// --- what keys and buttons do -------------------------------------------------------------------------------------

const tally = (answer) => state.given.filter((i) => state.answers[i] === answer).length;
const firstLeft = () => Array.from({ length: N }, (_, i) => i + 1).find((i) => !state.answers[i]) ?? N + 1;

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

function go(to) {
  state.at = Math.max(0, Math.min(N + 1, to));
  keep();
  draw();
}

function startOver() {
  if (!confirm("Forget all answers on this page? Export them first.")) return;
  Object.assign(state, { judge: "", answers: {}, given: [] });
  go(0);
}

const judging = () => state.at >= 1 && state.at <= N;
function press(key) {
  if (key in ANSWERS && judging()) answer(ANSWERS[key]);
  else if (key === "u") undo();
  else if (key === "arrowleft") go(state.at - 1);
  else if (key === "arrowright") go(state.at + 1);
  else if (key === "e") exportJudgements();
  else if (key === "enter" && state.at === 0) go(firstLeft());
  else return false;
  return true;
}

addEventListener("keydown", (event) => {
  const typing = event.target.closest?.("input"), pressed = event.target.closest?.("button");
  if (event.repeat || event.ctrlKey || event.metaKey || event.altKey || (typing && event.key !== "Enter") || (pressed && event.key === "Enter")) return;
  if (press(event.key.toLowerCase())) event.preventDefault();
});
for (const button of document.querySelectorAll("#answers [data-key]")) button.addEventListener("click", () => press(button.dataset.key));
document.getElementById("export").addEventListener("click", exportJudgements);

// --- what is seen -------------------------------------------------------------------------------------------------

function draw() {
  const main = document.getElementById("main"), done = tally("yes") + tally("no") + tally("skip");
  main.replaceChildren(...(state.at === 0 ? introduction() : judging() ? feature(DATA.items[state.at - 1]) : theEnd()));
  document.getElementById("answers").hidden = !judging();
  document.getElementById("export").hidden = !done || state.at > N;
  document.getElementById("meter").value = done / N;
  const number = judging() ? `${state.at} of ${N}` : state.at ? "The end" : "";
  document.getElementById("progress").textContent = `${number}${done ? `${number ? " · " : ""}${done} done` : ""}`;
  for (const button of document.querySelectorAll("#answers [data-key]")) {
    if (button.dataset.key in ANSWERS) button.setAttribute("aria-pressed", state.answers[state.at] === ANSWERS[button.dataset.key]);
    if (button.dataset.key === "u") button.disabled = !state.given.length;
  }
  document.getElementById("tip").hidden = true;
  scrollTo(0, 0);
  if (!judging()) main.querySelector("h1").focus({ preventScroll: true });
}

const heading = (text) => element("h1", { tabindex: -1 }, text);
const lost = () => (kept ? null : element("p.note", {}, "This browser keeps nothing of this page: export before you close it."));

function introduction() {
  const name = element("input", { type: "text", value: state.judge, maxlength: 80, autocomplete: "off", placeholder: "optional", input: (event) => { state.judge = event.target.value; keep(); } });
  const begun = state.given.length > 0;
  return [element("div.welcome", {}, heading("Does it stand for something?"),
    element("p.lead", {}, `${N.toLocaleString("en")} features of a language model, one at a time. Of each you see where it fires most, and which next tokens it argues for and against.`),
    element("dl.rules", {},
      element("dt", {}, element("kbd", {}, "y"), "Yes"), element("dd", {}, "You can say in a few words what these places share, and most of them fit."),
      element("dt", {}, element("kbd", {}, "n"), "No"), element("dd", {}, "They have nothing in common that you could name, or several unrelated things."),
      element("dt", {}, element("kbd", {}, "s"), "Skip"), element("dd", {}, "You cannot tell: a language you do not read, say. It will not count."),
      element("dt", {}, element("kbd", {}, "u"), "Undo"), element("dd", {}, "Takes back the last answer. ", element("kbd", {}, "←"), " ", element("kbd", {}, "→"), " look around without answering.")),
    element("p", {}, "Judge by the examples first. “It fires on one token, always” is something to share. The features come from several sources in random order; which is which is not in this page, so please do not try to find out."),
    element("p.soft", {}, "Your answers stay in this browser until you export them; nothing is sent anywhere."),
    lost(),
    element("form.begin", { submit: (event) => { event.preventDefault(); go(firstLeft()); } },
      element("label", {}, "Your name, for the export", name),
      element("button.button.primary", { type: "submit" }, begun ? "Go on " : "Begin ", element("kbd", {}, "Enter"))))];
}

function feature(item) {
  return [heading(`Feature ${state.at}`), lost(), element("div.columns", {},
    element("section", { "aria-labelledby": "h-places" }, element("h2", { id: "h-places" }, "Where it fires most"),
      element("ol.examples", {}, item.examples.map((example) => element("li", {}, element("span.value", {}, told(example.levels[example.peak])), exampleText(example))))),
    item.top ? element("section", { "aria-labelledby": "h-says" }, element("h2", { id: "h-says" }, "What it says"),
      element("div.effects", {}, effects("More likely next", item.top, "var(--transfer)", DATA.texts), effects("Less likely next", item.bottom, "var(--root)", DATA.texts))) : null)
  ].filter(Boolean);
}

const told = (level) => `${Math.round((100 * level) / DATA.levels)} %`;

function exampleText(example) {
  return element("div.tokens", { dir: "ltr" }, example.tokens.map((text, i) => {
    const level = example.levels[i];
    return shaded(DATA.texts[text], Math.max(0, level) / DATA.levels, told(level), `${i === example.peak ? ".peak" : ""}${level < 0 ? ".beyond" : ""}`);
  }));
}

function theEnd() {
  const left = N - state.given.length;
  const say = (n, one, many) => `${n.toLocaleString("en")} ${n === 1 ? one : many}`;
  return [element("div.welcome", {}, heading(left ? "Some are left" : "Done. Thank you!"),
    element("p.lead", {}, `You answered ${say(tally("yes") + tally("no"), "feature", "features")} and skipped ${say(tally("skip"), "feature", "features")}${left ? `; ${say(left, "is", "are")} left` : ""}.`),
    element("p", {}, "Export your answers and give the file to whoever gave you this page."),
    lost(),
    element("div.begin", {},
      element("button.button.primary", { type: "button", click: exportJudgements }, "Export ", element("kbd", {}, "e")),
      left ? element("button.button", { type: "button", click: () => go(firstLeft()) }, "Go to the first one left") : null,
      element("button.button", { type: "button", click: undo }, "Undo ", element("kbd", {}, "u")),
      element("button.button", { type: "button", click: startOver }, "Start over, for another judge")))];
}

keep();
draw();
