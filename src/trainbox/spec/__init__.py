"""What both sides of the container wall share: pydantic, YAML and the standard library, nothing heavy."""
