"""Pure functions of one layer's factors, and the algebra beneath; torch alone."""
