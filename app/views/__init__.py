"""Components of our own: HTML, CSS and JavaScript, one folder each."""
