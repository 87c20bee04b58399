// A card above the tabs, not an overlay: the page stays usable while it is open.
const KEY = "mole-studio-tour-seen";
const STEPS = [
  { title: "Several small experts, and a router that picks among them for every token.",
    text: "Here you train such a mixture on your own data, and watch it at work. Three stops, half a minute.", next: "Show me around" },
  { tab: "Chat", mark: "#routing-view", title: "Chat: see who answers",
    text: "A demo adapter is chosen already. Take an example: with every token the heatmap shows which experts answered, in which layer, and how sure the router was." },
  { tab: "Train", mark: "#start", title: "Train: leave everything as it is, or change it",
    text: "Model, data and method are filled in; presets give each paper's settings. Start returns at once: the run goes on in the background, also when this page is closed." },
  { tab: "Runs", mark: "#run-list", title: "Runs: what trains, what has trained",
    text: "Loss and routing as they go, stop and resume, evaluate, compare, and open any checkpoint in Chat.", next: "Done" },
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
