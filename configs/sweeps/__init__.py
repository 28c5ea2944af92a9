"""Sweeps: what varies between the runs that a launcher starts together."""
