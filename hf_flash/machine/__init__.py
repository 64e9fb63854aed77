"""Machine: what this machine is and what it can deliver: cgroups, free memory, disk, memory cap, cores."""
