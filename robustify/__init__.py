"""Robust image classifiers: distil, evaluate, report, push."""

__version__ = "0.1.0"
