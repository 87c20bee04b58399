"""The studio: MoLE in the browser. `app` imports `mole`, never the other way; importing it loads no torch.

Only on a Space with ZeroGPU does it: there `spaces` comes first, which imports torch and lets it show a GPU.
"""

from app.settings import quickly
from mole.core.gpus import on_zerogpu

with quickly():
    if on_zerogpu():
        import spaces  # noqa: F401  before Gradio, torch, and all that could start CUDA
    import gradio  # noqa: F401  the first import, and the only slow one
