"""The summary, the plots and the parity page, made from the result files."""
