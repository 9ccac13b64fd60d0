"""Dense blocks and transitions of somebody's own code: found by their modules, tried out, and then run fused."""
