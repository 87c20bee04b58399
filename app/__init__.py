"""The studio: MoLE in the browser. `app` stands on `mole`; no module here imports torch when it is loaded."""

from app.settings import quickly

with quickly():
    import gradio  # noqa: F401  the first import of it, and the only slow one
