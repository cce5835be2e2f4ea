"""Bringing an export to a newer iteration of its model: only changed bytes are written, and interrupted safely."""
