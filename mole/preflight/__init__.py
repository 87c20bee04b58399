"""Before a run starts: an estimate of memory and time, ways to reduce them, a dry run, a preview of the data."""
