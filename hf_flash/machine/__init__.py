"""Machine: what this one is and can deliver: cgroups, free memory, disk, memory cap, cores."""
