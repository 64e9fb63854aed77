"""What this machine is and can deliver: cgroups, free memory, disk, memory cap, cores. It imports `base`, `errors`."""
