"""The studio's own components: HTML, CSS and JavaScript, one folder each; `shared/` holds what several of them use."""
