"""Memory, disk and time, before anything is loaded."""
