"""Who may call, and what each key reaches."""
