"""How fast a mixture is beside its parent and its rivals: contestants, workloads, interleaved timing, a report."""
