"""A line of plain text under a field: what is known of its value. Whatever it says is never taken for HTML."""

from __future__ import annotations

from typing import Any

import gradio as gr

CSS = """
p { margin: 0; font-size: 13px; line-height: 1.5; color: var(--body-text-color-subdued); overflow-wrap: anywhere; }
p[data-tone="bad"] { color: var(--error-text-color); }
p b { font-weight: 600; color: var(--body-text-color); }
p[data-tone="bad"] b { color: inherit; }
"""
JS = """
// Value: {text, tone, lead}: the line, "bad" for an error, and a word or two in bold before it.
function receive(value) {
  const line = element.querySelector("p");
  const lead = document.createElement("b");
  lead.textContent = (value && value.lead) || "";
  line.dataset.tone = (value && value.tone) || "";
  line.replaceChildren(lead, lead.textContent ? " " : "", (value && value.text) || "");
}
watch("value", () => receive(props.value));
receive(props.value);
"""


def line(**given: Any) -> gr.HTML:
    """The component; its value is what `told` gives."""
    return gr.HTML(
        html_template='<p aria-live="polite"></p>',
        css_template=CSS,
        js_on_load=JS,
        apply_default_css=False,
        container=False,
        **given,
    )


def told(text: str = "", tone: str = "", lead: str = "") -> dict[str, str]:
    """A line of text, its tone (`bad` for an error), and what stands in bold before it."""
    return {"text": text, "tone": tone, "lead": lead}
