"""The parts of the tabs, one panel per file: `build_…` creates its components, `wire_…` connects their handlers."""
