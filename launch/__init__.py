"""Launchers: one script for each kind of place to run in."""
