"""One VM put together: the address map, the boot protocol, the device tree, and the wiring of everything else."""
