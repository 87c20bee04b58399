// A card above the tabs, not an overlay: the page stays usable while it is open.
const KEY = "mole-studio-tour-seen";
const STEPS = [
  { title: "Several small experts, and a router that picks among them for every token.",
    text: "Train such a mixture on your own data, and watch it work. Three steps, half a minute.", next: "Show me around" },
  { tab: "Chat", mark: "#routing-view", title: "Chat: see which experts are active",
    text: "A demo adapter is selected. Choose an example: for every token, the heatmap shows which experts are active in each layer, and the entropy of the router." },
  { tab: "Train", mark: "#start", title: "Train: use the defaults, or change them",
    text: "Model, data and method are filled in; presets give each paper's settings. The run trains in the background, even when this page is closed." },
  { tab: "Runs", mark: "#run-list", title: "Runs: all runs, past and present",
    text: "Follow loss and routing live, stop and resume, evaluate, compare, and open any checkpoint in Chat.", next: "Done" },
];
const card = $(".tour");
let at = 0;
let ringed = null;

function remember() {
  try { localStorage.setItem(KEY, "1"); } catch { /* without storage the tour is shown again */ }
}

function seen() {
  try { return localStorage.getItem(KEY) === "1"; } catch { return true; }
}

function ring(selector) {
  if (ringed) ringed.classList.remove("tour-ring");
  ringed = selector ? document.querySelector(selector) : null;
  if (ringed) ringed.classList.add("tour-ring");
}

function show(step) {
  at = step;
  const { tab, mark, title, text, next } = STEPS[at];
  $("b").textContent = title;
  $("p").textContent = text;
  $(".next").textContent = next || "Next";
  $(".close").textContent = at ? "Close" : "Not now";
  $(".dots").replaceChildren(...STEPS.map((_, i) => make("i", { className: i === at ? "on" : "" })));
  if (tab) [...document.querySelectorAll("#tabs [role=tab]")].find((button) => button.textContent.trim() === tab)?.click();
  setTimeout(() => ring(mark), 250); // once the tab is rendered
  card.hidden = false;
}

function close() {
  card.hidden = true;
  ring(null);
  remember();
}

$(".next").addEventListener("click", () => (at + 1 < STEPS.length ? show(at + 1) : close()));
$(".close").addEventListener("click", close);
card.addEventListener("keydown", (event) => event.key === "Escape" && close());
document.addEventListener("click", (event) => {
  if (!event.target.closest || !event.target.closest("#tour-again")) return;
  show(0);
  $(".next").focus();
});
if (!seen()) show(0);
