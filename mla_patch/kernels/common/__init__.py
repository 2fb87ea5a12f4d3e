"""What the kernel families share: no kernel of its own, and no family is known here."""
