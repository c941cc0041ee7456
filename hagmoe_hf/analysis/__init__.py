"""Looking inside a HAG-MoE: trace runs texts and records routing, plots draw what was recorded."""
