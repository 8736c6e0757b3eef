"""The user's side of the wall: checks, builds, mounts, launches. Never imports torch."""
