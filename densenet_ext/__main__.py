"""``python -m densenet_ext``: the command line."""

from __future__ import annotations

from densenet_ext.cli import main

if __name__ == "__main__":
    main()
