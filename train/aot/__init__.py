"""Ahead-of-time compilation for chips that are not attached: memory, collectives and roofline."""
