"""Which upstream serves a model call, and what happens when it fails before it has answered."""
