"""The page: tabs, panels and forms, made of Gradio components. Never imports torch."""
