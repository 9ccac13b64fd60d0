"""What is drawn: the curves of a run, which layer uses which, fused against unfused."""
