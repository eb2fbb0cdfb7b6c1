"""Attacks: PGD for the inner maximisation, and what an evaluation runs."""
