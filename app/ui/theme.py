"""The studio's theme: one accent colour, system fonts, and the page's CSS. Nothing is loaded from other hosts."""

from __future__ import annotations

from pathlib import Path

import gradio as gr

CSS = Path(__file__).parent / "page.css"
ACCENT = gr.themes.Color(
    name="mole",
    c50="#eefafa", c100="#d5f1f2", c200="#aee2e5", c300="#7acdd3", c400="#43b1ba", c500="#1f949f",
    c600="#127a85", c700="#11636d", c800="#134f57", c900="#143f46", c950="#08272c",
)  # fmt: skip
GREY = gr.themes.Color(
    name="mole-grey",
    c50="#f8f9f9", c100="#f1f3f3", c200="#e3e7e8", c300="#cdd3d5", c400="#98a2a6", c500="#67727a",
    c600="#4c565d", c700="#353d43", c800="#20262b", c900="#161b20", c950="#0e1215",
)  # fmt: skip
SANS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Noto Sans", "sans-serif")
MONO = ("ui-monospace", "SF Mono", "Cascadia Mono", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace")

COLOURS_AND_SIZES = {
    "body_background_fill": "*neutral_50",
    "body_background_fill_dark": "*neutral_950",
    "body_text_color": "*neutral_900",
    "body_text_color_dark": "#e6eaec",
    "body_text_color_subdued": "*neutral_500",
    "body_text_color_subdued_dark": "#9aa5ab",
    "background_fill_primary": "#ffffff",
    "background_fill_primary_dark": "*neutral_900",
    "background_fill_secondary": "*neutral_100",
    "background_fill_secondary_dark": "*neutral_800",
    "border_color_primary": "*neutral_200",
    "border_color_primary_dark": "#2a3238",
    "color_accent": "*primary_600",
    "color_accent_soft": "*primary_50",
    "color_accent_soft_dark": "#0f2b30",
    "link_text_color": "*primary_700",
    "link_text_color_dark": "*primary_300",
    "block_background_fill": "transparent",
    "block_background_fill_dark": "transparent",
    "block_border_width": "0px",
    "block_shadow": "none",
    "block_label_background_fill": "transparent",
    "block_label_background_fill_dark": "transparent",
    "block_label_border_width": "0px",
    "block_title_text_size": "13px",
    "block_title_text_weight": "550",
    "block_title_text_color": "*body_text_color",
    "block_info_text_size": "12px",
    "block_padding": "0px",
    "form_gap_width": "0px",
    "layout_gap": "16px",
    "input_background_fill": "#ffffff",
    "input_background_fill_dark": "#12171b",
    "input_border_color": "*neutral_300",
    "input_border_color_dark": "#333c43",
    "input_border_width": "1px",
    "input_border_color_focus": "*primary_500",
    "input_shadow_focus": "0 0 0 3px rgba(31,148,159,.16)",
    "input_padding": "8px 11px",
    "input_text_size": "14px",
    "checkbox_border_radius": "5px",
    "slider_color": "*primary_600",
    "slider_color_dark": "*primary_400",
    "button_primary_background_fill": "*primary_600",
    "button_primary_background_fill_hover": "*primary_700",
    "button_primary_background_fill_dark": "*primary_600",
    "button_primary_background_fill_hover_dark": "*primary_500",
    "button_primary_text_color": "#ffffff",
    "button_secondary_background_fill": "#ffffff",
    "button_secondary_background_fill_dark": "*neutral_800",
    "button_secondary_background_fill_hover": "*neutral_100",
    "button_secondary_background_fill_hover_dark": "*neutral_700",
    "button_secondary_border_color": "*neutral_300",
    "button_secondary_border_color_dark": "#39434a",
    "button_border_width": "1px",
    "button_large_text_weight": "600",
    "button_large_text_size": "15px",
    "button_medium_text_weight": "550",
    "error_background_fill": "#fdf3f1",
    "error_background_fill_dark": "#2b1714",
    "error_border_color": "#efc4bb",
    "error_border_color_dark": "#6b2f25",
    "error_text_color": "#a8311a",
    "error_text_color_dark": "#f0a594",
}


def theme() -> gr.themes.Base:
    """The Gradio theme, light and dark."""
    base = gr.themes.Base(
        primary_hue=ACCENT,
        secondary_hue=ACCENT,
        neutral_hue=GREY,
        text_size=gr.themes.sizes.text_md,
        spacing_size=gr.themes.sizes.spacing_md,
        radius_size=gr.themes.sizes.radius_lg,
        font=[gr.themes.Font(name) for name in SANS],
        font_mono=[gr.themes.Font(name) for name in MONO],
    )
    return base.set(**COLOURS_AND_SIZES)


def head() -> str:
    """The page's style sheet and script, for its `<head>`."""
    script = CSS.with_suffix(".js").read_text(encoding="utf-8")
    return f"<style>{CSS.read_text(encoding='utf-8')}</style><script type=module>{script}</script>"
