// What is wrong with a form. Value: {text, field, inside, reveal}: the line, the element id of the field it is about,
// those of the accordions around it, and whether to scroll there.
let problem = null;
let marked = null; // the field that carries the message
let revealing = null;

function clear() {
  if (!marked) return;
  marked.classList.remove("field-problem");
  marked.querySelectorAll(".field-message").forEach((note) => note.remove());
  marked.querySelectorAll("[aria-invalid]").forEach((input) => input.removeAttribute("aria-invalid"));
  marked = null;
}

function mark() {
  marked = problem && problem.field ? document.getElementById(problem.field) : null;
  if (!marked) return;
  marked.append(make("p", { className: "field-message", textContent: problem.text }));
  marked.classList.add("field-problem");
  marked.querySelectorAll("input, textarea").forEach((input) => input.setAttribute("aria-invalid", "true"));
}

// Gradio renders the content of an accordion when it opens, so they are opened one after the other and the field is
// looked up again. Only once for each problem: a second click would close what the first has opened.
async function reveal(about) {
  if (revealing === about) return;
  revealing = about;
  for (const id of about.inside || []) {
    const fold = await appeared(() => document.getElementById(id)?.querySelector("button.label-wrap"));
    if (fold && !fold.classList.contains("open")) fold.click();
  }
  const field = await appeared(() => document.getElementById(about.field));
  revealing = null;
  if (!field || problem !== about) return;
  if (marked !== field) { clear(); mark(); }
  field.scrollIntoView({ block: "center", behavior: "smooth" });
  field.querySelector("input, textarea")?.focus({ preventScroll: true });
}

// The element once it is on the page; null after 1.5 seconds.
async function appeared(find) {
  for (let tries = 0; tries < 30; tries++) {
    const item = find();
    if (item) return item;
    await new Promise((done) => setTimeout(done, 50));
  }
  return null;
}

function receive(value) {
  clear();
  problem = value && value.text ? value : null;
  $("p").textContent = problem ? problem.text : "";
  $("button").hidden = !(problem && problem.field);
  mark();
  if (problem && problem.reveal && problem.field) reveal(problem);
}

$("button").addEventListener("click", () => problem && reveal(problem));
watch("value", () => receive(props.value));
receive(props.value);
