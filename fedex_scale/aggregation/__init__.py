"""Layer by layer: factors in, method, fold, out."""
