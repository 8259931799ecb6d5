"""Circuits of a network that hold whatever happens to the rest of it."""
