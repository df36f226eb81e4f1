"""How a run lives on machines and disks."""
