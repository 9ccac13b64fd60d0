"""`plan`: what a training step needs, before it runs. `counting` counts bytes, `dry_run` runs without data."""
