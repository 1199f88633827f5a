"""lm-eval on the running engine, over its ranks, afterwards; and comparisons."""
