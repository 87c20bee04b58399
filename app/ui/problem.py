"""What is wrong with the form, in one line above Start and beside the field itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

HTML = '<p role="alert"></p><button type="button" hidden>Show the field</button>'
CSS = """
p { margin: 0; font-size: 13px; line-height: 1.5; color: var(--error-text-color); overflow-wrap: anywhere; }
button { font: inherit; font-size: 13px; padding: 0; border: 0; background: none; cursor: pointer; }
button { color: var(--link-text-color); text-decoration: underline; text-underline-offset: 3px; }
button:focus-visible { outline: 2px solid var(--color-accent); outline-offset: 2px; }
[hidden] { display: none; }
"""
JS = """
// Value: {text, field, inside, reveal}: the line, the element id of the field it is about, those of the accordions
// around it, and whether to bring it into view.
const line = element.querySelector("p");
const show = element.querySelector("button");
let told = null;
let marked = null;
let revealing = null;

function clear() {
  if (!marked) return;
  marked.classList.remove("field-problem");
  marked.querySelectorAll(".field-message").forEach((note) => note.remove());
  marked.querySelectorAll("[aria-invalid]").forEach((input) => input.removeAttribute("aria-invalid"));
  marked = null;
}

function mark() {
  marked = told && told.field ? document.getElementById(told.field) : null;
  if (!marked) return;
  const note = document.createElement("p");
  note.className = "field-message";
  note.textContent = told.text;
  marked.append(note);
  marked.classList.add("field-problem");
  marked.querySelectorAll("input, textarea").forEach((input) => input.setAttribute("aria-invalid", "true"));
}

// An accordion makes what is in it when it opens, so one is opened after the other and the field looked for again.
// One at a time: a second click would close what the first has opened.
async function reveal(about) {
  if (revealing === about) return;
  revealing = about;
  for (const id of about.inside || []) {
    const fold = await found(() => document.getElementById(id)?.querySelector("button.label-wrap"));
    if (fold && !fold.classList.contains("open")) fold.click();
  }
  const field = await found(() => document.getElementById(about.field));
  revealing = null;
  if (!field || told !== about) return;
  if (marked !== field) { clear(); mark(); }
  field.scrollIntoView({ block: "center", behavior: "smooth" });
  field.querySelector("input, textarea")?.focus({ preventScroll: true });
}

async function found(look) {
  for (let tries = 0; tries < 30; tries++) {
    const item = look();
    if (item) return item;
    await new Promise((done) => setTimeout(done, 50));
  }
  return null;
}

function receive(value) {
  clear();
  told = value && value.text ? value : null;
  line.textContent = told ? told.text : "";
  show.hidden = !(told && told.field);
  mark();
  if (told && told.reveal && told.field) reveal(told);
}

show.addEventListener("click", () => told && reveal(told));
watch("value", () => receive(props.value));
receive(props.value);
"""


def problem(**given: Any) -> gr.HTML:
    """The component; its value is what `told` gives."""
    return gr.HTML(
        html_template=HTML, css_template=CSS, js_on_load=JS, apply_default_css=False, container=False, **given
    )


def told(text: str = "", field: str = "", reveal: bool = False, inside: Sequence[str] = ()) -> dict[str, Any]:
    """A problem's line, the element id of its field (empty: none), whether the page scrolls there, and the ids of the
    accordions that are opened for it, the outermost first."""
    return {"text": text, "field": field, "reveal": reveal, "inside": list(inside)}
