"""Types, names and formulas that every other package may import. No I/O but reading files."""
