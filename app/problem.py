"""What is wrong with the form, in one line above Start and beside the field itself."""

from __future__ import annotations

from typing import Any

import gradio as gr

CSS = "p { margin: 0; font-size: 13px; line-height: 1.5; color: var(--error-text-color); overflow-wrap: anywhere; }"
JS = """
// Value: {text, field, reveal}: the line, the element id of the field it is about, and whether to bring it into view.
const line = element.querySelector("p");
let marked = null;

function clear() {
  if (!marked) return;
  marked.classList.remove("field-problem");
  marked.querySelectorAll(".field-message").forEach((note) => note.remove());
  marked.querySelectorAll("[aria-invalid]").forEach((input) => input.removeAttribute("aria-invalid"));
  marked = null;
}

function receive(value) {
  clear();
  line.textContent = (value && value.text) || "";
  marked = value && value.field ? document.getElementById(value.field) : null;
  if (!marked) return;
  const note = document.createElement("p");
  note.className = "field-message";
  note.textContent = value.text;
  marked.append(note);
  marked.classList.add("field-problem");
  marked.querySelectorAll("input, textarea").forEach((input) => input.setAttribute("aria-invalid", "true"));
  if (value.reveal) marked.scrollIntoView({ block: "center", behavior: "smooth" });
}

watch("value", () => receive(props.value));
receive(props.value);
"""


def problem(**given: Any) -> gr.HTML:
    """The component; its value is what `told` gives."""
    return gr.HTML(
        html_template='<p role="alert"></p>',
        css_template=CSS,
        js_on_load=JS,
        apply_default_css=False,
        container=False,
        **given,
    )


def told(text: str = "", field: str = "", reveal: bool = False) -> dict[str, Any]:
    """A problem's line, the element id of its field (empty: none) and whether the page scrolls there."""
    return {"text": text, "field": field, "reveal": reveal}
