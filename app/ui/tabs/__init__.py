"""The studio's tabs, one module each: `build(...)` makes the components and their handlers."""
