"""The studio's tabs, one module each: `build_…_tab` creates the components and connects their handlers."""
