"""What every other package uses and that uses none of them: errors, limits, locks, safe files, processes, redaction."""
