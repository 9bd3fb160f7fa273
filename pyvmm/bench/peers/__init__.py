"""What pyvmm is measured against in the same run: a bare loop, its Python twin, the kernel's selftests, QEMU."""
