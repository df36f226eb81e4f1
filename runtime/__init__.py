"""Machines and disks: devices, processes, signals, files and checkpoints."""
