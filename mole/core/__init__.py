"""Shared by every other package, importing none of them: errors, limits, locks, safe files, processes, redaction."""
