"""Sweeps: their points, their jobs and their folders."""
