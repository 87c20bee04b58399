"""The pieces the tabs are made of, one panel a file: `build(...)` makes the components and wires their handlers."""
