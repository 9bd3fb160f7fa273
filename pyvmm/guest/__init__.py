"""Handles on pyvmm's own payloads: what they are called, the ABI they speak, and the puppet."""
