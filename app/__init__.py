"""The studio: MoLE in the browser. `app` imports `mole`, never the other way; importing it loads no torch."""

from app.settings import quickly

with quickly():
    import gradio  # noqa: F401  the first import, and the only slow one
