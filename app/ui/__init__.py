"""The page: tabs, panels and forms of Gradio components, and how their events are wired. Never imports torch."""
