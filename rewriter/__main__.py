"""``python -m attn_rewrite`` is the command ``attn-rewrite``."""

from attn_rewrite.cli import main

if __name__ == "__main__":
    main()
