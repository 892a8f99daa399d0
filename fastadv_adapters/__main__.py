"""``python -m fastadv_adapters`` is the command ``fastadv``."""

from .cli import main

if __name__ == "__main__":
    main()
