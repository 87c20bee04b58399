"""The settings of a run, each declared once with its bounds, default and help: schema, fields, presets."""
