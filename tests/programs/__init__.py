"""Real programs: modules as their packages build them, and what `accelerate` and `compile` do with them."""
