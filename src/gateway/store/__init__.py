"""What processes share and what outlives them: one SQL database, and Redis where it is configured."""
