"""How good a model is: accuracy by likelihood, exact match, perplexity; in the foreground or as a job."""
