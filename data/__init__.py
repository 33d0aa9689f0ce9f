"""Makes real media for the trainers' demos and tests; a tool of the repository, not a package."""
