"""Benchmarks of wooly, each beside stock vLLM or transformers: ``python benchmarks`` lists them.

``harness`` starts and measures processes, ``workers`` are those processes, ``models`` are checkpoints, ``scenarios``
are the benchmarks, ``parity`` and ``soak`` are benchmarks of several modules, ``report`` turns ``results`` into a page,
a summary and plots. Model makers and the vLLM server are shared with the tests (``tests/support``); tests import
nothing from here.
"""
